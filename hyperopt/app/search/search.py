"""A search: what it varies, what it may not start with, and its study with the sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from hyperopt.app.config import ConfigError
from hyperopt.app.experiment import counts
from hyperopt.app.search import storage
from hyperopt.app.search.settings import KEY, Settings
from hyperopt.app.search.space import Choice, Space, given, points, quoted, split

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

FACTS = "hyperopt"  # name of the attribute of a study that says what is searched
PRUNED = "hydra.sweeper.pruner"  # why a pruned run has ended
Prune = Callable[[int, Mapping[str, float]], bool]
"""Called with the number of steps done and the row of an evaluation; returns whether the run ends now."""


@dataclass(frozen=True)
class Search:
    """What a sweep searches.

    Attributes:
        settings: the keys of ``hydra.sweeper``.
        space: the search space.
        fixed: the overrides that all jobs share.
    """

    settings: Settings
    space: Space
    fixed: list[str]

    @classmethod
    def of(cls, config: DictConfig) -> Search:
        """Return the search that a sweep's config describes, or refuse one that cannot work."""
        storage.refuse_password(config.hydra.sweeper)
        settings = Settings.of(config.hydra.sweeper)
        settings.check_packages()
        space, fixed = split(given(config))
        settings.check_space(space)
        settings.check_start(space, fixed)
        return cls(settings, space, fixed)

    def samples(self) -> list[list[str]]:
        """Return the overrides of some jobs of the search, which are checked before the first; see ``space.points``."""
        return [[*point, *self.fixed] for point in points(self.space)]

    def overrides(self, params: Mapping[str, Any], start: str | None = None) -> list[str]:
        """Return the overrides of the trial with these values, whose hyperparameters start from those of the run ``start``."""
        own = [f"{each.key}={each.text(params[each.key])}" for each in self.space]
        return [*own, *self.fixed, *([] if start is None else [f"init_from={quoted(start)}", "init_partial=true"])]

    def facts(self, cfg: DictConfig) -> dict[str, Any]:
        """Return what must be equal for all processes that share a study, and for a search that is continued."""
        metrics, directions = self.settings.objectives(cfg)
        fixed = [each for each in self.fixed if counts(each.lstrip("+~").partition("=")[0], "resume")]
        space = {each.key: list(each.values) if isinstance(each, Choice) else repr(each) for each in self.space}
        facts = {"metric": metrics, "direction": directions, "overrides": sorted(fixed), "space": space}
        return {**facts, "warm_start": self.settings.warm_start}

    def refuse(self, cfg: DictConfig, sweep: Path, measures: Iterable[str]) -> None:
        """Refuse a storage that cannot be reached or holds another study, and metrics that a job does not have; write nothing."""
        import optuna

        self.settings.check_metrics(cfg, tuple(measures))
        found = storage.existing(self.settings, sweep)
        if found is not None and self.settings.study_name in optuna.get_all_study_names(found):
            self._same(optuna.load_study(study_name=self.settings.study_name, storage=found), self.facts(cfg))

    def _same(self, study: Study, facts: Mapping[str, Any]) -> None:
        """Refuse a study of another search."""
        there = study.user_attrs.get(FACTS)
        if there is None and not study.get_trials(deepcopy=False):
            return
        for name, here in facts.items():
            found = there.get(name) if isinstance(there, dict) else "unknown, since another program made it"
            if found != here:
                raise ConfigError(
                    f"the study {study.study_name!r} in {KEY}.storage is of another search: {name} is {found} there and {here} "
                    f"here; make these equal, or change {KEY}.study_name or {KEY}.storage"
                )

    def study(self, where: BaseStorage, cfg: DictConfig) -> Study:
        """Return the study, which is created if it is missing, or refuse one of another search."""
        import optuna

        facts = self.facts(cfg)
        study = optuna.create_study(
            storage=where,
            study_name=self.settings.study_name,
            directions=facts["direction"],
            sampler=_numbered(self.settings, self._sampler),
            load_if_exists=True,
        )
        self._same(study, facts)
        if FACTS not in study.user_attrs:
            study.set_user_attr(FACTS, facts)
        return study

    def _sampler(self, seed: int | None) -> BaseSampler:
        """Return a new sampler."""
        from optuna import samplers

        kind = self.settings.sampler
        if kind == "grid":
            return _grid({each.key: list(each.listed() or ()) for each in self.space}, self.settings.seed or 0)
        if kind == "cma_es":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        made = {"tpe": samplers.TPESampler, "random": samplers.RandomSampler, "nsga_ii": samplers.NSGAIISampler}
        return made[kind](seed=seed)

    @property
    def trials(self) -> int:
        """The number of trials of the whole study."""
        size = math.prod(len(each.listed() or ()) for each in self.space) if self.settings.sampler == "grid" else math.inf
        return int(min(self.settings.n_trials, size))


def distribution(each: Any) -> BaseDistribution:
    """Return Optuna's form of one key of the search space."""
    from optuna import distributions

    if isinstance(each, Choice):
        return distributions.CategoricalDistribution(each.values)
    if each.whole:
        return distributions.IntDistribution(each.low, each.high, each.log, int(each.step))
    return distributions.FloatDistribution(each.low, each.high, each.log, each.step)


def _grid(values: dict[str, list[Any]], seed: int) -> BaseSampler:
    """Return Optuna's grid, which would stop ``Study.optimize`` after the last point; here ``Search.trials`` does."""
    from optuna.samplers import GridSampler

    class Grid(GridSampler):
        def after_trial(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing."""

    return Grid(values, seed)


def _numbered(settings: Settings, make: Callable[[int | None], BaseSampler]) -> BaseSampler:
    """Return a sampler whose random numbers depend on the seed and on the number of the trial alone.

    One generator for all trials would draw the same numbers in each process of a search, and again after each resume.
    """
    from optuna.samplers import BaseSampler

    class Numbered(BaseSampler):
        made: BaseSampler = make(settings.seed)

        def before_trial(self, study: Any, trial: Any) -> None:
            self.made = make(None if settings.seed is None else (settings.seed * 1_000_003 + trial.number) % 2**32)
            self.made.before_trial(study, trial)

        def infer_relative_search_space(self, *args: Any) -> Any:
            return self.made.infer_relative_search_space(*args)

        def sample_relative(self, *args: Any) -> Any:
            return self.made.sample_relative(*args)

        def sample_independent(self, *args: Any) -> Any:
            return self.made.sample_independent(*args)

        def after_trial(self, *args: Any) -> None:
            self.made.after_trial(*args)

    return Numbered()


def prune_of(cfg: DictConfig, hydra: Any) -> Prune | None:
    """Return the function that says whether a job's run is to end early; None if its sweep does not prune."""
    if not hydra.sweeper.get("pruner") or hydra.sweeper.get("trial") is None or cfg.mode != "train":
        return None
    import optuna

    settings = Settings.of(hydra.sweeper)
    metric = settings.objectives(cfg)[0][0]
    where, halving = storage.opened(settings, Path(hydra.sweep.dir)), settings.halving
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        halving.min_resource, halving.reduction_factor, halving.min_early_stopping_rate
    )
    study = optuna.load_study(
        study_name=settings.study_name, storage=where, sampler=optuna.samplers.RandomSampler(), pruner=pruner
    )
    identity = where.get_study_id_from_name(settings.study_name)
    number = where.get_trial_id_from_study_id_trial_number(identity, hydra.sweeper.trial)
    trial = optuna.Trial(study, number)

    def prune(steps: int, row: Mapping[str, float]) -> bool:
        value = row.get(metric, math.nan)
        if steps not in where.get_trial(number).intermediate_values:  # a resumed run repeats evaluations
            trial.report(value, steps)
        return trial.should_prune()

    return prune

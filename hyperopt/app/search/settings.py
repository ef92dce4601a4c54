"""The keys of ``hydra.sweeper`` under ``hydra/sweeper=optuna``, and whether a sampler can take a search space."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hyperopt.app.config import ConfigError, short
from hyperopt.app.errors import near
from hyperopt.app.search.space import MOST, Choice, Numbers, Space

SAMPLERS = ("tpe", "random", "grid", "cma_es", "nsga_ii")
DIRECTIONS = ("minimize", "maximize")
HALVING = "successive_halving"
BEST = "best"
KEY = "hydra.sweeper"
STEPS = ("outer/step_loss", "optimizer/lr", "cost/evaluations", "cost/vjps", "cost/jvps", "time/step_seconds")
"""Metrics that every run has beside those of its evaluations."""
OF_STEPS = ("inner/", "adjoint/", "hypergrad/")
"""Beginnings of the metrics that a task may add to a step; which ones is not known before the first step."""
WHOLE = ("seconds", "steps")
"""Numbers in ``summary.json`` beside its metrics."""


@dataclass(frozen=True)
class Halving:
    """Successive halving: of the runs that reach a rung, only the best continue; see ``configs/hydra/sweeper/optuna.yaml``."""

    min_resource: int | str = "auto"
    reduction_factor: int = 4
    min_early_stopping_rate: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.min_resource != "auto":
            _check_count(f"{KEY}.halving.min_resource", self.min_resource, 1, " or auto")
        _check_count(f"{KEY}.halving.reduction_factor", self.reduction_factor, 2)
        _check_count(f"{KEY}.halving.min_early_stopping_rate", self.min_early_stopping_rate, 0)


@dataclass(frozen=True)
class Settings:
    """The keys of ``hydra.sweeper``; ``configs/hydra/sweeper/optuna.yaml`` says what each means.

    Raises:
        ConfigError: a value cannot work.
    """

    sampler: str = "tpe"
    n_trials: int = 20
    metric: str | Sequence[str] | None = None
    direction: str | Sequence[str] | None = None
    seed: int | None = 0
    storage: str | None = None
    study_name: str = "search"
    n_jobs: int = 1
    pruner: str | None = None
    halving: Halving = field(default_factory=Halving)
    warm_start: str | None = None
    params: Mapping[str, Any] | None = None
    trial: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"{KEY}.sampler={short(self.sampler)} is not a sampler; {near(str(self.sampler), SAMPLERS)}")
        _check_count(f"{KEY}.n_trials", self.n_trials, 1)
        _check_count(f"{KEY}.n_jobs", self.n_jobs, 1)
        if self.seed is not None:
            _check_count(f"{KEY}.seed", self.seed, 0, " or null")
        if self.pruner not in (None, HALVING):
            raise ConfigError(f"{KEY}.pruner={short(self.pruner)} is neither null nor {HALVING}; change {KEY}.pruner")
        if self.warm_start not in (None, BEST):
            raise ConfigError(f"{KEY}.warm_start={short(self.warm_start)} is neither null nor {BEST}; change {KEY}.warm_start")
        for name in ("storage", "study_name"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value.strip()) and not (name == "storage" and value is None):
                raise ConfigError(f"{KEY}.{name}={short(value)} is not a name; change {KEY}.{name}")
        metrics = _several(self.metric)
        if not all(isinstance(each, str) and each for each in metrics) or (self.metric is not None and not metrics):
            raise ConfigError(f"{KEY}.metric={short(self.metric)} names no metric, such as val/loss; change {KEY}.metric")
        if len(set(metrics)) < len(metrics):
            raise ConfigError(f"{KEY}.metric={short(self.metric)} names a metric twice; change {KEY}.metric")
        if self.direction is not None and not _several(self.direction):
            raise ConfigError(f"{KEY}.direction={short(self.direction)} is empty; change {KEY}.direction")
        for each in _several(self.direction):
            if each not in DIRECTIONS:
                raise ConfigError(f"{KEY}.direction={short(each)} is none of {', '.join(DIRECTIONS)}; change {KEY}.direction")
        if len(metrics) > 1 and self.pruner is not None:
            raise ConfigError(f"{KEY}.pruner={self.pruner} needs one metric, but {KEY}.metric names {len(metrics)}; drop one")
        if len(metrics) > 1 and self.warm_start is not None:
            raise ConfigError(f"{KEY}.warm_start=best needs one metric, but {KEY}.metric names {len(metrics)}; drop one")
        if len(metrics) > 1 and self.sampler == "cma_es":
            raise ConfigError(f"{KEY}.sampler=cma_es needs one metric, but {KEY}.metric names {len(metrics)}; try nsga_ii")

    @classmethod
    def of(cls, sweeper: DictConfig) -> Settings:
        """Return the settings in ``hydra.sweeper``, or refuse a key or a value that cannot work."""
        values: dict[Any, Any] = OmegaConf.to_container(sweeper, resolve=True)  # pyright: ignore[reportAssignmentType]
        values.pop("_target_")
        halving = values.pop("halving", None) or {}
        for where, names, kind in ((KEY, values, cls), (f"{KEY}.halving", halving, Halving)):
            known = [each.name for each in fields(kind)]
            for name in names:
                if name not in known:
                    raise ConfigError(f"{where}.{name}: {where} has no key {name!r}; {near(str(name), known)}")
        return cls(**values, halving=Halving(**halving))

    def check_packages(self) -> None:
        """Refuse a search whose packages are not installed."""
        for package in ("optuna", *(["cmaes"] if self.sampler == "cma_es" else [])):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"hydra/sweeper=optuna needs the package {package}, which is not installed; "
                    f"pip install 'hyperopt-bilevel[optuna]'"
                ) from error

    def check_space(self, space: Space) -> None:
        """Refuse a search space that the sampler cannot take."""
        numbers = [each for each in space if isinstance(each, Numbers)]
        if self.sampler == "cma_es" and len(numbers) < 2:
            raise ConfigError(
                f"{KEY}.sampler=cma_es moves two or more numbers (intervals or ranges), and the search space has {len(numbers)}; "
                f"choose another sampler, such as tpe"
            )
        if self.sampler == "grid":
            for each in numbers:
                if each.step is None:
                    raise ConfigError(
                        f"{KEY}.sampler=grid needs steps, but {each.key} is an interval from {each.low} to {each.high}; write "
                        f"range(start, stop, step) or a choice, or choose another sampler"
                    )
            if math.prod(len(each.listed() or ()) for each in space) > MOST:
                raise ConfigError(f"{KEY}.sampler=grid has more than {MOST} points; take fewer values, or another sampler")
        for each in space:
            if isinstance(each, Choice) and len(each.values) > MOST:
                raise ConfigError(f"{each.key} has more than {MOST} choices; take fewer values")

    def check_start(self, space: Space, fixed: Sequence[str]) -> None:
        """Refuse ``warm_start=best`` beside another word about where the hyperparameters of a run start."""
        if self.warm_start is None:
            return
        fixed_keys = [each.lstrip("+~").partition("=")[0] for each in fixed]
        for key in (*(each.key.lstrip("+") for each in space), *fixed_keys):
            own = key.endswith(".init") and key not in fixed_keys
            if own or key in ("init_from", "init_partial", "ckpt_path"):
                what = "is in the search space" if own else "is given"
                raise ConfigError(
                    f"{key} {what}, but under {KEY}.warm_start=best a run starts from the hyperparameters of the best one; drop "
                    f"one of them"
                )

    def objectives(self, cfg: DictConfig) -> tuple[list[str], list[str]]:
        """Return the metrics, by default ``trainer.monitor`` of the job ``cfg``, and for each ``minimize`` or ``maximize``.

        Raises:
            ConfigError: it is not known which way a metric is better, or there are more directions than metrics.
        """
        monitor = "hypergrad/error" if cfg.mode == "check" else str(cfg.trainer.monitor)
        metrics, directions = _several(self.metric) or [monitor], _several(self.direction)
        if not directions:
            own = "maximize" if cfg.mode != "check" and cfg.trainer.mode == "max" else "minimize"
            other = [each for each in metrics if each != monitor]
            if other:
                raise ConfigError(
                    f"{KEY}.metric={', '.join(metrics)}: say which way {' and '.join(other)} is better; set {KEY}.direction to "
                    f"minimize or maximize, or to a list with one for each metric"
                )
            directions = [own]
        if len(directions) != len(metrics):
            raise ConfigError(
                f"{KEY}.direction has {len(directions)} entries for {len(metrics)} metrics ({', '.join(metrics)}); give one for "
                f"each"
            )
        return metrics, directions

    def check_metrics(self, cfg: DictConfig, measures: Sequence[str]) -> None:
        """Refuse metrics that the job ``cfg`` does not log; nothing is known of them if ``measures`` is empty."""
        for name in _several(self.metric) or self.objectives(cfg)[0]:
            known = {*measures, *STEPS, *WHOLE}
            if measures and name not in known and not name.startswith(OF_STEPS):
                raise ConfigError(f"{KEY}.metric={name!r} is not a metric that the task logs; {near(name, known)}")
            if self.pruner is not None and name in WHOLE:
                raise ConfigError(f"{KEY}.pruner={self.pruner} needs a metric of each evaluation, and {name} is none; change one")
        self.objectives(cfg)


def _several(value: Any) -> list[Any]:
    """Return one or several names as a list; empty for None."""
    return [] if value is None else list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_count(key: str, value: Any, least: int, other: str = "") -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{key}={short(value)} must be a whole number >= {least}{other}; change {key}")

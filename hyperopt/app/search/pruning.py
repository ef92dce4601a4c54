"""Stopping a run of a search early: it tells Optuna its metric at each evaluation, and Optuna compares it with other runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt.app.search.settings import Settings

PRUNED = "hydra.sweeper.pruner"  # why a pruned run has ended
Prune = Callable[[int, Mapping[str, float]], bool]
"""Called with the number of steps done and the row of an evaluation; returns whether the run ends now."""


def of_job(cfg: DictConfig, hydra: Any) -> Prune | None:
    """Return the function that says whether a job's run is to end early; None if its sweep does not prune.

    Args:
        cfg: the job's config.
        hydra: Hydra's part of it.
    """
    if not hydra.sweeper.get("pruner") or hydra.sweeper.get("trial") is None or cfg.mode != "train":
        return None
    import optuna

    from hyperopt.app.search.search import pruner
    from hyperopt.app.search.storage import opened

    settings = Settings.of(hydra.sweeper)
    metric = settings.objectives(cfg)[0][0]
    storage = opened(settings, Path(hydra.sweep.dir))
    study = optuna.load_study(
        study_name=settings.study_name, storage=storage, sampler=optuna.samplers.RandomSampler(), pruner=pruner(settings)
    )
    identity = storage.get_study_id_from_name(settings.study_name)
    number = storage.get_trial_id_from_study_id_trial_number(identity, hydra.sweeper.trial)
    trial = optuna.Trial(study, number)

    def prune(steps: int, row: Mapping[str, float]) -> bool:
        value = row.get(metric, math.nan)
        if steps not in storage.get_trial(number).intermediate_values:  # a resumed run repeats evaluations
            trial.report(value, steps)
        return trial.should_prune()

    return prune

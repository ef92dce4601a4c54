"""The trials of a search: which ones a process takes next, and what Optuna is told of the runs that ended.

A trial is a job of the sweep; its run directory is named after its number. A trial belongs to the sweep's directory that took it,
whose lock tells whether its process is alive. When a process was killed, a resumed sweep in its directory continues its trials.
Another process on the same machine gives them up in the name of the dead one and takes their values as new trials.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hyperopt.app.run_directory import ENDED, RunDirectory, measured, or_empty
from hyperopt.app.search import storage
from hyperopt.app.search.search import FACTS, Search, distribution

log = logging.getLogger(__name__)

OWNER, HOST, START, GIVEN_UP, REASON = "directory", "host", "init_from", "given_up", "reason"
"""Names of attributes of a trial."""
PATIENCE = 60.0
"""Seconds after which a trial without an owner is given up: its process was killed between two lines of ``_ask``."""


class Trials:
    """The trials of a study, as one process sees them.

    Args:
        search: what is searched.
        cfg: the config of a job.
        sweep: the sweep's directory.

    Raises:
        ConfigError: the storage cannot be reached, or holds another search.
    """

    def __init__(self, search: Search, cfg: DictConfig, sweep: Path) -> None:
        """Open the study, or create it."""
        self.search, self.sweep, self.here = search, sweep, str(sweep.resolve())
        self.storage = storage.opened(search.settings, sweep)
        self.study = search.study(self.storage, cfg)
        self.tried: set[int] = set()  # numbers of the trials that this process has run

    def take(self) -> dict[int, list[str]]:
        """Return numbers and overrides of the next trials of this process, at most ``n_jobs``; empty if nothing is left to do."""
        taken = dict[int, list[str]]()
        most = self.search.settings.n_jobs
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in self.tried or len(taken) == most:
                continue
            if not self._is_mine(trial.user_attrs.get(OWNER)):
                self._give_up_if_dead(trial)
            elif {each.key for each in self.search.space} != {*trial.params}:
                self._give_up(trial, "its process was killed before it began", again=False)
            elif not self.tell(trial.number):
                taken[trial.number] = self._overrides(trial)
        while len(taken) < most and (trial := self._ask()) is not None:
            taken[trial.number] = self._overrides(trial)
        self.tried.update(taken)
        return dict(sorted(taken.items()))

    def _is_mine(self, owner: str | None) -> bool:
        """Whether a trial was taken in this sweep's directory, which may have been moved together with its journal."""
        moved = self.search.settings.storage is None and owner is not None and not Path(owner).is_dir()
        return owner == self.here or moved

    def _overrides(self, trial: FrozenTrial | optuna.Trial) -> list[str]:
        """Return the overrides of a trial. It starts from the run that was the best when the trial was taken, also if resumed."""
        start: str | None = trial.user_attrs.get(START)
        moved = self.sweep / Path(start or "").name
        if (
            start is not None
            and not Path(start).is_dir()
            and moved.is_dir()
            and not (self._run(trial) / RunDirectory.last).exists()
        ):
            start = str(moved)
        return self.search.overrides(trial.params, start)

    def _run(self, trial: FrozenTrial | optuna.Trial) -> Path:
        """Return the directory of a trial's run."""
        owner = trial.user_attrs.get(OWNER)
        return (self.sweep if owner is None or self._is_mine(owner) else Path(owner)) / str(trial.number)

    def _best(self) -> str | None:
        """Return the directory of the best run so far that has left a checkpoint here; None if there is none."""
        sign = 1 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        ended = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ranked = sorted(ended, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
        return next((str(run) for run in map(self._run, ranked) if (run / RunDirectory.best).is_file()), None)

    def _ask(self) -> optuna.Trial | None:
        """Return a new trial, or one whose values another process has left; None if there are trials enough."""
        if self._count() >= self.search.trials:
            return None
        trial = self.study.ask({each.key: distribution(each) for each in self.search.space})
        if self.search.settings.warm_start is not None:
            trial.set_user_attr(START, self._best())
        trial.set_user_attr(OWNER, self.here)
        trial.set_user_attr(HOST, socket.gethostname())
        if self._count(trial.number) < self.search.trials:
            return trial
        self._give_up(trial, "another process took the last one at the same moment", again=False)
        return None

    def _count(self, below: float = math.inf) -> int:
        """Return how many trials with a lower number were taken and not given up."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(
            each.number < below and each.state != TrialState.WAITING and GIVEN_UP not in each.user_attrs for each in trials
        )

    def _give_up_if_dead(self, trial: FrozenTrial) -> None:
        """Give a trial of another process up if this process was killed; its values are then tried again."""
        owner, begun = trial.user_attrs.get(OWNER), trial.datetime_start
        if owner is None:
            if begun is not None and time.time() - begun.timestamp() > PATIENCE:
                self._give_up(trial, "its process was killed before it began", again=False)
        elif trial.user_attrs.get(HOST) == socket.gethostname() and Path(owner).is_dir():  # else its lock may not be seen here
            if not any(RunDirectory(each).running is not False for each in (Path(owner), Path(owner) / str(trial.number))):
                self._give_up(trial, f"the process of {owner} was killed", again=True)

    def _give_up(self, trial: FrozenTrial | optuna.Trial, reason: str, again: bool) -> None:
        """End a trial that no process will; with ``again``, its values are those of a next trial. Only one process succeeds."""
        self._note(trial.number, REASON, reason)
        self._note(trial.number, GIVEN_UP, True)
        if self._end(trial.number, TrialState.FAIL) and again:
            log.warning("trial %s is run again, since %s", trial.number, reason)
            self.study.enqueue_trial(trial.params)

    def tell(self, number: int, error: str | None = None) -> bool:
        """Tell Optuna how a trial of this process ended.

        Args:
            number: the trial's number.
            error: why the trial failed, if this is known; else its run directory says how it ended.

        Returns:
            Whether the trial has ended. A run that was interrupted or killed has not.
        """
        run = RunDirectory(self.sweep / str(number))
        summary = or_empty(run.read_summary)
        status = "failed" if error is not None else run.status(summary)
        values = measured(summary, self.study.user_attrs[FACTS]["metric"])
        missing = [name for name, value in values.items() if value is None or not math.isfinite(value)]
        if status == "pruned":
            self._end(number, TrialState.PRUNED)
        elif status in ENDED.values() and not missing:
            self._end(number, TrialState.COMPLETE, [float(value) for value in values.values() if value is not None])
        elif status == "failed" or status in ENDED.values():
            reason = error or summary.get("reason") if status == "failed" else f"{', '.join(missing)} is not a finite number"
            self._note(number, REASON, str(reason))
            self._end(number, TrialState.FAIL)
        else:
            return False
        return True

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> bool:
        """End a trial; return False if another process has ended it before."""
        try:
            self.study.tell(number, values, state)
        except (ValueError, UpdateFinishedTrialError):
            if self.study.get_trials(deepcopy=False)[number].state == TrialState.RUNNING:
                raise
            return False
        return True

    def _note(self, number: int, name: str, value: Any) -> None:
        """Set an attribute of a trial, unless it has ended."""
        study = self.storage.get_study_id_from_name(self.study.study_name)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(self.storage.get_trial_id_from_study_id_trial_number(study, number), name, value)

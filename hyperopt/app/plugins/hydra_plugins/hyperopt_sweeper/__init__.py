"""The sweepers of this project, which Hydra finds as plugins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


class GridSweeper(BasicSweeper):
    """Hydra's own grid sweeper, except that it does not compose every job once more before the first.

    ``hyperopt.app.preflight.Preflight`` has composed and checked all jobs before, which takes minutes for a thousand of them.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: all jobs were checked before."""


class OptunaSweeper(Sweeper):
    """Runs the jobs that Optuna proposes, a batch at a time; see ``hyperopt.app.search``.

    Args:
        keys: those of ``hyperopt.app.search.settings.Settings``, which ``Preflight`` has checked.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, **keys: Any) -> None:
        """Do nothing: ``sweep`` reads the keys, and Optuna is not imported before."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the config, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search; raise the error of the first run that failed, after all others."""
        from hyperopt.app.search.search import Search
        from hyperopt.app.search.trials import Trials

        where = Path(self.config.hydra.sweep.dir)
        where.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, where / "multirun.yaml")
        search, loader = Search.of(self.config), self.hydra_context.config_loader
        trials = Trials(search, loader.load_sweep_config(self.config, search.samples()[0]), where)
        returns, failure = [], None
        while taken := trials.take():
            batch = {}
            for number, overrides in taken.items():
                job = [*overrides, f"hydra.sweeper.trial={number}", f"hydra.sweep.subdir={number}"]
                try:
                    self.validate_batch_is_legal([job])
                    batch[number] = job
                except Exception as error:  # values that do not go together, such as a choice and a key of another choice
                    log.warning("trial %s (%s) cannot be composed: %s", number, " ".join(overrides), error)
                    trials.tell(number, str(error))
                    failure = failure or error
            if not batch:
                continue
            done = self.launcher.launch(list(batch.values()), initial_job_idx=min(batch))
            for number, each in zip(batch, done, strict=True):
                failed = each.status == JobStatus.FAILED
                error = each._return_value if failed else None  # the public property would raise it
                trials.tell(number, f"{type(error).__name__}: {error}" if failed else None)
                failure = failure or error
            returns.append(done)
        if failure is not None:
            raise failure
        return returns

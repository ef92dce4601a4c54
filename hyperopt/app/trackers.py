"""Other places that a run is logged to beside its own files: MLflow and Weights & Biases, chosen by the group ``tracker``.

A tracker's settings ``open`` the run there, or continue the one that ``tracker.json`` in the run directory names. It gets the
rows of ``metrics.jsonl`` and the figures. A resumed run repeats the steps since its checkpoint with the same numbers, so those
that the tracker has seen are not sent again. An error there is a warning, since the run's own files are complete without it.

``metrics.jsonl`` and TensorBoard's events are written under every tracker. The packages are imported when a run starts.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import DictConfig

from hyperopt.app.config import ConfigError
from hyperopt.app.dashboard import label
from hyperopt.app.files import write_json
from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.core import distributed
from hyperopt.core.checks import check_choice
from hyperopt.core.policy import repeated
from hyperopt.core.text import one_line
from hyperopt.data.reading import UnreadableError, read_json

log = logging.getLogger(__name__)

BATCH = 1000  # most numbers that MLflow takes at a time
LONGEST = 500  # characters of a setting that MLflow is given


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        directory: the run directory.
        name: the name to show.
        study: the config's ``name``.
        config: the flat config.
        sweep: the sweep that the run is a job of, None for a single run.
        written: the latest step in ``metrics.jsonl`` before this session; -1 without one.
    """

    directory: RunDirectory
    name: str
    study: str
    config: Mapping[str, Any]
    sweep: str | None = None
    written: int = -1

    def known(self, tracker: str) -> str | None:
        """Return the tracker's own id of this run, if it has one."""
        found = or_empty(read_json, self.directory.tracked)
        known = found.get("id") if found.get("tracker") == tracker else None
        return known if isinstance(known, str) and re.fullmatch(r"[\w-]{1,64}", known) else None

    def note(self, tracker: str, known: str) -> None:
        """Remember the tracker's id of this run."""
        write_json(self.directory.tracked, {"tracker": tracker, "id": known})


class Elsewhere(ABC):
    """One run in a tracker.

    Attributes:
        seen: the latest step that the tracker has; -1 for none.
    """

    seen: int = -1

    @abstractmethod
    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Log the numbers of a step."""

    @abstractmethod
    def figure(self, step: int, name: str, path: Path) -> None:
        """Log the image file of a figure."""

    def flush(self) -> None:  # noqa: B027 - optional
        """Send what is waiting; a tracker that sends at once has nothing to do."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End the session; ``status`` is that of ``summary.json``."""


class TrackerSettings(ABC):
    """The settings of a tracker."""

    package: ClassVar[str | None] = None

    def check(self) -> None:
        """Refuse a tracker whose package is missing."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise ModuleNotFoundError(
                f"tracker={self.package} needs the package {self.package}, which is not installed; pip install "
                f"'hyperopt-bilevel[{self.package}]', or change tracker"
            )

    @abstractmethod
    def open(self, run: TrackedRun) -> Elsewhere | None:
        """Start or continue the run in the tracker; None if there is no other place."""


@dataclass(frozen=True)
class TensorBoard(TrackerSettings):
    """The run's own files, ``metrics.jsonl`` and TensorBoard's events, and nothing else."""

    def open(self, run: TrackedRun) -> None:
        """Open nothing."""


@dataclass(frozen=True)
class MLflow(TrackerSettings):
    """MLflow: a database in a file, or a server.

    Attributes:
        directory: where the database ``mlflow.db`` and the files ``mlflow/`` are, without a ``uri``.
        uri: the tracking URI of a database or a server; None: that database.
        experiment: MLflow's experiment; None: the config's ``name``.
    """

    directory: str = "outputs"
    uri: str | None = None
    experiment: str | None = None
    package: ClassVar[str | None] = "mlflow"

    def open(self, run: TrackedRun) -> Elsewhere:
        """Start or continue the run."""
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        for name in ("mlflow.store.db.utils", "alembic"):  # lines about each table of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        where = Path(self.directory).resolve()
        if self.uri is None:
            where.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self.uri or f"sqlite:///{where}/mlflow.db")
        study = self.experiment or run.study
        found = client.get_experiment_by_name(study)
        if found is None:
            files = {} if self.uri is not None else {"artifact_location": (where / "mlflow" / study).as_uri()}
            try:
                number = client.create_experiment(study, **files)
            except MlflowException:  # another job has made it in the meantime
                found = client.get_experiment_by_name(study)
                if found is None:
                    raise
                number = found.experiment_id
        else:
            number = found.experiment_id
        known = run.known("mlflow")
        if known is not None:
            try:
                client.update_run(known, status="RUNNING")
            except MlflowException:
                log.warning("tracker=mlflow does not know the run %s any more; a new one starts", known)
                known = None
        if known is None:
            tags = {"directory": str(run.directory.path)} | ({} if run.sweep is None else {"sweep": run.sweep})
            known = client.create_run(number, run_name=run.name, tags=tags).info.run_id
            run.note("mlflow", known)
        return _InMLflow(client, known, run.config)


class _InMLflow(Elsewhere):
    """A run in MLflow; numbers are sent in batches, since a database takes about as long for a thousand as for one."""

    ENDED: ClassVar[dict[str, str]] = {"completed": "FINISHED", "pruned": "FINISHED", "interrupted": "KILLED"}

    def __init__(self, client: Any, known: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        self._client, self._id, self._waiting = client, known, []
        self.seen = max((each.step for each in client.get_metric_history(known, "outer/step_loss")), default=-1)
        given = client.get_run(known).data.params
        params = [Param(key, str(value)[:LONGEST]) for key, value in config.items() if key not in given]
        for start in range(0, len(params), 100):
            client.log_batch(known, params=params[start : start + 100])

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Keep the numbers, and send them when there are enough."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        stamp = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), stamp, step) for name, value in row.items()]
        if len(self._waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send the numbers."""
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), BATCH):
            self._client.log_batch(self._id, metrics=waiting[start : start + BATCH])

    def figure(self, step: int, name: str, path: Path) -> None:
        """Send the file; an earlier one of this name stays as that of its own step."""
        from mlflow.utils.file_utils import TempDir  # pyright: ignore[reportMissingImports]

        with TempDir() as made:
            copy = Path(made.path()) / f"{step:08d}{path.suffix}"
            copy.write_bytes(path.read_bytes())
            self._client.log_artifact(self._id, str(copy), f"figures/{name}")

    def close(self, status: str) -> None:
        """Send the rest, and end the run."""
        self.flush()
        self._client.set_terminated(self._id, self.ENDED.get(status, "FAILED"))


@dataclass(frozen=True)
class WandB(TrackerSettings):
    """Weights & Biases, by default offline: ``wandb sync DIR/wandb/offline-run-*`` sends the runs later.

    Attributes:
        directory: where the folder ``wandb`` is.
        project: the project's name.
        entity: a user or a team; None: that of the login.
        mode: ``offline`` or ``online``.
    """

    directory: str = "outputs"
    project: str = "hyperopt"
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"
    package: ClassVar[str | None] = "wandb"

    def __post_init__(self) -> None:
        """Check the mode."""
        check_choice(self, "mode", ("offline", "online"))

    def open(self, run: TrackedRun) -> Elsewhere:
        """Start or continue the run."""
        import wandb  # pyright: ignore[reportMissingImports]

        Path(self.directory).mkdir(parents=True, exist_ok=True)
        known = run.known("wandb")
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
        made = wandb.init(
            project=self.project,
            entity=self.entity,
            dir=self.directory,
            id=known,
            resume=None if known is None else "allow",
            name=run.name,
            group=run.sweep,
            config=dict(run.config),
            mode=self.mode,
            reinit="create_new",
            settings=quiet,
        )
        if known is None:
            run.note("wandb", made.id)
        return _InWandB(made, run.written if known is not None else -1)


@dataclass
class _InWandB(Elsewhere):
    """A run in Weights & Biases, whose steps must not go back."""

    made: Any
    seen: int = field(default=-1)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Log the numbers."""
        self.made.log(dict(row), step=step)

    def figure(self, step: int, name: str, path: Path) -> None:
        """Log the image."""
        import wandb  # pyright: ignore[reportMissingImports]

        self.made.log({f"figures/{name}": wandb.Image(str(path))}, step=step)

    def close(self, status: str) -> None:
        """End the run; a run that did not end well has the exit code 1 there."""
        self.made.finish(exit_code=int(status not in ("completed", "pruned")))


class Sent:
    """Sends a run elsewhere, each step once; an error there is told as a warning the 1st, 10th, 100th, ... time.

    Args:
        there: the run there, None for no other place.
        rows: the rows of earlier sessions that stay, of which those that are not there yet are sent.
    """

    def __init__(self, there: Elsewhere | None = None, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """Send what is missing there."""
        self._there, self._seen = there, math.inf if there is None else there.seen
        for row in rows:
            self.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def _tried(self, what: str, *arguments: Any) -> None:
        """Call a method there, if there is another place."""
        if self._there is None:
            return
        try:
            getattr(self._there, what)(*arguments)
        except Exception as error:
            if (again := repeated("run", "tracker")) is not None:
                log.warning("the tracker did not take a part of the run (%s: %s)%s", type(error).__name__, error, again)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        if step > self._seen:
            self._tried("log", step, row)

    def figure(self, step: int, name: str, path: Path) -> None:
        """Send a figure."""
        if step > self._seen:
            self._tried("figure", step, name, path)

    def flush(self) -> None:
        """Send what is waiting."""
        self._tried("flush")

    def close(self, status: str) -> None:
        """End the session there."""
        self._tried("close", status)
        self._there = None


def last_step(directory: RunDirectory) -> int:
    """Return the latest step in ``metrics.jsonl``; -1 without a row, or if the file is damaged."""
    try:
        return int(max((row["step"] for row in directory.read_rows()), default=-1))
    except UnreadableError:
        return -1


def send(
    tracker: TrackerSettings,
    directory: RunDirectory,
    cfg: DictConfig,
    overrides: Sequence[str],
    config: Mapping[str, Any],
    written: int,
) -> Sent:
    """Start or continue the run in the tracker that the config chooses, on the first rank.

    ``overrides`` tell the run from others, ``config`` is flat, and ``written`` is that of ``TrackedRun``.
    """
    if distributed.rank() > 0:
        return Sent()
    sweep = directory.path.parent.name if directory.job.exists() else None
    name = label(overrides) or directory.path.name
    try:
        there = tracker.open(TrackedRun(directory, name, str(cfg.name), config, sweep, written))
    except Exception as error:
        what = f"tracker={tracker.package} cannot be opened ({type(error).__name__}: {one_line(error)})"
        raise ConfigError(f"{what}; change the keys of tracker, or drop tracker={tracker.package}") from error
    return Sent(there, directory.read_rows() if there is not None else ())

"""Reads event files back, the way TensorBoard does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG

PluginData: Any = plugin_data_pb2.HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]


def events(directory: Path) -> EventAccumulator:
    """Load all events of a run from its ``tb/``, where they are in a folder with the run's name if it has overrides."""
    directory = next((path.parent for path in directory.rglob("events.out.tfevents.*")), directory)
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def given(out: Path, *overrides: str) -> None:
    """Leave what Hydra leaves in the directory of a run with these overrides."""
    (out / ".hydra").mkdir(parents=True, exist_ok=True)
    (out / ".hydra" / "overrides.yaml").write_text("".join(f"- {each}\n" for each in overrides))


def raw(out: Path) -> list[Any]:
    """Return every event in the event files of a run in TensorBoard's order, as they lie there: nothing is purged."""
    paths = sorted((out / "tb").rglob("events.out.tfevents.*"))
    return [event for path in paths for event in EventFileLoader(str(path)).Load()]


def walls(out: Path) -> list[float]:
    """Return the wall time of every event of a run."""
    return [event.wall_time for event in raw(out)]


def scalars(out: Path) -> list[tuple[int, str, str]]:
    """Return step, tag and value of every scalar in the event files of a run, in order; times left out."""
    found = []
    for event in raw(out):
        for value in event.summary.value:
            if value.tensor.float_val and not value.tag.startswith("time/"):
                found.append((event.step, value.tag, repr(value.tensor.float_val[0])))
    return found


def session_starts(out: Path) -> int:
    """Count the HParams sessions opened in the event files of a run, sub-directories included."""
    count = 0
    for path in out.rglob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            count += sum(value.tag == SESSION_START_INFO_TAG for value in event.summary.value)
    return count


def hparams_of(out: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return the columns, the metrics and the values of a run's row in the HParams tab."""
    content = events(out / "tb").PluginTagToContent("hparams")
    experiment = PluginData.FromString(content[EXPERIMENT_TAG]).experiment
    start = PluginData.FromString(content[SESSION_START_INFO_TAG]).session_start_info
    values = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in start.hparams.items()}
    return [info.name for info in experiment.hparam_infos], [info.name.tag for info in experiment.metric_infos], values

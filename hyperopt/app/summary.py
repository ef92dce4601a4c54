"""The output of a run: the progress line, the closing table, ``run.json`` and ``summary.json``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from hyperopt.app.files import write_json
from hyperopt.app.loop_state import LoopState
from hyperopt.app.repro import run_facts
from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.core.text import aligned
from hyperopt.data.reading import read_json
from hyperopt.tasks.base import Environment
from hyperopt.tasks.trainer import TrainerSettings

TABLE = ("accuracy", "loss")
SPLITS = ("test", "val", "outer")


def progress(trainer: TrainerSettings, state: LoopState, hidden: bool = False) -> tqdm:
    """Return the progress line on stderr; without a terminal it is updated every ten seconds.

    It is not shown if it is ``hidden``, since a sweep has one line for all jobs, or not wanted.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    off = hidden or not trainer.progress
    return tqdm(total=trainer.max_steps, initial=state.step, disable=off, file=sys.stderr, mininterval=interval)


def show(bar: tqdm, state: LoopState) -> None:
    """Update the progress line: outer loss, latest accuracy on the validation rows, and iterations."""
    latest = {**state.best_metrics, **state.row}
    shown = {"loss": f"{state.row['outer/step_loss']:.4f}"}
    for label, name in (("val", "val/accuracy"), ("inner", "inner/iterations"), ("adjoint", "adjoint/iterations")):
        if name in latest:
            shown[label] = f"{latest[name]:.4g}"
    bar.set_postfix(shown, refresh=False)
    bar.update(state.step - bar.n)


def table(row: Mapping[str, float], step: int, best: Mapping[str, float], best_step: int | None, seconds: float) -> str:
    """Return the short table at the end of a run: the last step beside the best one.

    Args:
        row: metrics of the last step.
        step: index of that step.
        best: metrics at the best evaluation (empty if there was none).
        best_step: index of that step.
        seconds: time of the whole run.
    """
    names = [f"{split}/{kind}" for kind in TABLE for split in SPLITS] + ["inner/iterations", "adjoint/iterations"]
    lines = [["", f"last (step {step})", f"best (step {best_step})" if best else ""]]
    for name in names:
        if name in row or name in best:
            lines.append([name, *(f"{column[name]:.6g}" if name in column else "" for column in (row, best))])
    residuals = [_worst_residual(column) for column in (row, best)]
    if any(residuals):  # an evaluation alone solves no adjoint system
        lines.append(["worst residual", *residuals])
    lines.append(["seconds", f"{seconds:.1f}", ""])
    return aligned(lines)


def _worst_residual(row: Mapping[str, float]) -> str:
    """Return the larger of the inner and the adjoint residual, with NaN as the largest; empty if none was measured."""
    found = [row[name] for name in ("inner/residual", "adjoint/residual") if name in row]
    return f"{max(found, key=lambda value: math.inf if math.isnan(value) else value):.1e}" if found else ""


def write_facts(
    run: RunDirectory, env: Environment, task: dict[str, Any], resumed_from: int | None, start: dict[str, Any] | None = None
) -> None:
    """Write ``run.json``; a resumed run keeps the facts of its start and adds those of this session under ``resumed``.

    ``resumed_from`` is the number of steps done before this session (None: the run starts), ``start`` that of ``starting.begin``.
    """
    facts = {**run_facts(env.device), "seed": env.seed, "precision": str(env.dtype).removeprefix("torch."), "task": task}
    facts |= {} if start is None else {"init_from": start}
    if resumed_from is not None and run.facts.is_file():
        first = or_empty(read_json, run.facts)  # a damaged file does not prevent the run from continuing
        before = first.get("resumed", [])
        facts = {**first, "resumed": [*(before if isinstance(before, list) else []), {"after_steps": resumed_from, **facts}]}
    write_json(run.facts, facts)


def summarize(run: RunDirectory, status: str, state: LoopState, reason: str | None = None) -> None:
    """Write ``summary.json``; ``lost_rows``, pairs of a first and a last step, exists only if rows were lost.

    ``status`` is ``running``, ``completed``, ``pruned``, ``interrupted``, ``failed``, ``checked`` or ``evaluated``. ``reason`` is
    the key or signal that ended the run, the error, or the checkpoint that was evaluated.
    """
    best = {"step": state.best_step, "metrics": state.best_metrics} if state.best_metrics else None
    content = {
        "status": status,
        "reason": reason,
        "steps": state.step,
        "seconds": state.seconds,
        "metrics": state.row,
        "best": best,
    }
    write_json(run.summary, content | ({"lost_rows": state.lost_rows} if state.lost_rows else {}))

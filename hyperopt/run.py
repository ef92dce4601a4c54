"""The outer loop, read top to bottom: build, resume, then step, evaluate, checkpoint, track, stop.

Bit for bit: a checkpoint holds the state after an outer step and the row of that step, before anything that depends on the run's
end (the evaluation of a last step that was not due for one), so that a run stopped anywhere and resumed writes the same rows as
one never stopped, ``time/*`` aside, whatever made it stop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt import checkpoint
from hyperopt.config import Built, build
from hyperopt.loop_state import LoopState, monitored
from hyperopt.optim import HypergradientGuard, Schedule
from hyperopt.policy import reset_warnings
from hyperopt.report import progress, show, summarize, table, write_facts
from hyperopt.repro import (
    configure,
    preserved_global_state,
    resolve_device,
    resolve_precision,
    rng_state,
    seed_everything,
    set_rng_state,
)
from hyperopt.status import Status
from hyperopt.tasks.base import Environment, HypergradientError, StepRecord
from hyperopt.track import Tracker, flatten, hparams, write_config, write_text
from hyperopt.train_settings import TrainerSettings

log = logging.getLogger(__name__)


class RunDirectoryError(FileExistsError):
    """The run directory holds another run."""


def run(cfg: DictConfig, out: Path) -> float:
    """Train or evaluate as ``cfg`` says, in the run directory ``out``, and leave the process as it was.

    Args:
        cfg: the composed config of ``configs/train.yaml``.
        out: the run directory: one without a run's files, or the one that is resumed.

    Returns:
        The best value of ``trainer.monitor`` (its value now under ``mode=evaluate``), for sweepers.

    Raises:
        RunDirectoryError: ``out`` holds a run and nothing says to resume it; it is left untouched.
        SystemExit: SIGINT or SIGTERM came: code 130 or 143, after the checkpoint was written.
        Exception: whatever went wrong; ``FAILED`` then holds the traceback, and ``summary.json`` the status ``failed``.
    """
    check_directory(cfg, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "FAILED").unlink(missing_ok=True)
    state = LoopState()
    reset_warnings()  # a sweep's jobs share a process: each has its own first warning
    with preserved_global_state():
        try:
            device, dtype = resolve_device(cfg.device), resolve_precision(cfg.precision)
            configure(device, dtype, cfg.threads)
            generator = seed_everything(cfg.seed)
            built = build(cfg)
            env = Environment(device, dtype, cfg.seed, cfg.compile, generator)
            return evaluate(built, cfg, out, env) if cfg.mode == "evaluate" else train(built, cfg, out, env, state)
        except Exception as error:
            with contextlib.suppress(OSError):  # a directory that cannot be written must not hide the error itself
                write_text(out / "FAILED", traceback.format_exc())
                summarize(out, "failed", state, reason=f"{type(error).__name__}: {error}")
            raise


def train(built: Built, cfg: DictConfig, out: Path, env: Environment, state: LoopState) -> float:
    """Run the outer loop; see ``run``. ``state`` is filled in place, so that a failure can be summarized."""
    task, trainer = built.task, built.trainer
    config = experiment(cfg)
    resumed = find_checkpoint(cfg, out)
    if resumed is not None:
        checkpoint.check_same_experiment(resumed[0], resumed[1]["config"], config)

    task.setup(env)
    optimizer = built.optimizer.build(task.groups())
    schedule = Schedule(built.optimizer.scheduler, optimizer, trainer)
    guard = HypergradientGuard(built.optimizer.clip_norm)
    moved = not (out / "metrics.jsonl").exists()  # a run that goes on from another directory's checkpoint has no rows here
    offset = 0
    if resumed is not None:
        saved = resumed[1]
        vars(state).update(saved["state"])
        task.load_state_dict(saved["task"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        env.generator.set_state(saved["generator"])
        set_rng_state(saved["rng"])
        offset = 0 if moved else saved["offset"]

    def save(name: str) -> None:
        """Write a checkpoint; ``offset`` is where the row of the last step begins, or will begin, in ``metrics.jsonl``."""
        tracker.sync()
        content = {
            "state": asdict(state),
            "task": task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": env.generator.get_state(),
            "rng": rng_state(),
            "offset": offset,
            "config": config,
        }
        checkpoint.save(out / "checkpoints" / name, content, keep_previous=name == checkpoint.LAST)

    write_facts(out, env, task.describe(), None if resumed is None else state.step)
    summarize(out, "running", state)
    started = time.perf_counter() - state.seconds
    warned: set[tuple[str, Status]] = set()
    tracker = Tracker(out, None if resumed is None else (state.step - 1, offset))
    with contextlib.closing(tracker), stop_signals() as signals, progress(trainer, state) as bar:
        tracker.config(write_config(out, cfg), max(state.step - 1, 0))
        again = resumed is not None  # first the row of the checkpoint once more: all from there on was cut away
        reason = None
        while reason is None:
            if not again:
                # 1. One outer step; k is its index, state.step the number of them done.
                k = state.step
                lr = optimizer.param_groups[0]["lr"]
                guard.begin(k)
                before = time.perf_counter()
                record = task.step(optimizer, guard)
                step_seconds = time.perf_counter() - before
                check_record(k, record, guard, trainer, warned)
                schedule.after_step()
                state.step = k + 1
                state.evaluated = False
                state.evaluations += record.metrics.get("cost/evaluations", 0)
                state.vjps += record.metrics.get("cost/vjps", 0)
                state.jvps += record.metrics.get("cost/jvps", 0)
                state.row = {
                    "outer/step_loss": float(record.loss),
                    **{name: float(value) for name, value in record.metrics.items()},
                    **guard.norms,
                    **{f"{name}/status": int(status) for name, status in record.statuses.items()},
                    "cost/evaluations": state.evaluations,
                    "cost/vjps": state.vjps,
                    "cost/jvps": state.jvps,
                    "optimizer/lr": float(lr),
                    "time/step_seconds": step_seconds,
                }
                offset = tracker.offset

                # 2. Evaluate.
                if k % trainer.eval_every == 0:
                    best = state.note(task.evaluate(), trainer)
                    schedule.after_evaluation(state.row[trainer.monitor])
                    if best:
                        save(checkpoint.BEST)
                state.seconds = time.perf_counter() - started

            # 3. Stop? If so, and from time to time, write a checkpoint.
            k = state.step - 1
            reason = "signal" if signals else state.stop_reason(trainer)
            if k == 0 or (again and moved):
                tracker.hparams_start(hparams(cfg), {**state.best_metrics, **state.row})
            if not again and (reason is not None or k == 0 or state.step % trainer.checkpoint_every == 0):
                save(checkpoint.LAST)

            # 4. A last step that was not due for an evaluation gets one, after its checkpoint: a longer run would not have it.
            ended = reason is not None and reason != "signal"
            if ended and not state.evaluated and state.note(task.evaluate(), trainer):
                save(checkpoint.BEST)

            # 5. Track.
            tracker.log(k, state.row)
            if ended or (trainer.figures_every is not None and state.step % trainer.figures_every == 0):
                tracker.figures(k, task.figures())
            show(bar, state)
            again = False
        if reason != "signal":
            tracker.hparams_end()

    if reason == "signal":
        summarize(out, "interrupted", state, reason=signal.Signals(signals[0]).name)
        log.warning("interrupted after %d steps; continue with resume=auto hydra.run.dir=%s", state.step, out)
        raise SystemExit(128 + signals[0])
    state.seconds = time.perf_counter() - started
    summarize(out, "completed", state, reason=reason)
    print(table(state.row, state.step - 1, state.best_metrics, state.best_step, state.seconds))
    print(f"ended by {reason}; to look at it: tensorboard --logdir {out}")
    return math.nan if state.best is None else state.best


def evaluate(built: Built, cfg: DictConfig, out: Path, env: Environment) -> float:
    """Evaluate the checkpoint ``ckpt_path``: print the table and write ``summary.json``; see ``run``."""
    found = find_checkpoint(cfg, out)
    if found is None:
        raise checkpoint.CheckpointError("mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path")
    path, saved = found
    checkpoint.check_same_experiment(path, saved["config"], experiment(cfg), evaluate=True)
    started = time.perf_counter()
    built.task.setup(env)
    built.task.load_state_dict(saved["task"])
    metrics = built.task.evaluate()
    state = LoopState(step=saved["state"]["step"], row=metrics, seconds=time.perf_counter() - started)
    value = monitored(metrics, built.trainer)
    write_config(out, cfg)
    write_facts(out, env, built.task.describe(), None)
    summarize(out, "evaluated", state, reason=str(path))
    print(table(metrics, state.step - 1, {}, None, state.seconds))
    return value


def check_directory(cfg: DictConfig, out: Path) -> None:
    """Refuse a directory that holds a run, unless this one goes on with it.

    Raises:
        RunDirectoryError: it does.
    """
    if cfg.mode == "train":
        given = None if cfg.ckpt_path is None else Path(cfg.ckpt_path).resolve().parent
        if given == (out / "checkpoints").resolve() or (given is None and cfg.resume == "auto"):
            return
    held = [name for name in ("metrics.jsonl", "summary.json", "checkpoints") if (out / name).exists()]
    if held:
        raise RunDirectoryError(
            f"{out} holds a run ({', '.join(held)}) and was left untouched; set hydra.run.dir to another directory, or continue "
            f"that run with resume=auto"
        )


def find_checkpoint(cfg: DictConfig, out: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the checkpoint that ``ckpt_path`` or ``resume=auto`` asks for, if any."""
    if cfg.ckpt_path is None:
        path = out / "checkpoints" / checkpoint.LAST
        found = checkpoint.load_last(path.parent) if cfg.resume == "auto" else None
    else:
        path = Path(cfg.ckpt_path)
        found = checkpoint.load_last(path.parent) if path.name == checkpoint.LAST and path.is_file() else checkpoint.load(path)
    return None if found is None else (path, found)


def experiment(cfg: DictConfig) -> dict[str, Any]:
    """Return the flat config as a checkpoint keeps it, to tell one experiment from another."""
    config = flatten(cfg)
    if config.get("optimizer.scheduler.kind") == "cosine" and config.get("optimizer.scheduler.t_max") is None:
        config["optimizer.scheduler.t_max"] = config.get("trainer.max_steps")  # its default: here the length matters
    return config


def check_record(
    k: int, record: StepRecord, guard: HypergradientGuard, trainer: TrainerSettings, warned: set[tuple[str, Status]]
) -> None:
    """Stop on a loss or a solve that cannot be used; warn, once a run and kind, of one that should be looked at.

    Raises:
        HypergradientError: the outer loss is not finite, or a solve diverged (the latter under ``trainer.on_failure=raise``).
        RuntimeError: the task never called the guard.
    """
    if not math.isfinite(record.loss):
        raise HypergradientError(f"step {k}: the outer loss is {record.loss}; lower optimizer.lr or check the data")
    if not guard.norms:
        raise RuntimeError("Task.step did not call its guard after backward: the hypergradient went unchecked; see Task.step")
    for name, status in record.statuses.items():
        if not status.failed:
            continue
        what = f"step {k}: the {name} solve ended as {status.name}: {status.message}"
        if status >= Status.diverged and trainer.on_failure == "raise":
            raise HypergradientError(f"{what}; trainer.on_failure=warn goes on in spite of it")
        if (name, status) not in warned:
            warned.add((name, status))
            log.warning("%s (said once a run)", what)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the step under way can end; a second one has its usual effect, at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

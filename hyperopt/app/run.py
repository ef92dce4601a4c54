"""The outer loop, to be read from top to bottom: build, resume, then step, evaluate, checkpoint, track, stop.

A checkpoint holds the state after an outer step and the row of that step, but nothing that depends on the end of the run, such
as an evaluation of the last step. A run that is stopped anywhere, for whatever reason, and resumed therefore writes the same
rows, bit for bit, as one that was never stopped (except ``time/*``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyperopt.app import checkpoint, starting
from hyperopt.app.building import Built, build
from hyperopt.app.checking import check
from hyperopt.app.checkpoint import Found
from hyperopt.app.dashboard import cost_figure, hparams, label, swept
from hyperopt.app.errors import with_keys
from hyperopt.app.experiment import flatten
from hyperopt.app.files import WriteError, write_text
from hyperopt.app.loop_state import LoopState, monitored
from hyperopt.app.nonfinite import HypergradientCheck
from hyperopt.app.options import choices
from hyperopt.app.repro import (
    configure,
    preserved_global_state,
    resolve_device,
    resolve_precision,
    rng_state,
    seed_everything,
    set_rng_state,
)
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.search.search import PRUNED, Prune
from hyperopt.app.starting import Start
from hyperopt.app.summary import progress, show, summarize, table, write_facts
from hyperopt.app.track import START, Tracker
from hyperopt.app.trackers import last_step, send
from hyperopt.app.workers import queue_signal
from hyperopt.bilevel.outer import Schedule
from hyperopt.core import distributed
from hyperopt.core.policy import repeated, reset_warnings
from hyperopt.core.status import Status
from hyperopt.data.reading import UnreadableError
from hyperopt.tasks.base import Environment, HypergradientError, StepRecord
from hyperopt.tasks.trainer import TrainerSettings

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path, prune: Prune | None = None) -> float:
    """Train or evaluate as ``cfg`` says, in the run directory ``out``, and restore the state of the process.

    Args:
        cfg: the composed config of ``configs/train.yaml``.
        out: the run directory: one without a run's files, or the one that is resumed.
        prune: a function that ends the run early, with the status ``pruned``; see ``hyperopt.app.search.search.prune_of``.

    Returns:
        The best value of ``trainer.monitor``, for sweepers; under ``mode=evaluate`` its present value, and under
        ``mode=check`` the largest relative error of the hypergradient.

    Raises:
        RunDirectoryError: ``out`` holds a run that is not to be resumed, something in it leads elsewhere, or another process
            is writing there; it is left untouched.
        CheckpointError: the checkpoint is missing, damaged, unsafe, of another experiment or does not fit, or rows that it
            knows of are lost; a run in ``out`` is left untouched.
        UnreadableError: a file of the run in ``out`` cannot be read; it is left untouched.
        WriteError: a file could not be written; everything written before is complete, and ``resume=auto`` continues from it.
        SystemExit: SIGINT, SIGTERM or the queue's signal came: code 128 + its number, after the checkpoint was written.
        Exception: any other error; ``FAILED`` then holds the traceback, and ``summary.json`` the status ``failed``.
    """
    directory = RunDirectory(out)
    directory.check(cfg)
    state = LoopState()
    with directory.locked(), preserved_global_state():
        directory.check(cfg)  # again, since another run may have used it in the meantime
        held = bool(directory.held)
        # An existing run is changed only after its checkpoint was loaded, when nothing can be refused any more.
        begin = functools.partial(directory.begin, cfg) if held else lambda: None
        try:
            found = distributed.from_first(checkpoint.find(cfg, directory) if distributed.rank() == 0 else None)
            fresh = distributed.rank() == 0 and (found is None or not directory.owns(found[0]))
            start = distributed.from_first(starting.read(cfg, directory) if fresh else None)
            overrides = swept(directory)
            if not held:
                directory.begin(cfg)
            reset_warnings()  # jobs of a sweep share a process, and each starts its own count of warnings
            device, dtype = resolve_device(cfg.device), resolve_precision(cfg.precision)
            configure(device, dtype, cfg.threads)
            generator = seed_everything(cfg.seed)
            built = build(cfg)
            env = Environment(device, dtype, cfg.seed, cfg.compile, generator, built.trainer)
            if cfg.mode == "evaluate":
                return evaluate(built, directory, env, found, begin)
            if cfg.mode == "check":
                return check_task(built, directory, env, found, begin, start)
            return train(built, cfg, directory, env, state, found, overrides, begin, prune, start)
        except Exception as error:
            if not (held and isinstance(error, checkpoint.CheckpointError | UnreadableError)):
                with contextlib.suppress(OSError):  # a failure to write here must not hide the error itself
                    write_text(directory.failed, traceback.format_exc())
                    summarize(directory, "failed", state, reason=with_keys(f"{type(error).__name__}: {error}", choices()))
            raise


def train(
    built: Built,
    cfg: DictConfig,
    directory: RunDirectory,
    env: Environment,
    state: LoopState,
    resumed: Found | None,
    overrides: Sequence[str],
    begin: Callable[[], None],
    prune: Prune | None = None,
    start: Start | None = None,
) -> float:
    """Run the outer loop; see ``run``. ``state`` is changed in place, so that a failed run can be summarized.

    The run continues from ``resumed`` or starts from ``start``, if they are given. ``overrides`` tell it from others, see
    ``hyperopt.app.dashboard.swept``. ``begin`` is called before the first change to the directory.
    """
    task, trainer = built.task, built.trainer
    config = flatten(cfg)
    task.setup(env)
    started_from = starting.begin(task, start, quiet=directory.job.exists())
    optimizer = built.optimizer.build(task.groups())
    schedule = Schedule(built.optimizer.scheduler, optimizer)
    gradient_check = HypergradientCheck(built.optimizer.clip_norm)
    position = START  # where the row of the last step begins in the files
    if resumed is not None:
        path, saved = resumed
        with checkpoint.fitting(path):
            vars(state).update(saved["state"])
            task.load_state_dict(saved["task"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            env.generator.set_state(saved["generator"])
            set_rng_state(saved["rng"])
    begin()
    if resumed is not None:
        path, saved = resumed
        own = directory.owns(path)
        position = saved["position"] if own else START  # a run that starts from elsewhere has no rows here
        state.lost_rows = list(state.lost_rows) if own else []
        if not own or path.name != checkpoint.LAST:
            checkpoint.promote(directory, path, {**saved, "position": position})

    def save(path: Path) -> None:
        """Write a checkpoint."""
        tracker.sync()
        content = {
            "state": asdict(state),
            "task": task.state_dict(),
            "hyperparameters": task.values(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": env.generator.get_state(),
            "rng": rng_state(),
            "position": position,
            "config": config,
        }
        checkpoint.save(path, content, keep_previous=path == directory.last)

    write_facts(directory, env, task.describe(), None if resumed is None else state.step, started_from)
    started = time.perf_counter() - state.seconds
    written = last_step(directory) if built.tracker.package else -1  # before rows after the checkpoint are cut off
    step = None if resumed is None else state.step - 1
    tracker = Tracker(directory, position if step is not None else None, step, label(overrides))
    state.lost_rows += tracker.lost
    with (
        contextlib.closing(tracker),
        rescued(directory, tracker, state, save),
        stop_signals() as signals,
        progress(trainer, state, hidden=directory.job.exists()) as bar,
    ):
        summarize(directory, "running", state)
        tracker.sent = send(built.tracker, directory, cfg, overrides, config, written)
        if resumed is None or not position["events"] or resumed[1]["config"] != config:
            tracker.config(directory.config.read_text(), max(state.step - 1, 0))
        again = resumed is not None  # the row of the checkpoint is written once more, since the files were cut before it
        reason, stopped = None, []
        while reason is None:
            if not again:
                # 1. One outer step; k is its index, state.step the number of them done.
                k = state.step
                lr = optimizer.param_groups[0]["lr"]
                gradient_check.begin(k)
                before = time.perf_counter()
                record = task.step(optimizer, gradient_check)
                step_seconds = time.perf_counter() - before
                check_record(k, record, gradient_check, trainer)
                schedule.after_step()
                state.step = k + 1
                state.evaluated = False
                state.evaluations += record.metrics.get("cost/evaluations", 0)
                state.vjps += record.metrics.get("cost/vjps", 0)
                state.jvps += record.metrics.get("cost/jvps", 0)
                state.row = {
                    "outer/step_loss": float(record.loss),
                    **{name: float(value) for name, value in record.metrics.items()},
                    **gradient_check.norms,
                    **{f"{name}/status": int(status) for name, status in record.statuses.items()},
                    "cost/evaluations": state.evaluations,
                    "cost/vjps": state.vjps,
                    "cost/jvps": state.jvps,
                    "optimizer/lr": float(lr),
                    "time/step_seconds": step_seconds,
                }
                position = tracker.position

                # 2. Evaluate.
                if k % trainer.eval_every == 0:
                    best = state.note(task.evaluate(), trainer)
                    schedule.after_evaluation(state.row[trainer.monitor])
                    if best:
                        save(directory.best)
                    check_monitor(k, state.row[trainer.monitor], trainer)
                state.seconds = time.perf_counter() - started

            # 3. Stop? If so, and at regular intervals, write a checkpoint.
            k = state.step - 1
            ending = state.stop_reason(trainer)
            if ending is None and prune is not None and state.evaluated and prune(state.step, state.row):
                ending = PRUNED
            told = distributed.from_all((list(signals), ending))  # a signal may have reached one rank only
            stopped = [number for numbers, _ in told for number in numbers]
            reason = "signal" if stopped else told[0][1]
            if not position["rows"]:  # the first row in this directory
                tracker.start(hparams(cfg, overrides), {**state.best_metrics, **state.row})
            if not again and (reason is not None or k == 0 or state.step % trainer.checkpoint_every == 0):
                save(directory.last)

            # 4. The last step gets an evaluation if it had none, after its checkpoint, since a longer run would not have it.
            ended = reason is not None and reason != "signal"
            if ended and not state.evaluated and state.note(task.evaluate(), trainer):
                save(directory.best)

            # 5. Track.
            tracker.log(k, state.row)
            if state.evaluated:
                tracker.histograms(k, task.hyperparameter_values())
            if ended or (trainer.figures_every is not None and state.step % trainer.figures_every == 0):
                cost = cost_figure(directory.read_rows())
                tracker.figures(k, {**task.figures(), **({} if cost is None else {"error_against_cost": cost})})
            show(bar, state)
            again = False
        if reason != "signal" and overrides:
            tracker.hparams_end()
        tracker.status = "interrupted" if reason == "signal" else "pruned" if reason == PRUNED else "completed"

    if reason == "signal":
        summarize(directory, "interrupted", state, reason=signal.Signals(stopped[0]).name)
        again = "on the sweep's command line" if directory.job.exists() else f"hydra.run.dir={directory.path}"
        log.warning("interrupted after %d steps; continue with resume=auto %s", state.step, again)
        raise SystemExit(128 + stopped[0])
    state.seconds = time.perf_counter() - started
    summarize(directory, "completed" if reason != PRUNED else "pruned", state, reason=reason)
    if not directory.job.exists():  # a job of a sweep is one line of its table
        print(table(state.row, state.step - 1, state.best_metrics, state.best_step, state.seconds))
        print(f"ended by {reason}; to look at it: hyperopt tensorboard {directory.path}")
    return math.nan if state.best is None else state.best


def evaluate(built: Built, directory: RunDirectory, env: Environment, found: Found | None, begin: Callable[[], None]) -> float:
    """Evaluate the checkpoint ``found``: print the table and write ``summary.json``; see ``run`` and ``train``."""
    if found is None:
        raise checkpoint.CheckpointError("mode=evaluate needs a checkpoint, but ckpt_path=null; set ckpt_path")
    path, saved = found
    started = time.perf_counter()
    built.task.setup(env)
    with checkpoint.fitting(path):
        built.task.load_state_dict(saved["task"])
    begin()
    metrics = built.task.evaluate()
    state = LoopState(step=saved["state"]["step"], row=metrics, seconds=time.perf_counter() - started)
    value = monitored(metrics, built.trainer)
    write_facts(directory, env, built.task.describe(), None)
    summarize(directory, "evaluated", state, reason=str(path))
    if not directory.job.exists():
        print(table(metrics, state.step - 1, {}, None, state.seconds))
    return value


def check_task(
    built: Built, directory: RunDirectory, env: Environment, found: Found | None, begin: Callable[[], None], start: Start | None
) -> float:
    """Check the task's hypergradient at the start or at the checkpoint ``found``, and write ``summary.json``; see ``train``."""
    started = time.perf_counter()
    built.task.setup(env)
    if found is not None:
        with checkpoint.fitting(found[0]):
            built.task.load_state_dict(found[1]["task"])
    started_from = starting.begin(built.task, start)
    begin()
    write_facts(directory, env, built.task.describe(), None, started_from)
    value = check(built.task, directory)
    step = 0 if found is None else found[1]["state"]["step"]
    state = LoopState(step=step, row={"hypergrad/error": value}, seconds=time.perf_counter() - started)
    summarize(directory, "checked", state, reason=None if found is None else str(found[0]))
    return value


def check_record(k: int, record: StepRecord, gradients: HypergradientCheck, trainer: TrainerSettings) -> None:
    """Stop on a loss or a solve that cannot be used; warn of one that should be checked, again the 10th, 100th, ... time.

    Raises:
        HypergradientError: the outer loss is not finite, or a solve diverged (the latter under ``trainer.on_failure=raise``).
        RuntimeError: the task did not call the check of gradients.
    """
    if not math.isfinite(record.loss):
        raise HypergradientError(f"step {k}: the outer loss is {record.loss}; lower optimizer.lr or check the data")
    if not gradients.norms:
        raise RuntimeError("Task.step did not call its check after backward: the hypergradient went unchecked; see Task.step")
    for name, status in record.statuses.items():
        if not status.failed:
            continue
        what = f"step {k}: the {name} solve ended as {status.name}: {status.message}"
        if status >= Status.diverged and trainer.on_failure == "raise":
            raise HypergradientError(f"{what}; trainer.on_failure=warn goes on in spite of it")
        again = repeated("run", name, status.name)
        if again is not None:
            log.warning("%s%s", what, again)


def check_monitor(k: int, value: float, trainer: TrainerSettings) -> None:
    """Warn of a monitored value that is not finite, which never counts as the best; again the 10th, 100th, ... time."""
    again = None if math.isfinite(value) else repeated("run", trainer.monitor)
    if again is not None:
        what = "which is never the best; check its rows, or lower optimizer.lr"
        log.warning("step %d: %s is %s, %s%s", k, trainer.monitor, value, what, again)


@contextlib.contextmanager
def rescued(directory: RunDirectory, tracker: Tracker, state: LoopState, save: Callable[[Path], None]) -> Iterator[None]:
    """If the run directory is removed while the run writes to it, write there again what is needed to resume."""
    try:
        yield
    except WriteError:
        if state.step and tracker.removed:
            tracker.rescue()
            save(directory.last)
            log.error("files were removed from %s; rows and the state after %d steps are there again", directory.path, state.step)
        raise


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and the queue's signal, so that the present step can end; a second one has its usual effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    queue = queue_signal()
    numbers = (signal.SIGINT, signal.SIGTERM, *([] if queue is None else [signal.Signals(queue)]))
    before = {number: signal.getsignal(number) for number in numbers}

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

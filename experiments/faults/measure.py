"""Stop real ``hyperopt`` processes in every way, resume them, and compare with runs that nothing stopped.

    python experiments/faults/measure.py [kills disk directory together long] [--seed 0] [--kills 50]

Each part is a function that returns plain numbers; they go to ``results.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
Row = dict[str, Any]

# 64 steps of a small model on digits, all its state warm-started: a few seconds.
SHORT = ["task.state_size=20", "task.warm_start=true", "trainer.max_steps=64", "trainer.eval_every=4"]
SHORT += ["trainer.checkpoint_every=3", "trainer.figures_every=16", "trainer.progress=false", "device=cpu", "threads=1"]
CASES = {
    "sgd, step": [
        "optimizer=sgd",
        "optimizer.lr=0.3",
        "optimizer/scheduler=step",
        "optimizer.scheduler.step_size=9",
        "optimizer.scheduler.gamma=0.7",
    ],
    "momentum, cosine": ["optimizer=momentum", "optimizer.lr=0.3", "optimizer/scheduler=cosine"],
    "adam, exponential": [
        "optimizer=adam",
        "optimizer.lr=0.03",
        "optimizer/scheduler=exponential",
        "optimizer.scheduler.gamma=0.97",
    ],
    "adamw, plateau": [
        "optimizer=adamw",
        "optimizer.lr=0.03",
        "optimizer/scheduler=plateau",
        "optimizer.scheduler.factor=0.5",
        "optimizer.scheduler.patience=0",
    ],
    "lbfgs, none": ["optimizer=lbfgs", "optimizer.lr=0.3", "optimizer.max_iter=5"],
}


def start(directory: Path, overrides: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
    """Start ``hyperopt`` in ``directory``."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "hyperopt.app.cli", f"hydra.run.dir={directory}", *overrides]
    return subprocess.Popen(
        command, cwd=directory.parent, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **popen
    )


def finish(directory: Path, overrides: Sequence[str], status: int = 0) -> str:
    """Run ``hyperopt`` to its end, check its exit status, and return what it said."""
    process = start(directory, overrides)
    said = process.communicate()[1]
    if process.returncode != status:
        raise RuntimeError(f"exit status {process.returncode}, not {status}: {said}")
    return said


def rows(directory: Path) -> list[Row]:
    """The lines of ``metrics.jsonl``, times left out."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def scalars(directory: Path) -> list[tuple[str, int, str]]:
    """Every scalar and image in the event files, as they lie there: nothing is purged. Times left out."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((directory / "tb").rglob("events.out.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.startswith(("time/", "config/", "_hparams_", "custom_scalars")):
                    content = value.tensor.float_val or value.tensor.tensor_content or value.tensor.string_val[-1:]
                    found.append((value.tag, event.step, repr(content)))
    return sorted(found)


def state(directory: Path) -> Any:
    """What ``last.pt`` holds, tensors as lists, times and positions left out."""
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return repr(value.tolist())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "seconds" and not str(key).startswith("time/")}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else repr(value)

    content = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    return plain({key: content[key] for key in ("state", "task", "optimizer", "schedule", "generator", "rng")})


def differences(directory: Path, reference: Path) -> list[str]:
    """What differs between a run that was stopped and one that was not: nothing, we hope."""
    found = [name for name, read in (("rows", rows), ("events", scalars), ("state", state)) if read(directory) != read(reference)]
    tags = Counter((tag, step) for tag, step, _ in scalars(directory))
    found += ["events twice"] if max(tags.values()) > 1 else []
    found += ["temporary files left"] if list(directory.rglob("*.tmp")) else []
    return found


def reference(work: Path, overrides: Sequence[str]) -> tuple[Path, float]:
    """A run that nothing stops, and its wall seconds."""
    directory = work / "reference"
    before = time.monotonic()
    finish(directory, overrides)
    return directory, time.monotonic() - before


def lines(run: Path) -> int:
    """Number of rows that a run has written."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Wait some time, or until the process ends."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def kills(work: Path, seed: int, count: int) -> Row:
    """SIGKILL at random moments (and one SIGTERM and one SIGINT a case), each time ``resume=auto``, until enough and done."""
    rng = random.Random(seed)
    result: Row = {}
    for number, (name, overrides) in enumerate(CASES.items()):
        case = work / f"kills-{number}"
        case.mkdir(parents=True)
        whole, seconds = reference(case, [*SHORT, *overrides])
        wanted = [signal.SIGKILL] * (count // len(CASES)) + [signal.SIGTERM, signal.SIGINT]
        rng.shuffle(wanted)
        lives, at, differ, leftovers, run = 0, [], [], 0, None
        while wanted or run is not None:
            if run is None:
                run, lives = case / f"run-{lives}", lives + 1
            before = lines(run)
            process = start(run, [*SHORT, *overrides, "resume=auto"])
            if wanted and rng.random() < 0.25:  # any moment: while it imports, reads data, resumes, or later
                wait(process, rng.uniform(0.0, seconds))
            elif wanted:  # any moment of the steps, whatever else the machine does
                goal, extra = before + rng.randint(1, 12), rng.uniform(0.0, 0.2)
                while process.poll() is None and lines(run) < goal:
                    time.sleep(0.005)
                wait(process, extra)
            if wanted and process.poll() is None:
                process.send_signal(wanted.pop())
                process.communicate()
                at.append(lines(run))
                leftovers += len(list(run.rglob("*.tmp")))
                continue
            said = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(f"a resume ended with status {process.returncode} in {run}: {said}")
            differ += differences(run, whole)
            run = None
        result[name] = {
            "signals": len(at),
            "rows written when stopped": sorted(at),
            "temporary files left by a kill": leftovers,
            "finished runs": lives,
            "differences": differ,
            "seconds of the reference": round(seconds, 1),
        }
        print(name, result[name], flush=True)
    return result


def disk(work: Path, seed: int, count: int) -> Row:
    """A small disk (tmpfs) that fills up, at many sizes; then more space, and ``resume=auto``. Needs root."""
    often = [*SHORT, *CASES["momentum, cosine"]]
    rarely = [*often, "trainer.eval_every=1000", "trainer.checkpoint_every=1000", "trainer.figures_every=null"]  # rows fill it
    failed: Counter[str] = Counter()
    differ, torn, damaged = [], 0, 0
    # Two checkpoints of this run are 0.35 MB.
    sizes = {size: often for size in (200, 400, 600)} | {size: rarely for size in (405, 415, 425, 435, 445)}
    for size, overrides in sizes.items():
        case = work / "disk" / ("often" if overrides is often else "rarely")
        if not case.exists():
            case.mkdir(parents=True)
            reference(case, overrides)
        whole = case / "reference"
        mount = work / "disk" / f"small-{size}"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], check=True)
        try:
            run = mount / "run"
            process = start(run, overrides)
            said = process.communicate()[1]
            if process.returncode == 0:
                failed["nothing: it was large enough"] += 1
            elif "No space left on device" not in said or "hydra.run.dir" not in said:
                raise RuntimeError(said)
            else:
                place = said.split("cannot write ")[-1].split(":")[0] if "cannot write " in said else "(before the run)"
                failed["tb/events" if "tfevents" in place else place.removeprefix(f"{run}/")] += 1
                if (run / "metrics.jsonl").exists():
                    text = (run / "metrics.jsonl").read_text()
                    torn += bool(text) and not text.endswith("\n")
                    damaged += rows(run) != rows(whole)[: len(rows(run))]
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            finish(run, [*overrides, "resume=auto"])
            differ += differences(run, whole)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    found = {"torn lines": torn, "rows differ": damaged, "differences": differ}
    return {"sizes in KiB": list(sizes), "what could not be written": failed, **found}


def wait_for_rows(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written ``count`` rows."""
    while process.poll() is None:
        if lines(run) >= count:
            return
        time.sleep(0.01)
    raise RuntimeError(f"it ended too early: {process.communicate()[1]}")


def directory(work: Path, seed: int, count: int) -> Row:
    """The run directory is removed, moved away or made immutable (``chattr +i``, needs root) while the run writes to it."""
    overrides = [*SHORT, *CASES["momentum, cosine"], "trainer.max_steps=200", "optimizer.scheduler.T_max=64"]
    (work / "directory").mkdir(parents=True)
    whole, _ = reference(work / "directory", overrides)
    result: Row = {}
    for how in ("removed", "moved", "read-only"):
        run = work / "directory" / how
        process = start(run, overrides)
        wait_for_rows(run, 20, process)
        if how == "removed":
            run.rename(trash := run.with_name("trash"))  # at once, as far as the run can see
            shutil.rmtree(trash)
        elif how == "moved":
            run.rename(run.with_name("elsewhere"))
        else:
            subprocess.run(["chattr", "+i", str(run / "checkpoints")], check=True)
        said = process.communicate()[1].strip().splitlines()[-1]
        if how == "moved":
            run = run.with_name("elsewhere")
        elif how == "read-only":
            subprocess.run(["chattr", "-i", str(run / "checkpoints")], check=True)
        finish(run, [*overrides, "resume=auto"])
        differ = [each for each in differences(run, whole) if how != "removed" or each != "events"]
        result[how] = {"status": process.returncode, "said": said.replace(str(run.parent), ""), "differences": differ}
    return result


def together(work: Path, seed: int, count: int) -> Row:
    """Two launches into one new directory at the same moment, many times: one runs, the other is refused."""
    work = work / "together"
    work.mkdir(parents=True)
    ends: Counter[str] = Counter()
    mixed = 0
    for attempt in range(count // 5):
        run = work / f"run-{attempt}"
        each = ["trainer.max_steps=3", "trainer.progress=false", "task.state_size=5", "device=cpu"]
        pair = [start(run, [*each, f"seed={number}"]) for number in (1, 2)]
        said = [process.communicate()[1] for process in pair]
        codes = [process.returncode for process in pair]
        ends[str(sorted(codes))] += 1
        loser = said[codes.index(1)] if 1 in codes else ""
        ends["in use by" if "is in use by" in loser else "is not empty" if "is not empty" in loser else "another end"] += 1
        alone = work / f"alone-{attempt}"
        finish(alone, [*each, f"seed={codes.index(0) + 1}"])
        mixed += rows(run) != rows(alone)
    return {"attempts": count // 5, "exit statuses and refusals": ends, "runs with a number that is not theirs": mixed}


TASK = """
import torch
from hyperopt.tasks.base import StepRecord, Task

class Quadratic(Task):
    name = "quadratic"
    def setup(self, env):
        self.lam = torch.zeros(2, dtype=env.dtype, requires_grad=True)
    def groups(self):
        return {"lam": [self.lam]}
    def step(self, optimizer, check):
        def closure():
            optimizer.zero_grad()
            loss = (self.lam - 2).square().sum()
            loss.backward()
            check(self.gradients())
            return loss
        return StepRecord(loss=float(optimizer.step(closure)))
    def evaluate(self):
        loss = float((self.lam.detach() - 2).square().sum())
        return {"outer/loss": loss, "val/loss": loss}
    def state_dict(self):
        return {"lam": self.lam.detach().clone()}
    def load_state_dict(self, state):
        self.lam.data.copy_(state["lam"])
"""


def resident(process: subprocess.Popen[str]) -> int:
    """Resident memory of a process in KiB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def long(work: Path, seed: int, count: int, steps: int = 100_000) -> Row:
    """Many steps of a trivial task: memory and files as they grow."""
    package = work / "long" / "elsewhere" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tasks.py").write_text(TASK)
    (package / "task").mkdir()
    (package / "task" / "quadratic.yaml").write_text("_target_: mine.tasks.Quadratic\n")
    run = work / "long" / "run"
    overrides = ["task=quadratic", f"hydra.searchpath=[file://{package}]", "allow_targets=[mine]", "optimizer=sgd"]
    overrides += ["optimizer.lr=1e-5", "device=cpu"]
    overrides += [f"trainer.max_steps={steps}", "trainer.eval_every=100", "trainer.checkpoint_every=1000"]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), before]))
    try:
        process = start(run, [*overrides, "trainer.progress=false"])
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    marks: Row = {}
    for mark in (steps // 10, steps // 2, steps - steps // 50):
        while process.poll() is None and not (at := last_step(run)) >= mark:
            time.sleep(0.05)
        if process.poll() is None:
            sizes = {name: size_of(run, name) for name in ("metrics.jsonl", "tb/*", "checkpoints/last.pt")}
            marks[str(at)] = {"resident MiB": round(resident(process) / 1024, 1), "bytes": sizes}
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(said)
    total = {name: size_of(run, name) for name in ("metrics.jsonl", "tb/*")}
    summary = json.loads((run / "summary.json").read_text())
    return {
        "marks": marks,
        "steps": summary["steps"],
        "seconds": round(summary["seconds"], 1),
        "bytes a step": {name: round(size / steps, 1) for name, size in total.items()},
        "files": sum(path.is_file() for path in run.rglob("*")),
    }


def size_of(run: Path, pattern: str) -> int:
    """Bytes of the files of a run that match a pattern."""
    return sum(path.stat().st_size for path in run.glob(pattern))


def last_step(run: Path) -> int:
    """Index of the last whole row, read from the end of the file; -1 before the first."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return -1
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        lines = file.read().rpartition(b"\n")[0].splitlines()  # the last line may be on its way
    return json.loads(lines[-1])["step"] if lines else -1


PARTS = {"kills": kills, "disk": disk, "directory": directory, "together": together, "long": long}


def main() -> None:
    """Measure the parts named on the command line, by default all, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="number of SIGKILLs; a fifth of it for the other parts")
    options = parser.parse_args()
    import torch

    path = HERE / "results.json"
    results: Row = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as work:
            before = time.monotonic()
            found = PARTS[name](Path(work), options.seed, options.kills)
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "seed": options.seed}
        results[name] = {**facts, "wall seconds": round(time.monotonic() - before), **found}
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps({name: results[name]}, indent=2), flush=True)


if __name__ == "__main__":
    main()

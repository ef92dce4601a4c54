"""Measure the accuracy of every solver, adjoint and optimizer with its defaults on the main job, and write the table.

    python experiments/defaults/measure.py [--seeds 3] [--only optimizer=adam] [--runs DIR]

Each run is ``hyperopt OPTION seed=SEED trainer.max_steps=15`` with one option exchanged and nothing else. A finished run under
``--runs`` is not run again. The results go to results.json beside this file, and the table of all of them to configs/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from hyperopt.app.building import build
from hyperopt.app.config import ConfigError
from hyperopt.app.options import targets
from hyperopt.app.resolvers import register
from hyperopt.app.run import run
from hyperopt.core.policy import SolveWarning
from hyperopt.tasks.base import HypergradientError

sys.path.append(str(Path(__file__).resolve().parents[1]))

import shared

HERE = Path(__file__).resolve().parent
GROUPS = ("solver", "adjoint", "optimizer")
NEEDS = {"adjoint=shine": ("solver=broyden",)}  # an option that works beside another solver only
DEFAULT = ("solver=picard", "adjoint=neumann", "optimizer=momentum")  # the main job as it is, which is run once
STEPS = 15  # length of a run
SAME = (f"trainer.max_steps={STEPS}", "trainer.progress=false", "device=cpu", "threads=1")
Row = dict[str, Any]


def composed(*overrides: str) -> DictConfig:
    """Return the config of a command line."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(shared.REPOSITORY / "configs"), version_base="1.3"):
        return compose("train", [*overrides, *SAME])


def options(only: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return each option with its overrides, without those that the main job refuses, such as adjoints of trained problems.

    Args:
        only: the options that are wanted; empty: all.
    """
    found = {}
    for option in (f"{group}={name}" for group in GROUPS for name in targets(group)):
        if only and option not in only:
            continue
        overrides = () if option in DEFAULT else (option, *NEEDS.get(option, ()))
        with contextlib.suppress(ConfigError):
            build(composed(*overrides))
            found[option] = overrides
    return found


def measure(overrides: tuple[str, ...], seed: int, out: Path) -> Row:
    """Run the main job with an option, unless it is done, and return its accuracy, whether solves failed, and CPU seconds.

    Of a run that is ended by a solve that failed, return the reason alone.
    """
    kept = out / "measured.json"
    if not kept.exists():
        before, told = time.process_time(), io.StringIO()
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(told):
            warnings.simplefilter("always")
            try:
                run(composed(*overrides, f"seed={seed}", *(["resume=auto"] if out.exists() else [])), out)
            except HypergradientError as error:
                return {"failed": str(error)}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        warned = any(isinstance(each.message, SolveWarning) for each in caught)
        found = {"accuracy": rows[-1]["test/accuracy"], "warned": warned, "seconds": time.process_time() - before}
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def table(results: Row) -> list[str]:
    """Return the table, the options of each group in the order of their accuracy."""
    lines = [f"| option | test accuracy after {STEPS} steps | seeds | CPU seconds |", "|---|---|---|---|"]
    for group in GROUPS:
        of = {name: row for name, row in results.items() if name.startswith(f"{group}=")}
        ran = {name: row for name, row in of.items() if "failed" not in row}
        for name, row in sorted(ran.items(), key=lambda each: -each[1]["accuracy"]["mean"]):
            told = " ".join([f"`{name}`", *(f"with `{each}`" for each in NEEDS.get(name, ()))])
            told += (", the default" if name in DEFAULT else "") + (" *" if row["warned"] else "")
            accuracy = f"{row['accuracy']['mean']:.4f}".lstrip("0")
            lines.append(f"| {told} | {accuracy} | {len(row['accuracy']['values'])} | {row['seconds']['mean']:.0f} |")
        lines += [
            f"| `{name}` | ended by an error: {row['failed'].partition(';')[0]} | - | - |"
            for name, row in of.items()
            if name not in ran
        ]
    return lines


def main() -> None:
    """Measure the options, one seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--only", nargs="*", help="options, such as optimizer=adam; default: all")
    parser.add_argument("--runs", type=Path, help="directory of the runs; default: a temporary one")
    args = parser.parse_args()
    chosen = options(args.only or ())
    runs = args.runs or Path(tempfile.mkdtemp())
    results = shared.load(HERE / "results.json")
    for seeds in range(1, args.seeds + 1):
        for name, overrides in chosen.items():
            found = [measure(overrides, seed, runs / f"{'default' if name in DEFAULT else name}-{seed}") for seed in range(seeds)]
            print(name, f"seed {seeds - 1}:", found[-1], flush=True)
            if failed := [each["failed"] for each in found if "failed" in each]:
                results = shared.save(HERE / "results.json", name, {"failed": failed[0]})
                continue
            row = {key: shared.spread([each[key] for each in found]) for key in ("accuracy", "seconds")}
            results = shared.save(HERE / "results.json", name, {**row, "warned": any(each["warned"] for each in found)})
    shared.save(HERE / "results.json", "machine", {"torch": torch.__version__, "python": platform.python_version()})
    shared.write_table(shared.REPOSITORY / "configs" / "README.md", "defaults", table(results))


if __name__ == "__main__":
    main()

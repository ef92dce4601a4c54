"""What the measurements of all folders share: a clock, a task built from a config, files of results, tables of pages, TPE.

A script finds this module by the line ``sys.path.append(str(Path(__file__).resolve().parents[1]))``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hyperopt.app.building import Built, build
from hyperopt.app.repro import seed_everything
from hyperopt.app.resolvers import register
from hyperopt.tasks.base import Environment

REPOSITORY = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


class Clock:
    """CPU seconds of this process since the clock was made, of a budget.

    Args:
        budget: CPU seconds.
    """

    def __init__(self, budget: float) -> None:
        """Start the clock."""
        self.budget, self.begun = budget, time.process_time()

    @property
    def seconds(self) -> float:
        """CPU seconds so far, without those that were added to ``begun`` because they do not count."""
        return time.process_time() - self.begun

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.seconds >= self.budget


def built(*overrides: str) -> Built:
    """What a config describes, its task set up as ``hyperopt`` would; one thread, on the CPU."""
    torch.set_num_threads(1)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", list(overrides))
    dtype = getattr(torch, cfg.precision)
    torch.set_default_dtype(dtype)
    found = build(cfg)
    found.task.setup(Environment(torch.device("cpu"), dtype, cfg.seed, False, seed_everything(cfg.seed), found.trainer))
    return found


def spread(values: Sequence[float]) -> Row:
    """Mean and values."""
    return {"mean": statistics.fmean(values), "values": list(values)}


def load(path: Path) -> Row:
    """A file of results; nothing where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, name: str, found: Any) -> Row:
    """Put one measurement into a file of results, beside the others; return all of them."""
    results = {**load(path), name: found}
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def write_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put a table between its two marks in a page, if they are there."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = page.read_text() if page.exists() else ""
    if start in text:
        before, _, rest = text.partition(start)
        page.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")


def plain_ticks(axis: Any, *which: str) -> None:
    """Numbers such as 0.2, 0.5 and 1 on a logarithmic axis of a figure (``y``, or as named), in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for each in (getattr(axis, f"{name}axis") for name in which or ("y",)):
        each.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        each.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        each.set_minor_formatter(NullFormatter())


def tpe(seed: int, startup: int) -> Any:
    """A study of optuna's TPE, whose first ``startup`` draws are random.

    Raises:
        SystemExit: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SystemExit(
            "TPE needs optuna, which is in the extra 'bench': pip install 'hyperopt-bilevel[bench]' (or leave TPE out: --methods)"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup))

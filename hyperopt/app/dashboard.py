"""What TensorBoard shows of a run, and what comes first: its name, its HParams row, its charts; flat curves are left out.

TensorBoard names a run by its folder. The events of a run therefore lie in ``tb/<what it was given>/``, so that every TensorBoard
on a folder of runs tells them apart: ``multirun/mine/0/tb/optimizer=adam,seed=1``. A run without overrides has its events in
``tb/`` itself. This module imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.experiment import counts
from hyperopt.app.options import leaves
from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.core.text import printable
from hyperopt.data.reading import read_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALWAYS = ("outer/", "val/", "test/", "hyper/", "time/")
"""Beginnings of the names that are shown even while they are flat."""
SPLITS = ("val", "test", "outer")  # in the order in which their losses and accuracies are shown
LONGEST = 100  # bytes of a run's name
LAYOUT: dict[str, dict[str, str]] = {
    "Losses and accuracies": {
        "loss": r"(outer|val|test)/(step_)?loss$",
        "accuracy": r"(outer|val|test)/(step_)?accuracy$",
        "error": r"(outer|val|test)/error$",
    },
    "Hyperparameters, in their own units": {"single numbers": r"hyper/[^/]+$", "their spread": r"hyper/.+/"},
    "Hypergradient": {"norm": r"hypergrad/norm", "error estimate": r"hypergrad/error"},
    "Inner problem and adjoint": {
        "residual": r"(inner|adjoint)/residual",
        "iterations": r"(inner|adjoint)/iterations",
        "contraction": r"(inner|adjoint)/contraction",
    },
    "Self-tuning": {"losses": r"stn/(train|valid)_loss", "scale": r"stn/scale/", "response": r"stn/response"},
    "Cost": {"evaluations and products, in total": r"cost/(evaluations|vjps|jvps)", "seconds a step": r"time/step_seconds"},
}
"""The charts of the Custom Scalars tab, with regular expressions for their tags."""
OPEN = ("Losses and accuracies", "Hyperparameters, in their own units")
"""The sections of that tab that are open at first."""
Flat = list[Any]
"""The first step of a quantity that has not changed since, its value, and its latest step."""


def swept(run: RunDirectory) -> list[str]:
    """Return the overrides of a run that tell it from others: those that its sweep varies, or all that count of a single run."""
    given = [each.lstrip("+") for each in run.read_overrides() if each[:1] != "~"]
    given = [each for each in given if counts(each.partition("=")[0], "hparams") and not each.startswith(("sweep=", "debug="))]
    if not run.job.exists():
        return [each for each in given if not each.startswith("experiment=")]  # which its directory is named after
    sweep, parser, varied = or_empty(read_yaml, run.path.parent / "multirun.yaml"), OverridesParser.create(), set()
    task, params = _inside(sweep, "overrides", "task"), _inside(sweep, "sweeper", "params")
    texts = task if isinstance(task, list) else []
    texts = [*texts, *(f"{key}={value}" for key, value in params.items())] if isinstance(params, dict) else texts
    for text in texts:
        try:
            override = parser.parse_override(str(text))
        except Exception:  # a file from elsewhere may hold anything
            continue
        if override.is_sweep_override():
            varied.add(override.get_key_element().lstrip("+"))
    return [each for each in given if not varied or each.partition("=")[0] in varied]


def _inside(sweep: Any, *keys: str) -> Any:
    """Return a value of Hydra's part of a sweep's config; None in a damaged file."""
    for key in ("hydra", *keys):
        sweep = sweep.get(key) if isinstance(sweep, dict) else None
    return sweep


def label(overrides: Iterable[str]) -> str:
    """Return the name of a run's folder in ``tb/``, at most ``LONGEST`` bytes; empty without overrides."""
    text = printable(",".join(overrides)).replace("/", ".").replace("\\", ".")
    while len(text.encode()) > LONGEST:
        text = f"{text.removesuffix('...')[:-1]}..."
    return text


def hparams(cfg: DictConfig, overrides: Iterable[str]) -> dict[str, float | str]:
    """Return the row of the HParams tab: the overridden keys with their values, of the same type in every run of a sweep.

    The overrides are those of ``swept``. For a group (``optimizer=adam``) the value is the option.
    """
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True)
    numbers = {key: number for key, _, number in leaves(values, known={"threads": int | None})}
    row: dict[str, float | str] = {}
    for key, _, text in (each.partition("=") for each in overrides):
        name = key.replace("/", ".")
        value = OmegaConf.select(cfg, name) if name in numbers else text
        if value is None:
            row[name] = math.nan if numbers.get(name) else "-"
        else:
            row[name] = value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return dict(sorted(row.items()))


def layout(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the charts of the Custom Scalars tab that have one of these quantities, as ``LAYOUT`` has them."""
    found = {
        title: {name: tag for name, tag in charts.items() if any(re.match(tag, each) for each in names)}
        for title, charts in LAYOUT.items()
    }
    return {title: charts for title, charts in found.items() if charts}


def of_interest(names: Iterable[str]) -> list[str]:
    """Return the losses, errors and accuracies among metrics, which HParams has as columns and ``hyperopt tensorboard`` pins."""
    order = [f"{split}/{kind}" for kind in ("accuracy", "error", "loss") for split in SPLITS]
    return sorted({*names} & {*order}, key=order.index)


class FlatCurves:
    """Leaves out diagnostics that are the same in every step so far; once one changes, its flat part is written first.

    Args:
        known: ``state`` of a checkpoint; None: every curve is shown, as in events of an older version.
    """

    def __init__(self, known: Mapping[str, Flat | None] | None) -> None:
        """Continue from a checkpoint."""
        self._known = None if known is None else {name: flat and [*flat] for name, flat in known.items()}

    @property
    def state(self) -> dict[str, Flat | None] | None:
        """The curves so far as plain values for a checkpoint: None for one that is shown."""
        return None if self._known is None else {name: flat and [*flat] for name, flat in self._known.items()}

    def shown(self, step: int, row: Mapping[str, float]) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield ``(step, {name: value})`` of everything to be written now, in the order of the steps."""
        if self._known is None:
            yield step, dict(row)
            return
        found: dict[int, dict[str, float]] = {step: {}}
        for name, value in row.items():
            flat = None if name.startswith(ALWAYS) else self._known.setdefault(name, [step, value, step])
            if flat is not None and (value == flat[1] or (math.isnan(value) and math.isnan(flat[1]))):
                flat[2] = step
                continue
            if flat is not None:
                for before in (flat[0], flat[2]):
                    found.setdefault(before, {})[name] = flat[1]
                self._known[name] = None
            found[step][name] = value
        yield from sorted(found.items())


def cost_figure(rows: Sequence[Mapping[str, float]]) -> Figure | None:
    """Return a figure of losses and error rates against evaluations and products so far; None if no evaluation has a cost."""
    from matplotlib.figure import Figure

    kinds = {"loss": [], "accuracy": []}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        cost = sum(row.get(f"cost/{kind}", 0.0) for kind in ("evaluations", "vjps", "jvps"))
        for kind in kinds:
            for name in (f"{split}/{kind}" for split in ("outer", "val", "test")):
                if name in row and cost > 0 and math.isfinite(row[name]):
                    points.setdefault(name, []).append((cost, row[name] if kind == "loss" else 1 - row[name]))
    for name in points:
        kinds[name.partition("/")[2]].append(name)
    drawn = [kind for kind, names in kinds.items() if names]
    if not drawn:
        return None
    figure = Figure(figsize=(6, 3.2 * len(drawn)), layout="constrained")
    for axes, kind in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        for name in kinds[kind]:
            axes.plot(*zip(*points[name], strict=True), marker=".", label=name)
        positive = all(value > 0 for name in kinds[kind] for _, value in points[name])
        axes.set(xlabel="evaluations of the map and products", ylabel="loss" if kind == "loss" else "1 - accuracy", xscale="log")
        axes.set_yscale("log" if positive else "linear")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    return figure

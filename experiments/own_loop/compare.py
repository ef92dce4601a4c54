"""This library, betty, hypertorch and torchopt, beside the same loop: lines, seconds, memory, error of the hypergradient.

    pip install -e ".[bench]"
    python experiments/own_loop/compare.py --hypertorch PATH [--rounds 9]

hypertorch is in no package index: ``PATH`` is a clone of ``prolearner/hypertorch``; without it, or without another library, its
rows are left out. Rounds of all libraries are made in turn, in one process and on one thread. A ratio is taken within one turn,
in CPU seconds; the table has the median of the turns, the least and the largest. Memory is the most that the tensors made in a
round had at once. The error is that of one hypergradient of a small network with tanh in float64, at a minimum, against the
solution with the dense Hessian; all libraries get the same random draws there, and those that ask for the step of the Neumann
series get 1 / largest curvature.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import inspect
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from libraries import LIBRARIES, Round, Setting, plain
from measure import HERE, endless, shared
from problem import Batch, Sizes, Values, hyperparameters, images, network, train_loss, val_loss
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from hyperopt.core.memory import peak_memory

RESULTS = HERE / "libraries.json"
FURTHER = [("ours", "differences"), ("betty", "differences"), ("ours", "auto")]
WAYS = [(name, "neumann") for name in LIBRARIES] + FURTHER
ERRORS = [(name, method) for method in ("neumann", "cg") for name in LIBRARIES] + FURTHER
PRODUCTS = 10
RIDGE = 2e-2


def lines(function: Any) -> int:
    """Lines of code in the body of a function, without its docstring."""
    source = inspect.getsource(function)
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.FunctionDef)
    return sum(bool(line.strip()) for line in source.splitlines()[made.body[0].end_lineno : made.end_lineno])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what an engine has to say."""
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def rounds(sizes: Sizes, ways: list[tuple[str, str]]) -> dict[tuple[str, str], Round]:
    """One round of every way, each with a network of its own that begins the same; the loop alone is ("plain", "")."""
    rows = images(sizes, 0)
    found: dict[tuple[str, str], Round] = {}
    for way in [("plain", ""), *ways]:
        torch.manual_seed(0)
        train, val = (endless(DataLoader(part, sizes.batch, shuffle=True)) for part in (rows.train, rows.val))
        s = Setting(network(sizes), hyperparameters(), train, val, method=way[1], products=PRODUCTS)
        found[way] = {"plain": plain, **LIBRARIES}[way[0]](s)
    return found


def costs(sizes: Sizes, ways: list[tuple[str, str]], turns: int) -> dict[str, shared.Row]:
    """CPU seconds of a round, what one of ours with the same adjoint takes in ratio to it, and its peak of memory."""
    every = rounds(sizes, ways)
    taken: dict[tuple[str, str], list[float]] = {way: [] for way in every}
    for way, go in every.items():
        for _ in range(20 if way[0] == "plain" else 2):
            go()
    for _ in range(turns):
        for way, go in every.items():
            start = time.process_time()
            go()
            taken[way].append(time.process_time() - start)
    found: dict[str, shared.Row] = {}
    for way, go in every.items():
        with peak_memory("cpu") as memory:
            go()
        name = "plain" if way[0] == "plain" else ", ".join(way)
        found[name] = {"seconds": statistics.median(taken[way]), "peak": memory.peak}
        if (base := ("ours", way[1])) in taken:
            ratios = sorted(ours / one for one, ours in zip(taken[way], taken[base], strict=True))
            found[name]["ours"] = [ratios[0], statistics.median(ratios), ratios[-1]]
    return found


class Same:
    """One batch, again and again."""

    def __init__(self, batch: Batch) -> None:
        """Keep it."""
        self.batch = batch

    def __iter__(self) -> Same:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The batch."""
        return self.batch


def same_draws(model: nn.Module, batch: Batch, lam: Values) -> Tensor:
    """``train_loss`` with the same random numbers every time, and a decay of all parameters, so that it has a strict minimum."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train_loss(model, batch, lam) + RIDGE / 2 * sum(p.square().sum() for p in model.parameters())


class Small:
    """A small smooth network at a minimum of its training loss, and the exact hypergradient there.

    Attributes:
        model, hyper: trained, and at the values they were trained for.
        train, val: its images.
        exact: the hypergradient in the raw variables, flat.
        curvatures: eigenvalues of the Hessian.
    """

    def __init__(self, sizes: Sizes, decay: float = 0.02) -> None:
        """Train, and solve with the dense Hessian."""
        rows = images(sizes, 0)
        self.train, self.val = ((x.double(), y) for x, y in (rows.train[: len(rows.train)], rows.val[: len(rows.val)]))
        torch.manual_seed(0)
        smooth = (nn.Tanh() if isinstance(part, nn.ReLU) else part for part in network(sizes).double())
        self.model, self.hyper = nn.Sequential(*smooth), hyperparameters().double()
        with torch.no_grad():
            self.hyper.raw["decay"].fill_(torch.tensor(decay).log())
        weights = list(self.model.parameters())
        limits: dict[str, Any] = {"max_iter": 4000, "tolerance_grad": 1e-11, "tolerance_change": 0.0, "history_size": 50}
        optimizer = torch.optim.LBFGS(weights, **limits, line_search_fn="strong_wolfe")

        def again() -> Any:
            optimizer.zero_grad()
            loss = same_draws(self.model, self.train, self.hyper.read())
            loss.backward()
            return loss

        optimizer.step(again)
        loss = same_draws(self.model, self.train, self.hyper.values())
        slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
        self.slope = float(slopes.detach().norm())
        rows_of = [torch.autograd.grad(slope, weights, retain_graph=True) for slope in slopes]
        hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows_of])
        outer = torch.autograd.grad(val_loss(self.model, self.val, {}), weights)
        u = torch.linalg.solve(hessian, torch.cat([g.flatten() for g in outer]))
        raw = list(self.hyper.parameters())
        self.exact = torch.cat([-g.flatten() for g in torch.autograd.grad(slopes, raw, u)])
        self.curvatures = torch.linalg.eigvalsh((hessian + hessian.T) / 2)

    def setting(self, method: str, products: int) -> Setting:
        """Where every library starts; steps of size 0 leave everything where it is."""
        model, hyper = copy.deepcopy(self.model), copy.deepcopy(self.hyper)
        step = 1 / float(self.curvatures[-1])
        train, val = Same(self.train), Same(self.val)
        return Setting(model, hyper, train, val, same_draws, val_loss, lr=0.0, method=method, products=products, step=step)


def hypergradient(name: str, s: Setting) -> tuple[Tensor, Any]:
    """What a library gives to the optimizer of the hyperparameters, flat, and what its round returns."""
    raw, seen = list(s.hyper.parameters()), []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer.param_groups[0]["params"][0] is raw[0]:
            seen.append(torch.cat([leaf.grad.flatten() for leaf in raw if leaf.grad is not None]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        said = LIBRARIES[name](s)()
    finally:
        handle.remove()
    (found,) = seen
    return found, said


def errors(small: Small, ways: list[tuple[str, str]], products: list[int]) -> dict[str, shared.Row]:
    """Relative errors by the number of products."""
    found: dict[str, shared.Row] = {}
    for name, method in ways:
        row = found.setdefault(f"{name}, {method}", {})
        for count in products:
            try:
                gradient, said = hypergradient(name, small.setting(method, count))
            except Exception as error:
                row[str(count)] = f"{type(error).__name__}: {error}"[:200]
                continue
            row[str(count)] = float((gradient - small.exact).norm() / small.exact.norm())
            row[f"cosine of {count}"] = float(torch.cosine_similarity(gradient, small.exact, dim=0))
            if said is not None:
                row[f"products of {count}"] = said.products
    return found


def small_sizes() -> Sizes:
    """Of the problem with a dense Hessian."""
    return Sizes(train=60, val=60, test=10, channels=2, hidden=8, batch=60)


def tabulate(results: shared.Row, page: Path) -> None:
    """The tables of the page."""
    shown = [
        "| library, adjoint | lines of code | CPU ms of a round | x training alone | ours with this adjoint, x this | peak, MB |",
        "|---" * 6 + "|",
    ]
    alone = results["costs"]["plain"]["seconds"]
    for way, cost in results["costs"].items():
        name = way.split(",")[0]
        cells = [str(results["lines"][name]), f"{1e3 * cost['seconds']:.0f}", f"{cost['seconds'] / alone:.1f}"]
        ratio = ""
        if "ours" in cost and name != "ours":
            least, middle, most = cost["ours"]
            ratio = f"{middle:.2f} ({least:.2f} to {most:.2f})"
        shown.append(f"| {way} | {' | '.join(cells)} | {ratio} | {cost['peak'] / 1e6:.1f} |")
    shared.write_table(page, "libraries", shown)
    counts = results["products"]
    shown = [f"| library, adjoint | {' | '.join(f'{n} products' for n in counts)} |", "|---" * (1 + len(counts)) + "|"]
    for way, row in results["errors"].items():
        cells = [cell(row, n) for n in counts]
        if way.endswith(("auto", "differences")):  # which take as many products as they choose
            spent = row.get(f"products of {counts[0]}")
            cells = [cells[0] + (f" ({spent} products)" if spent is not None else ""), *[""] * (len(counts) - 1)]
        shown.append(f"| {way} | {' | '.join(cells)} |")
    shared.write_table(page, "errors", shown)


def cell(row: shared.Row, count: int) -> str:
    """An error and a cosine, or the name of what was raised."""
    value = row[str(count)]
    return f"{value:.1e}, {row[f'cosine of {count}']:.3f}" if isinstance(value, float) else value.partition(":")[0]


def installed(hypertorch: Path | None) -> list[str]:
    """The libraries that are there; says what is not."""
    if hypertorch is not None:
        sys.path.append(str(hypertorch))
    found = []
    for name in LIBRARIES:
        try:
            __import__({"ours": "hyperopt", "hypertorch": "hypergrad"}.get(name, name))
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
        else:
            found.append(name)
    return found


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypertorch", type=Path, help="a clone of prolearner/hypertorch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--products", type=int, nargs="*", default=[10, 30, 100])
    parser.add_argument("--small", action="store_true", help="few images and channels, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of libraries.json and README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = installed(options.hypertorch)
    with quiet():
        sizes = Sizes(200, 200, 500, 2, 8, 50) if options.small else Sizes()
        found = costs(sizes, [way for way in WAYS if way[0] in there], options.rounds)
        small = Small(Sizes(20, 20, 10, 1, 4, 20) if options.small else small_sizes())
        wrong = errors(small, [way for way in ERRORS if way[0] in there], options.products)
    counted = {name: lines(function) for name, function in {"plain": plain, **LIBRARIES}.items()}
    path = options.out / RESULTS.name
    shared.save(path, "date", time.strftime("%Y-%m-%d"))
    shared.save(path, "lines", counted)
    shared.save(path, "costs", found)
    shared.save(path, "products", options.products)
    weights = sum(p.numel() for p in small.model.parameters())
    facts = {
        "weights": weights,
        "slope": small.slope,
        "least": float(small.curvatures[0]),
        "largest": float(small.curvatures[-1]),
    }
    shared.save(path, "small", facts)
    tabulate(shared.save(path, "errors", wrong), options.out / "README.md")
    print(found, facts, wrong, sep="\n")


if __name__ == "__main__":
    main()

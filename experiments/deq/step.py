"""One training step of the DEQ on 32 CIFAR-10 images: ours, the loop of the implicit-layers notebook, and torchdeq.

    pip install --no-deps torchdeq==0.1.0      # where it is missing it is left out
    python experiments/deq/step.py [--warm STEPS] [--repeats N]

The same network, initial values, images, float32 and one thread; Anderson with window 5, damping 1, tolerance 1e-2 and at most 25
evaluations, forward and backward; the steps of the three are taken in turn. What differs is what each makes of these settings:

- notebook: ridge 1e-4 added to the Gram matrix as it is; the batch stops as a whole; the backward is a hook with the same
  Anderson, written here from its description.
- torchdeq: ``get_deq(ift=True)`` with its own Anderson, the same ridge, relative stopping of the whole batch.
- ours: ``experiment=deq_cifar10``: a ridge relative to the trace of the Gram matrix, every row stops on its own, and costs
  nothing more then.
- ours, equal residuals: the loosest tolerances of a ladder with which the residuals of the whole batch, forward and adjoint,
  are at most those of the notebook, which is the faster of the two others.

``iterations`` are evaluations of the cell forward, products backward. The residuals are of the whole batch, measured here for
all at the state that each returned: ``|cell(z) - z| / |cell(z)|``, and ``models.adjoint_residual``. Writes ``step`` into
results.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import STEPS, TOLERANCE, WINDOW, adjoint_residual, images, network, train
from results import write
from torch import Tensor, nn
from torch.nn import functional

from hyperopt import Anderson, Implicit, LinearAnderson
from hyperopt.nn.networks import ImageNetwork

RIDGE = 1e-4
LADDER = (1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2, 6e-2, 8e-2, 0.12, 0.16)


def anderson(f: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, int]:
    """The notebook's Anderson acceleration; returns the last iterate and the number of evaluations."""
    rows = len(start)
    xs, fs = [start], [f(start)]
    for k in range(1, STEPS):
        if k == 1:
            x = fs[0]
        else:
            past = slice(max(0, k - WINDOW), k)
            gaps = torch.stack([(b - a).view(rows, -1) for a, b in zip(xs[past], fs[past], strict=True)], dim=1)
            n = gaps.shape[1]
            system = torch.zeros(rows, n + 1, n + 1)
            system[:, 0, 1:] = system[:, 1:, 0] = 1
            system[:, 1:, 1:] = gaps @ gaps.mT + RIDGE * torch.eye(n)
            right = torch.zeros(rows, n + 1, 1)
            right[:, 0] = 1
            alpha = torch.linalg.solve(system, right)[:, 1:, 0]
            x = (alpha[:, None] @ torch.stack([b.view(rows, -1) for b in fs[past]], dim=1))[:, 0].view_as(start)
        xs.append(x)
        fs.append(f(x))
        if k > 1 and (fs[-1] - x).norm() < TOLERANCE * (1e-5 + fs[-1].norm()):
            break
    return xs[-1], len(fs)


class Notebook(nn.Module):
    """A DEQ whose backward is a hook on its output."""

    def __init__(self, cell: nn.Module) -> None:
        """Keep the cell."""
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, z0: Any = None, v0: Any = None) -> Tensor:
        """Solve without a graph, apply the cell once more with one, and once more on a leaf for the backward's products."""
        with torch.no_grad():
            z, self.forward_evaluations = anderson(lambda z: self.cell(z, x), torch.zeros_like(x))
        z = self.cell(z, x)
        leaf = z.detach().requires_grad_()
        out = self.cell(leaf, x)

        def hook(g: Tensor) -> Tensor:
            v, self.products = anderson(lambda v: torch.autograd.grad(out, leaf, v, retain_graph=True)[0] + g, g)
            return v

        if z.requires_grad:
            z.register_hook(hook)
        return z


class TorchDEQ(nn.Module):
    """torchdeq's implicit differentiation by an autograd Function."""

    def __init__(self, cell: nn.Module) -> None:
        """Build it."""
        super().__init__()
        from torchdeq import get_deq

        self.cell = cell
        limits = {"tol": TOLERANCE, "max_iter": STEPS, "stop_mode": "rel", "solver": "anderson"}
        options = {f"{way}_{name}": value for name, value in limits.items() for way in ("f", "b")}
        self.deq = get_deq(ift=True, **options)

    def forward(self, x: Tensor, z0: Any = None, v0: Any = None) -> Tensor:
        """Solve."""
        self.forward_evaluations = self.products = 0

        def cell(z: Tensor) -> Tensor:
            self.forward_evaluations += 1
            return self.cell(z, x)

        settings = {"m": WINDOW, "lam": RIDGE, "tau": 1.0}

        def read(info: Any) -> None:
            self.products = int(info["nstep"].max())

        out, _ = self.deq(cell, torch.zeros_like(x), solver_kwargs=settings, backward_writer=read)
        return out[-1]


def replaced(model: ImageNetwork, layer: nn.Module) -> ImageNetwork:
    """A copy of the network with another implicit layer around the same cell's copy."""
    model = copy.deepcopy(model)
    layer.cell = model.get_submodule("deq").cell
    model.deq = layer
    return model


class Shifted(nn.Module):
    """A cell plus a tensor p of zeros: ``dE/dp`` is the adjoint variable v of whoever differentiates it."""

    def __init__(self, cell: nn.Module, p: Tensor) -> None:
        """Keep both."""
        super().__init__()
        self.cell, self.p = cell, p

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """The cell, and p."""
        return self.cell(z, x) + self.p


def residuals_of(model: ImageNetwork, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Residuals of the state that this network finds, and of the adjoint variable that its backward uses."""
    shifted = copy.deepcopy(model)
    layer = shifted.get_submodule("deq")
    p = torch.zeros(len(x), 48, 32, 32, requires_grad=True)
    layer.cell = Shifted(layer.cell, p)  # pyright: ignore[reportArgumentType]
    states: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: states.append(out.detach()))
    if hasattr(layer, "drop_rows"):
        layer.drop_rows = False  # p has a row for every image
    functional.cross_entropy(shifted(x), y).backward()
    assert p.grad is not None
    with torch.no_grad():
        out = model.get_submodule("deq").cell(states[0], model.norm_in(model.inject(x)))  # pyright: ignore[reportCallIssue]
    return float((out - states[0]).norm() / out.norm()), adjoint_residual(model, x, y, states[0], p.grad)


def loosened(model: ImageNetwork, x: Tensor, y: Tensor, goals: tuple[float, float]) -> ImageNetwork:
    """A copy with the loosest tolerances of the ladder whose residuals are at most these, the forward one first."""
    model = copy.deepcopy(model)
    layer: Any = model.deq
    for which in (0, 1):
        for rtol in reversed(LADDER):
            if which == 0:
                layer.solver = Anderson(rtol, max_steps=STEPS, window=WINDOW)
            else:
                linear = LinearAnderson(rtol, max_steps=STEPS, window=WINDOW, relative_to="batch")
                layer.adjoint = Implicit(linear, policy="ignore")
            if residuals_of(model, x, y)[which] <= goals[which]:
                break
    print(f"equal residuals: {layer.solver}, {layer.adjoint}", flush=True)
    return model


def counts(layer: nn.Module) -> tuple[int, int]:
    """Evaluations forward and products backward of the latest step."""
    if hasattr(layer, "solution"):
        solution: Any = layer.solution
        return solution.forward.evaluations, solution.adjoint.vjps - 1  # the closing product goes to the parameters
    return int(layer.forward_evaluations), int(layer.products)  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, nargs="*", default=[0, 20], help="steps of training before the measurement")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for warm in options.warm:
        rows = images(32 * (warm + 1))
        ours = network()
        train(ours, rows, warm, 32)
        part = rows.take(slice(32 * warm, None))
        x, y = part.x.view(-1, 3, 32, 32), part.y
        models = {"ours": ours}
        models["notebook"] = replaced(ours, Notebook(nn.Identity()))
        try:
            models["torchdeq"] = replaced(ours, TorchDEQ(nn.Identity()))
        except ImportError:
            print("torchdeq is not installed: left out")
        models["ours, equal residuals"] = loosened(ours, x, y, residuals_of(models["notebook"], x, y))
        residuals = {name: residuals_of(model, x, y) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        optimizers = {name: torch.optim.Adam(model.parameters(), 0.0) for name, model in models.items()}
        for repeat in range(options.repeats + 1):
            for name, model in models.items():
                before = time.process_time()
                optimizers[name].zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimizers[name].step()
                if repeat:  # the first is the warm-up
                    seconds[name].append(time.process_time() - before)
        for name, model in models.items():
            forward, backward = counts(model.get_submodule("deq"))
            row = {"trained_steps": warm, "who": name, "evaluations": forward, "products": backward}
            row |= {"residual": residuals[name][0], "adjoint_residual": residuals[name][1]}
            row |= {"cpu_seconds": statistics.median(seconds[name])}
            row |= {"least": min(seconds[name]), "all": seconds[name]}
            table.append(row)
            print({key: value for key, value in row.items() if key != "all"}, flush=True)
    write("step", table)


if __name__ == "__main__":
    main()

"""Accuracy of the DEQ of ``experiment=deq_cifar10`` after the same CPU seconds of training with each adjoint.

    python experiments/deq/budget.py [--seconds S] [--train N] [--test N]

One seed, one order of batches (32 images of ``--train`` of the training images), Adam at 1e-3. SHINE's forward solve is
Broyden's, whose inverse it uses; all others' is Anderson's, each to 1e-2 or 25 evaluations. CPU seconds of the training steps
alone, one thread; loss and accuracy on the first ``--test`` test images, solved by the same solver. Writes ``budget`` into
results.json.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from models import ADJOINT, REPOSITORY, SOLVER, STEPS, TOLERANCE, network
from results import write
from torch.nn import functional

from hyperopt import GMRES, Broyden, Implicit, LinearAnderson, Neumann, OneStep, Phantom, Shine
from hyperopt.data.cifar import CIFAR10
from hyperopt.data.files import default_root
from hyperopt.data.splits import Rows

BROYDEN = Broyden(TOLERANCE, max_steps=STEPS, memory=STEPS)
ADJOINTS: dict[str, tuple[Any, Any]] = {
    "exact (GMRES, 1e-4)": (SOLVER, Implicit(GMRES(1e-4, max_steps=100, window=50), policy="ignore")),
    "Anderson, 1e-2": (SOLVER, ADJOINT),
    "Neumann, 5": (SOLVER, Implicit(Neumann(0.0, 0.0, 5), policy="ignore")),
    "SHINE": (BROYDEN, Shine()),
    "SHINE + 5 Anderson": (BROYDEN, Shine(LinearAnderson(0.0, 0.0, max_steps=5))),
    "one-step": (SOLVER, OneStep()),
    "phantom, 5 at 0.5": (SOLVER, Phantom(5, 0.5)),
}
BATCH = 32


def measure(solver: Any, adjoint: Any, train: Rows, test: Rows, seconds: float) -> dict[str, float]:
    """Train for so many CPU seconds, then test."""
    model = network()
    layer: Any = model.get_submodule("deq")
    layer.solver, layer.adjoint = solver, adjoint
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    spent, steps, iterations = 0.0, 0, 0.0
    while spent < seconds:
        at = BATCH * steps % (len(train) - BATCH + 1)
        part = train.take(slice(at, at + BATCH))
        before = time.process_time()
        optimizer.zero_grad()
        functional.cross_entropy(model(part.x.view(-1, 3, 32, 32)), part.y).backward()
        optimizer.step()
        spent += time.process_time() - before
        steps += 1
        iterations += float(layer.solution.forward.iterations.double().mean())
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for part in (test.take(slice(k, k + BATCH)) for k in range(0, len(test), BATCH)):
            logits = model(part.x.view(-1, 3, 32, 32))
            loss += float(functional.cross_entropy(logits, part.y, reduction="sum"))
            right += int((logits.argmax(1) == part.y).sum())
    count = len(test)
    return {
        "steps": steps,
        "seconds_per_step": spent / steps,
        "inner_iterations": iterations / steps,
        "test_loss": loss / count,
        "test_accuracy": right / count,
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = os.environ.get("HYPEROPT_DATA", str(REPOSITORY / default_root()))
    splits = CIFAR10(train=options.train, val=0, seed=0, root=root).load()
    test = splits.test.take(slice(options.test))
    table = []
    for name, (solver, adjoint) in ADJOINTS.items():
        table.append({**vars(options), "name": name, **measure(solver, adjoint, splits.train, test, options.seconds)})
        print(table[-1], flush=True)
        write("budget", table)


if __name__ == "__main__":
    main()

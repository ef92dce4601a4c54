"""What a linear solve costs beside its arithmetic: kernels, host reads and memory, counted; the same on every machine."""

import pytest
import torch
from counting import Counter, per_iteration

from hyperopt import CG, GMRES, MINRES, BiCGStab, NormalCG
from hyperopt.core.operator import FunctionOperator

pytestmark = pytest.mark.usefixtures("float64")

# Kernels and host reads an iteration to a tolerance, a product of three kernels included, and all that the solve does beside.
BUDGETS = {CG: (20, 0.5), MINRES: (20, 0.5), BiCGStab: (30, 1), GMRES: (45, 0.5), NormalCG: (25, 0.5)}
# Kernels of a fixed number of steps: the method's own algebra and 1 more.
FIXED = {CG: 10, MINRES: 13, BiCGStab: 20, GMRES: 26, NormalCG: 16}


def product(dim):
    """``v -> v M`` with ``M`` symmetric, in three kernels."""
    q = torch.linalg.qr(torch.randn(dim, dim))[0]
    m = (q * torch.linspace(-0.3, 0.8, dim)) @ q.T
    return FunctionOperator(lambda v: (v @ m) * 1.0 + 0.0, symmetric=True)


@pytest.mark.parametrize("rows", [32, 1000])
@pytest.mark.parametrize("kind", BUDGETS, ids=lambda kind: kind.__name__)
def test_kernels_and_reads_of_a_solve_to_a_tolerance(kind, rows):
    op, b = product(20), torch.randn(rows, 20)
    with torch.no_grad():
        kernels, reads, names = per_iteration(lambda: kind(rtol=1e-6).solve(op, b).stats)
    most_kernels, most_reads = BUDGETS[kind]
    assert kernels <= most_kernels and reads <= most_reads, (kernels, reads, names)


@pytest.mark.parametrize("kind", FIXED, ids=lambda kind: kind.__name__)
def test_a_fixed_number_of_steps_reads_nothing(kind):
    op, b = product(20), torch.randn(32, 20)
    found = []
    for steps in (5, 15):
        with torch.no_grad(), Counter() as count:
            kind(0, 0, steps).solve(op, b)
        assert count.reads == 0
        found.append(count.kernels)
    assert (found[1] - found[0]) / 10 <= FIXED[kind] + 1 + (kind is CG)  # its test of symmetry is not at every step

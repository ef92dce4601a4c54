"""Trap 17: one mean in the loss, and every derivative is the whole problem's, on every rank alike."""

import socket
from pathlib import Path

import pytest
import torch
from rank_cases import naive, results
from ranks import run_ranks

import hyperopt
from hyperopt.core import distributed

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # PyTorch's own, on the first jvp
CASES = Path(__file__).parents[1].joinpath("rank_cases.py")


@pytest.fixture(scope="module")
def one():
    return results(0, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    run_ranks(CASES, 2, folder)
    return [torch.load(out, weights_only=True) for out in outs]


NAMES = [
    *(f"equilibrium, {way}{order}" for way in ("args", "closure") for order in ("", ", second")),
    *(f"trained, {name}" for name in ("implicit", "unrolled", "checkpointed", "t1t2")),
    *("map, implicit", "map, unrolled", "jvp", "hessian"),
]


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_ranks_agree(one, two, name):
    expected, (first, second) = one[name], [found["results"][name] for found in two]
    assert float(expected.norm()) > 1e-3
    assert torch.equal(first, second)  # ranks that drift apart end in different numbers of iterations, and hang
    assert float((first - expected).norm() / expected.norm()) < 1e-12


def test_every_case_is_compared(one):
    assert set(one) == set(NAMES)


def test_a_plain_all_reduce_is_wrong(two):
    # What the case would show if the mean were a plain one: each rank its own number.
    exact = naive(0, 1)
    assert all(float((found["naive"] - exact).abs() / exact.abs()) > 0.1 for found in two)


def test_on_one_rank_it_is_the_function():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(hyperopt.mean_over_ranks(lambda w: w.square().sum(), w, rows=2), w.square().sum())


def test_a_rank_without_rows_is_refused():
    with pytest.raises(ValueError, match="rows=0 on this rank"):
        hyperopt.mean_over_ranks(lambda: torch.zeros(()), rows=0)


class Cube(torch.autograd.Function):
    """A custom function, which the mean cannot look into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_a_parameter_through_a_custom_function_is_refused_unless_given(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda value: 2 * value.detach())
    w = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(hyperopt.ClosureError, match="through a custom"):
        hyperopt.mean_over_ranks(lambda: Cube.apply(w))
    (found,) = torch.autograd.grad(hyperopt.mean_over_ranks(Cube.apply, w), w)
    assert float(found) == 12.0


def test_a_loss_that_is_one_of_its_arguments_is_a_mean_too(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda value: 2 * value.detach())
    w = torch.tensor(2.0, requires_grad=True)
    mean = hyperopt.mean_over_ranks(lambda w: w, w)
    assert (mean.item(), torch.autograd.grad(mean, w)[0].item()) == (2.0, 1.0)


def test_ranks_of_different_sizes_weigh_their_rows(monkeypatch):
    sums = []
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    # The other rank has six rows, of mean 12.
    other = torch.tensor([72.0, 6.0], dtype=torch.float64)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda value: sums.append(value) or value + other)
    mean = hyperopt.mean_over_ranks(lambda: torch.tensor(4.0, dtype=torch.float64), rows=2)
    assert float(mean) == 10.0
    assert [value.tolist() for value in sums] == [[8.0, 2.0]]  # one message: the sum over its rows, and how many they are


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(distributed.RankError, match=f"MASTER_PORT={port} is taken.*--standalone"), distributed.connected():
            pass
    assert not torch.distributed.is_initialized()

"""Weights whose tensors share memory: views with common entries are refused, other views are trained as their clones."""

from __future__ import annotations

import pytest
import torch
from bilevel_problems import DOUBLE

import hyperopt
from hyperopt import GradientDescent


def views(kind: str) -> dict[str, torch.Tensor]:
    """Weights that are views of one tensor."""
    base = torch.arange(24.0, dtype=DOUBLE).reshape(4, 6)
    flat = base.view(-1)
    return {
        "a column of it": {"a": base, "b": base[:, :1]},
        "its transpose": {"a": base, "b": base.T},
        "its diagonal": {"a": base.diagonal(), "b": base},
        "a row and a column": {"a": base[1], "b": base[:, 2]},
        "columns that overlap": {"a": base[:, :3], "b": base[:, 2:]},
        "the third of three": {"a": base[:, :2], "b": base[:, 2:4], "c": base[:, 3:5]},
        "another dtype": {"a": flat[::2], "b": base.view(torch.float32)[:, 2:3]},
        "columns": {"a": base[:, :2], "b": base[:, 2:], "c": torch.ones(2, dtype=DOUBLE)},
        "even and odd": {"a": flat[::2], "b": flat[1::2]},
        "pieces of a buffer": {"a": flat[:5], "b": flat[5:11].view(2, 3), "c": flat[11:]},
        "a hole that another fills": {"a": base[:, ::5], "b": base[1, 1:5], "c": base[2, 1:5]},
        "channels last": {"a": torch.ones(2, 3, 4, 4, dtype=DOUBLE).contiguous(memory_format=torch.channels_last), "b": flat},
    }[kind]


def squares(w: dict[str, torch.Tensor], lam: torch.Tensor, batch: None) -> torch.Tensor:
    return sum(
        ((i + 1) * (leaf.double() - lam).square().sum() for i, leaf in enumerate(w.values())), torch.zeros((), dtype=DOUBLE)
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("a column of it", "'a'.*'b'"),
        ("its transpose", "'a'.*'b'"),
        ("its diagonal", "'a'.*'b'"),
        ("a row and a column", "'a'.*'b'"),
        ("columns that overlap", "'a'.*'b'"),
        ("the third of three", "'b'.*'c'"),
        ("another dtype", "'a'.*'b'"),
    ],
)
def test_weights_that_share_entries_are_refused(kind: str, names: str) -> None:
    w = views(kind)
    with pytest.raises(ValueError, match=rf"{names}.* share a part of their memory"):
        hyperopt.Bilevel(hyperopt.BilevelProblem(squares, squares), w)


@pytest.mark.parametrize("kind", ["columns", "even and odd", "pieces of a buffer", "a hole that another fills", "channels last"])
def test_views_without_a_common_entry_are_trained_as_their_clones(kind: str) -> None:
    lam, inner = torch.tensor(0.3, dtype=DOUBLE), GradientDescent(step_size=0.05, max_steps=4)
    clones = {name: leaf.clone() for name, leaf in views(kind).items()}
    one, two = (
        hyperopt.Bilevel(hyperopt.BilevelProblem(squares, squares), w, inner=inner, adjoint=hyperopt.Unrolled()).step(lam)
        for w in (views(kind), clones)
    )
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-14, atol=0)
    assert all(torch.equal(one.w[name], two.w[name]) for name in clones) and abs(float(one.grad)) > 1e-3


@pytest.mark.parametrize(
    "leaf",
    [
        torch.ones(1, dtype=DOUBLE).expand(3),
        torch.ones(2, 1, dtype=DOUBLE).expand(2, 3),
        torch.ones(31, dtype=DOUBLE)[::10].expand(3, 4),
        torch.ones(4, dtype=DOUBLE).unfold(0, 3, 1),
        torch.ones(3, 4, dtype=DOUBLE).unfold(1, 2, 1),
    ],
    ids=["expanded", "expanded columns", "expanded with gaps", "unfolded", "unfolded rows"],
)
def test_a_tensor_whose_entries_share_memory_is_refused(leaf: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"w\['a'\] is an expanded or unfolded tensor.*give a clone"):
        hyperopt.Bilevel(hyperopt.BilevelProblem(squares, squares), {"a": leaf})


@pytest.mark.parametrize(("start", "refused"), [(0, True), (1, False)], ids=["the same entries", "those between"])
def test_hyperparameters_may_lie_between_the_weights(start: int, refused: bool) -> None:
    """Every second entry of one buffer; only a common entry is overwritten by training."""
    buffer = torch.arange(1.0, 9.0, dtype=DOUBLE) / 10
    problem = hyperopt.BilevelProblem(
        lambda w, lam, batch: (w - lam).square().sum() + w.square().sum(), lambda w, lam, batch: w.square().sum()
    )
    w, lam = buffer[::2], buffer[start::2]
    if refused:
        with pytest.raises(ValueError, match=r"lam shares memory with w"):
            hyperopt.hypergradient(problem, w, lam)
        return
    torch.testing.assert_close(hyperopt.hypergradient(problem, lam / 2, lam).grad, lam / 2, rtol=1e-10, atol=0)
    found = hyperopt.hypergradient(problem, w, lam).grad
    torch.testing.assert_close(found, hyperopt.hypergradient(problem, w.clone(), lam.clone()).grad, rtol=1e-12, atol=0)

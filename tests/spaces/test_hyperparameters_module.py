"""``Hyperparameters`` is a module: parameters, states, devices, copies, and a repr in the units of the reader."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from bilevel_problems import DOUBLE
from torch import nn

import hyperopt
from hyperopt import Bounded, Hyperparameters, Positive, Real, Simplex


def made(dtype: torch.dtype = DOUBLE, init: float = 0.1) -> Hyperparameters:
    """A number, a vector, a tree with dots in its names, and a space with fewer raw entries than values."""
    spaces = {
        "decay": Positive(init),
        "mix": Bounded(0.5, low=0, high=2, per="element"),
        "layers": Positive(init, per="element"),
        "share": Simplex(),
    }
    shapes = {"mix": (3,), "layers": dict(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).named_parameters()), "share": (4,)}
    return Hyperparameters(spaces, shapes, dtype=dtype)


NAMES = ["decay", "mix", "share", "layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.hyper = nn.Linear(2, 1), made()


def test_hyperparameters_travel_with_a_module():
    model = Model().double()
    assert {name for name, _ in model.named_parameters()} == {"net.weight", "net.bias", *(f"hyper.{name}" for name in NAMES)}
    assert {p.dtype for p in model.parameters()} == {DOUBLE}
    other = Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_are_what_values_are_computed_from():
    hyper = made()
    assert {name for name, _ in hyper.named_parameters()} == set(NAMES) == set(hyper.state_dict())
    assert {id(p) for p in hyper.parameters()} == {id(t) for group in hyper.groups().values() for t in group}
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.5)
    (3 * hyper.values()["decay"]).backward()
    optimizer.step()
    assert float(hyper.read()["decay"]) == pytest.approx(0.1 * torch.tensor(-0.15, dtype=DOUBLE).exp().item())
    assert hyper().keys() == hyper.values().keys()


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.float32)])
def test_conversion_keeps_values_and_structure(change):
    hyper = made()
    before = hyper.read()
    assert change(hyper) is hyper
    after = hyper.read()
    assert {leaf.dtype for leaf in hyper.parameters()} == {torch.float32}
    assert list(after["layers"]) == list(before["layers"])
    for name in ("decay", "mix", "share"):
        torch.testing.assert_close(after[name].double(), before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _saved(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_apart(twin):
    hyper = made()
    again = twin(hyper)
    assert repr(again) == repr(hyper) and isinstance(again, Hyperparameters)
    with torch.no_grad():
        again.raw["decay"].add_(1.0)
        again.raw["layers"]["0.bias"].add_(1.0)
    assert float(hyper.read()["decay"]) == pytest.approx(0.1)
    assert float(again.read()["decay"]) == pytest.approx(0.1 * torch.tensor(1.0, dtype=DOUBLE).exp().item())
    assert torch.equal(hyper.raw["layers"]["0.bias"], made().raw["layers"]["0.bias"])


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_state_is_read_with_weights_only():
    hyper, buffer = made(), io.BytesIO()
    torch.save(hyper.state_dict(), buffer)
    buffer.seek(0)
    again = made(init=0.7)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert repr(again) == repr(hyper)


def test_a_state_of_an_older_checkpoint():
    """A list of tensors for each hyperparameter."""
    hyper, again = made(init=0.3), made()
    old = {name: [leaf.detach().clone() for leaf in group] for name, group in hyper.groups().items()}
    again.load_state_dict(old)
    assert repr(again) == repr(hyper)
    before = repr(again)
    for change in (
        {**old, "layers": old["layers"][:-1]},
        {**old, "mix": [torch.zeros(2, dtype=DOUBLE)]},
        {name: kept for name, kept in old.items() if name != "mix"},
        {**old, "mxi": old["mix"]},
    ):
        with pytest.raises(ValueError, match="the state for Hyperparameters"):
            again.load_state_dict(change)
    assert repr(again) == before


WRONG = {
    "a vector for a number": (
        {"decay": torch.zeros(3, dtype=DOUBLE)},
        r"entry decay has shape \(3,\), but here it has shape \(\)",
    ),
    "one entry for a number": ({"decay": torch.zeros(1, dtype=DOUBLE)}, r"entry decay has shape \(1,\)"),
    "a number for a vector": ({"mix": torch.zeros((), dtype=DOUBLE)}, r"entry mix has shape \(\), but here it has shape \(3,\)"),
    "a longer vector": ({"mix": torch.zeros(4, dtype=DOUBLE)}, r"entry mix has shape \(4,\)"),
    "values instead of raw variables": ({"share": torch.ones(4, dtype=DOUBLE) / 4}, r"entry share has shape \(4,\).*\(3,\)"),
    "whole numbers": ({"mix": torch.zeros(3, dtype=torch.int64)}, "entry mix has dtype torch.int64"),
    "no tensor": ({"mix": 0.5}, "entry mix is a float"),
    "an unknown name": ({"decya": torch.zeros((), dtype=DOUBLE)}, "unknown entry 'decya'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_state_of_another_shape(name):
    changed, message = WRONG[name]
    hyper, state = made(), dict(made(init=0.4).state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        hyper.load_state_dict({**state, **changed})
    assert repr(hyper) == repr(made())  # nothing was taken, whatever came before the entry
    del state["mix"]
    with pytest.raises(ValueError, match="has no entry 'mix'"):
        hyper.load_state_dict(state)
    hyper.load_state_dict(state, strict=False)
    assert float(hyper.read()["decay"]) == pytest.approx(0.4)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "an unknown name"])
def test_state_of_another_shape_within_a_module(name):
    """Where torch itself takes the first entry of a vector for a number."""
    changed, message = WRONG[name]
    model = Model()
    state = {**model.state_dict(), **{f"hyper.{key}": value for key, value in changed.items()}}
    with pytest.raises((TypeError, ValueError), match=message):
        model.load_state_dict(state)
    assert repr(model.hyper) == repr(made())


def test_a_state_in_float64_does_not_go_into_float32_without_a_word():
    with pytest.raises(ValueError, match=r"torch.float64, which torch.float32 cannot hold exactly"):
        made(torch.float32).load_state_dict(made().state_dict())
    high = made()
    high.load_state_dict(made(torch.float32, 0.3).state_dict())
    assert float(high.read()["decay"]) == pytest.approx(0.3)


def test_repr_in_the_units_of_the_reader():
    assert repr(made()).splitlines() == [
        "Hyperparameters(",
        "  decay = 0.1 in (0, inf)",
        "  mix = 0.5 to 0.5, mean 0.5 (shape (3,)) in (0, 2)",
        "  layers = 0.1 to 0.1, mean 0.1 (4 tensors) in (0, inf)",
        "  share = 0.25 to 0.25, mean 0.25 (shape (4,)) in the simplex (entries above 0 that sum to 1)",
        ")",
    ]
    assert "(hyper): Hyperparameters(" in repr(Model())


@pytest.mark.parametrize("name", ["values", "raw", "spaces", "read", "training", "forward", "a.b", "décay"])
def test_any_name_will_do(name):
    hyper = Hyperparameters({name: Positive(0.5)}, dtype=DOUBLE)
    assert float(hyper.read()[name]) == pytest.approx(0.5) and list(hyper.state_dict()) == [name]
    again = Hyperparameters({name: Positive(0.1)}, dtype=DOUBLE)
    again.load_state_dict(hyper.state_dict())
    again.float().double()
    assert float(again.read()[name]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "init", [[1.0, 2.0, 0.5], torch.tensor([1.0, 2.0, 0.5]), np.array([1.0, 2.0, 0.5])], ids=["list", "tensor", "array"]
)
def test_without_a_shape_it_is_that_of_the_initial_value(init):
    hyper = hyperopt.Hyperparameters({"a": hyperopt.Positive(init, per="element"), "b": hyperopt.Simplex([0.2, 0.8])})
    torch.testing.assert_close(hyper.values()["a"], torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(hyper.values()["b"], torch.tensor([0.2, 0.8]))
    with pytest.raises(ValueError, match=r"^space.a.init has shape \(3,\), but space.a.per='tensor' .* give per='element'"):
        hyperopt.Hyperparameters({"a": hyperopt.Positive(init)})


def test_names_that_overlap_are_refused():
    for spaces, shapes in (
        ({"a": Real(per="element"), "a.b": Real()}, {"a": {"b": torch.zeros(2)}}),
        ({"a": Real(), "a.b": Real()}, {}),
        ({"a.b": Real(), "a": Real()}, {}),
    ):
        with pytest.raises(ValueError, match=r"two hyperparameters overlap at 'a"):
            Hyperparameters(spaces, shapes)
    with pytest.raises(TypeError, match=r"space\.a is a float; give a space"):
        Hyperparameters({"a": 0.5})  # pyright: ignore[reportArgumentType]


def test_a_hypergradient_of_a_module_within_a_module():
    """``w* = decay``, ``dE/draw = (decay - 3) decay``, and after one step the value has moved by it."""
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (w - lam["decay"]).square().sum() / 2, lambda w, lam, b: (w - 3).square().sum() / 2
    )
    model = Model().double()
    optimizer = torch.optim.SGD(model.hyper.parameters(), lr=0.1)
    lam = model.hyper.values()
    hyperopt.hypergradient(problem, torch.full((1,), 0.1, dtype=DOUBLE), lam).backward(lam)
    raw = model.hyper.raw["decay"]
    assert raw.grad is not None and float(raw.grad) == pytest.approx(-0.29)
    optimizer.step()
    assert float(raw.detach()) == pytest.approx(torch.tensor(0.1, dtype=DOUBLE).log().item() + 0.029)


def test_frozen_hyperparameters_get_no_gradient():
    hyper = Hyperparameters({"a": Real(1.0), "b": Real(1.0)}, dtype=DOUBLE)
    hyper.raw["b"].requires_grad_(False)
    problem = hyperopt.BilevelProblem(
        lambda w, lam, b: (w - lam["a"] - lam["b"]).square().sum(), lambda w, lam, b: (w - 3).square().sum() / 2
    )
    lam = hyper.values()
    hyperopt.hypergradient(problem, torch.full((1,), 2.0, dtype=DOUBLE), lam).backward(lam)
    assert hyper.raw["b"].grad is None and float(hyper.raw["a"].grad) == pytest.approx(-1.0)


def test_raw_variables_are_changed_in_place_and_not_replaced():
    hyper = made()
    with pytest.raises(TypeError, match="does not support item assignment"):
        hyper.raw["decay"] = torch.zeros(())  # pyright: ignore[reportIndexIssue]

"""What a ``Tuner`` refuses: one sentence each, in the words of its arguments, before anything is moved."""

from __future__ import annotations

import copy
from typing import Any

import optree
import pytest
import torch
from test_tuner import TRAIN, VAL, reference, train, tuner_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from tuner_reference import DOUBLE, assert_close, fit, hyperparameters, mlp, regularised

import hyperopt


def same(one: Any, other: Any) -> bool:
    leaves = [optree.tree_leaves(x) for x in (one, other)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


def refused(words: str, kind: Any = (TypeError, ValueError, RuntimeError), steps: int = 0, **changes: Any) -> None:
    """A step is refused with these words, nothing is moved, and a sound step is possible afterwards."""
    model = changes.pop("model", None) or mlp()
    data = changes.pop("data", (TRAIN, VAL))
    batches = changes.pop("batches", None)
    tuner = tuner_of(model, **changes)
    before = copy.deepcopy((model.state_dict(), tuner.state_dict()))
    modes = [m.training for m in model.modules()]
    with pytest.raises(kind, match=words) as caught:
        tuner.step(*data, batches=batches)
    said = str(caught.value)
    assert "\n" not in said and "inner_loss" not in said and "the inner loss" not in said and "_Called" not in said
    assert same(before, (model.state_dict(), tuner.state_dict()))
    assert tuner.steps == 0 and [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in tuner.hyper.parameters())


# ---- losses


@pytest.mark.parametrize(
    "loss", [fit, lambda m, b, lam: fit(m, b, lam) + lam["decay"], lambda m, b, lam: fit(m, b, lam) + 0 * lam["decay"].detach()]
)
def test_a_training_loss_that_does_not_depend_on_the_hyperparameters(loss: Any) -> None:
    refused(
        "val_loss does not depend on .*decay.*neither directly nor through the minimum of train_loss", ValueError, train_loss=loss
    )


def test_a_decay_that_the_optimizer_applies_is_told_to_be_a_penalty() -> None:
    """A script that writes a hyperparameter into the groups of its optimizer; with the penalty in its place it is exact."""

    def trained(tuner: hyperopt.Tuner, optimizer: torch.optim.Optimizer, applied: bool) -> hyperopt.Tuner:
        for group in optimizer.param_groups:
            group["weight_decay"] = 2 * float(tuner.hyper.read()["decay"]) if applied else 0.0
        train(tuner, optimizer, 2)
        return tuner

    model = mlp()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"Use lam in one of the losses\. The weight decay of an optimizer is a constant: write"):
        trained(tuner_of(model, train_loss=fit), optimizer, True).step(TRAIN, VAL)
    tuner = trained(tuner_of(model), optimizer, False)
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_a_hyperparameter_that_no_loss_uses_is_named() -> None:
    tuner = tuner_of(
        mlp(), train_loss=lambda m, b, lam: fit(m, b, lam) + lam["decay"] * sum(p.square().sum() for p in m.parameters())
    )
    record = tuner.step(TRAIN, VAL)
    assert record.estimate.unused == ("lam['bias']",) and "bias" in str(record).partition("unused")[2]
    assert float(record.grad["bias"]) == 0 and float(record.grad["decay"]) != 0


def test_hyperparameters_of_the_validation_loss_alone_are_fine() -> None:
    model = mlp()
    tuner = tuner_of(
        model, train_loss=fit, val_loss=lambda m, b, lam: (lam["decay"] * m(b[0]) + lam["bias"] - b[1]).square().mean()
    )
    with torch.no_grad():
        out, lam = model(VAL[0]), tuner.hyper.read()
        expected = 2 * ((lam["decay"] * out + lam["bias"] - VAL[1]) * out).mean()
    assert float(tuner.step(TRAIN, VAL).grad["decay"]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda m, b, lam: lam["decay"] * b[1].square().mean(), "does not depend on the parameters of the model"),
        (lambda m, b, lam: lam["decay"] + fit(m, b, lam).detach(), "does not depend on the parameters of the model"),
        (lambda m, b, lam: torch.tensor(fit(m, b, lam).item()), "does not depend on the parameters of the model"),
        (
            lambda m, b, lam: (m(b[0]) - b[1]).square() * lam["decay"],
            r"returned a tensor of shape \(\d+, 1\); it must be a scalar",
        ),
        (lambda m, b, lam: float(fit(m, b, lam).detach()), "returned a float; it must return a tensor"),
        (lambda m, b, lam: None, "returned a NoneType"),
        (lambda m, b, lam: fit(m, b, lam) * lam["decay"] * float("nan"), "is nan on a batch"),
        (lambda m, b, lam: fit(m, b, lam) / (0 * lam["decay"]), "is inf on a batch"),
    ],
)
def test_losses_that_are_none(name: str, loss: Any, words: str) -> None:
    refused(f"{name} {words}", **{name: loss})


def test_a_loss_that_reads_the_hyperparameters_itself() -> None:
    hyper = hyperparameters()
    refused(
        "train_loss reads decay from the Hyperparameters object.*use its argument lam",
        hyper=hyper,
        train_loss=lambda m, b, lam: regularised(m, b, lam) + hyper.values()["decay"] * m[0].weight.square().sum(),
    )


def test_a_loss_that_changes_its_batch() -> None:
    def loss(m: Any, b: Any, lam: Any) -> torch.Tensor:
        b[0].mul_(2.0)
        return regularised(m, b, lam)

    before = TRAIN[0].clone()
    refused("in place", train_loss=loss)
    TRAIN[0].copy_(before)


# ---- data


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    "given, batches, words",
    [
        (DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, 1)), 4), None, "train is a DataLoader without batches"),
        (DataLoader(TensorDataset(*TRAIN), 100, drop_last=True), None, "train is a DataLoader without batches"),
        (DataLoader(Stream()), None, "train is a DataLoader without batches"),
        (TensorDataset(torch.zeros(0, 4)), None, "train is a dataset without rows"),
        ([], None, "train is an empty list"),
        (iter([]), None, "train is an iterator with 0 batches left, but 1 are needed"),
        (iter([TRAIN]), 2, "train is an iterator with 1 batches left, but 2 are needed"),
        (
            (torch.zeros(0, 4, dtype=DOUBLE), torch.zeros(0, 1, dtype=DOUBLE)),
            None,
            "train_loss: the batch has no rows.*training set",
        ),
        (TRAIN, 2, "train is one batch, but batches=2"),
        (list(TRAIN), 2, "train is one batch, but batches=2"),
        ([TRAIN, TRAIN], 3, "train is a list of 2 batches, but batches=3"),
        (["a", "b"], None, "train is a list of str, which could be one batch or several"),
        ({1, 2}, None, "train is a set, which could be one batch or several"),
        (TRAIN, 0, "batches=0 must be a whole number >= 1"),
        (TRAIN, 1.5, "batches=1.5 must be a whole number"),
        (TRAIN, True, "batches=True must be a whole number"),
        (TRAIN, (1, 2, 3), r"batches=\(1, 2, 3\) must be"),
    ],
)
def test_data_that_are_none(given: Any, batches: Any, words: str) -> None:
    counts = (batches, 1) if type(batches) is int and batches else batches
    refused(words, data=(given, VAL), batches=counts)


def test_a_step_that_is_refused_uses_no_batch_up() -> None:
    seen: list[float] = []
    factor = [1.0]

    def loss(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        seen.append(float(batch[0][0, 0]))
        return regularised(m, batch, lam) * factor[0]

    model, generator = mlp(), torch.Generator().manual_seed(7)
    tuner = tuner_of(model, train_loss=loss)
    loader = DataLoader(TensorDataset(*TRAIN), 5, shuffle=True, generator=generator)
    for batches in (None, (2, 1), (3, 1)):
        tuner.step(loader, VAL)
        state, factor[0] = tuner.state_dict(), float("nan")
        seen.clear()
        with pytest.raises(ValueError, match="train_loss is nan"):
            tuner.step(loader, VAL, batches=batches)
        assert same(state, tuner.state_dict())
        factor[0] = 1.0
        tuner.step(loader, VAL, batches=batches)
        count = 1 if batches is None else batches[0]
        assert seen[:count] == seen[count : 2 * count]


def test_an_empty_validation_set_is_called_so() -> None:
    refused("val is a DataLoader without batches", data=(TRAIN, DataLoader(TensorDataset(torch.zeros(0, 4)), 4)))
    refused("val_loss.*validation set", data=(TRAIN, (torch.zeros(0, 4, dtype=DOUBLE), torch.zeros(0, 1, dtype=DOUBLE))))


# ---- the module


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * ctx.saved_tensors[0].cos()


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_a_function_that_is_differentiable_once() -> None:
    refused("once_differentiable|no second derivative", RuntimeError, model=mlp(between=[Calls(Once.apply)]))


def test_a_kernel_without_a_second_derivative() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.end = nn.EmbeddingBag(7, 4, mode="max", dtype=DOUBLE), nn.Linear(4, 1, dtype=DOUBLE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = torch.arange(len(x)) % 7
            return self.end(torch.tanh(self.bag(index, torch.arange(len(x)))))

    refused("train_loss uses .*, which has no second derivative", RuntimeError, model=Bag())


def test_finite_differences_need_no_second_derivative() -> None:
    torch.manual_seed(0)
    plain, once = mlp(between=[Calls(torch.sin)]), mlp(between=[Calls(Once.apply)])
    expected = tuner_of(plain).step(TRAIN, VAL).grad
    hyper = hyperparameters()
    found = tuner_of(once, hyper=hyper, adjoint=hyperopt.FiniteDifference()).step(TRAIN, VAL).grad
    assert float(found["decay"]) * float(expected["decay"]) > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_on_the_cpu_have_second_derivatives(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.end = kind(1, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.net(x[..., None])[0][:, -1])

    from tuner_reference import assert_close, exact

    torch.manual_seed(0)
    model = Recurrent().double()
    tuner = tuner_of(model)
    expected = exact(model, tuner.hyper.read(), lambda c, lam: regularised(c, TRAIN, lam), lambda c, lam: fit(c, VAL, lam))
    assert_close(tuner.step(TRAIN, VAL).grad, expected, 1e-7)
    model(TRAIN[0])  # its own weights are back
    assert all(a is b for a, b in zip(model.net._flat_weights, model.net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_lazy_modules_and_modules_without_weights() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    for model, words in (
        (lazy, "0.weight.* of the model have no size yet: call the module once"),
        (mlp().requires_grad_(False), "no parameter of the model requires grad"),
        (nn.Tanh(), "no parameter of the model requires grad"),
        (mlp().half(), "0.weight has dtype torch.float16.*keep the weights in float32"),
        (torch.jit.script(nn.Linear(2, 1)), "torch.jit"),
    ):
        with pytest.raises(ValueError, match=words):
            tuner_of(model)


def test_weights_that_nothing_trains_are_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = mlp(), nn.Linear(1, 1).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    refused(
        r"val_loss depends on the model's parameter two\.\w+, but train_loss does not: .*freeze it",
        ValueError,
        model=Two(),
        train_loss=lambda m, b, lam: regularised(m.one, b, lam),
    )


# ---- arguments


def test_arguments_that_do_not_fit() -> None:
    model, hyper = mlp(), hyperparameters()
    outer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    good: dict[str, Any] = {"train_loss": regularised, "val_loss": fit, "optimizer": outer}
    some = torch.optim.SGD([hyper.raw["decay"]], lr=0.1)
    both = torch.optim.SGD([*hyper.parameters(), *model.parameters()], lr=0.1)
    stray = torch.optim.SGD([*hyper.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    for changes, words in (
        ({"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, "optimizer does not hold decay, bias of hyper"),
        ({"optimizer": some}, "optimizer does not hold bias of hyper"),
        ({"optimizer": both}, r"optimizer holds .*0\.weight.* beside the hyperparameters"),
        ({"optimizer": stray}, "optimizer holds other tensors beside"),
        ({"optimizer": torch.optim.SGD}, "is not a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.LBFGS(hyper.parameters())}, "optimizer is LBFGS"),
        ({"train_loss": None}, "train_loss is a NoneType; it must be a function"),
        ({"val_loss": 3.0}, "val_loss is a float; it must be a function"),
        ({"train_loss": lambda model, batch, lam, more: 0}, r"train_loss\(model, batch, lam\), but takes other arguments"),
        ({"val_loss": lambda model, batch: 0}, r"val_loss is called val_loss\(model, batch, lam\), but takes other arguments"),
        ({"adjoint": "exact"}, "adjoint='exact' is not an adjoint"),
        ({"adjoint": hyperopt.Unrolled()}, "Unrolled differentiates training"),
        ({"adjoint": hyperopt.SOBA()}, "adjoint=SOBA trains the weights itself"),
        ({"trained_by": 3}, "trained_by"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            hyperopt.Tuner(model, hyper, **{**good, **changes})
    with pytest.raises(TypeError, match=r"hyper is a dict; give one such as hyperopt\.Hyperparameters"):
        hyperopt.Tuner(model, {"decay": 1.0}, **good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="model is a function"):
        hyperopt.Tuner(fit, hyper, **good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="trained_by holds none of the model's parameters"):
        hyperopt.Tuner(model, hyper, trained_by=outer, **good)


def test_frozen_hyperparameters() -> None:
    hyper = hyperparameters()
    hyper.requires_grad_(False)
    refused("no hyperparameter requires grad", ValueError, hyper=hyper)
    hyper = hyperparameters()
    hyper.raw["bias"].requires_grad_(False)
    tuner = tuner_of(mlp(), hyper=hyper)
    before = {name: float(value) for name, value in hyper.read().items()}
    tuner.step(TRAIN, VAL)
    after = {name: float(value) for name, value in hyper.read().items()}
    assert after["bias"] == before["bias"] and after["decay"] != before["decay"]


# ---- states


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    tuner = tuner_of(mlp())
    train(tuner, torch.optim.SGD(tuner.model.parameters(), lr=0.1), 1)
    tuner.step(TRAIN, VAL)
    good = tuner.state_dict()
    other = hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.3)}, dtype=DOUBLE)
    for state, words in (
        ({k: v for k, v in good.items() if k != "memory"}, "no entry 'memory'"),
        ({**good, "more": 1}, "unknown entry 'more'"),
        ({**good, "hyper": other.state_dict()}, "'bias'"),
        (
            {**good, "optimizer": torch.optim.SGD([torch.zeros(1), torch.zeros(1)][:1], lr=1.0).state_dict()},
            "optimizer|parameter group",
        ),
        (None, "state of Tuner is a NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            tuner.load_state_dict(state)  # pyright: ignore[reportArgumentType]
        assert same(good, tuner.state_dict())


def test_a_place_in_another_data_set_is_refused_by_name() -> None:
    tuner = tuner_of(mlp())
    tuner.step(DataLoader(TensorDataset(*TRAIN), 6), VAL)
    other = tuner_of(mlp())
    other.load_state_dict(tuner.state_dict())
    with pytest.raises(ValueError, match="train has 3 batches an epoch, but its state was saved with 4"):
        other.step(DataLoader(TensorDataset(*TRAIN), 8), VAL)

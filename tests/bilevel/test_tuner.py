"""``hyperopt.Tuner`` beside a training loop of the user's: its hypergradient is exact in every way that people train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tuner_reference import DOUBLE, EXACT, assert_close, data, exact, fit, hyperparameters, mlp, regularised

import hyperopt

TRAIN, VAL = data(), data(16, seed=1)


def tuner_of(model: nn.Module, **changes: Any) -> hyperopt.Tuner:
    hyper = changes.pop("hyper", None) or hyperparameters()
    given: dict[str, Any] = {"train_loss": regularised, "val_loss": fit, "adjoint": EXACT}
    given["optimizer"] = torch.optim.SGD(hyper.parameters(), lr=0.1)
    return hyperopt.Tuner(model, hyper, **{**given, **changes})


def train(tuner: hyperopt.Tuner, optimizer: torch.optim.Optimizer, steps: int = 30, batch: Any = TRAIN) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.loss(batch).backward()
        optimizer.step()


def reference(model: nn.Module, tuner: hyperopt.Tuner, decay: Any = 0.0, **given: Any) -> dict[str, torch.Tensor]:
    """Of ``regularised`` with a penalty that an optimizer adds: ``decay`` for all parameters, or for each by name."""

    def inner(call: Any, lam: Any) -> torch.Tensor:
        each: Any = decay if isinstance(decay, dict) else dict.fromkeys(dict(model.named_parameters()), decay)
        return regularised(call, TRAIN, lam) + sum(each.get(n, 0.0) / 2 * p.square().sum() for n, p in call.named_parameters())

    return exact(model, tuner.hyper.read(), inner, lambda call, lam: fit(call, VAL, lam), **given)


# ---- what is trained


@pytest.mark.parametrize("trained", [False, True])
def test_the_hypergradient_is_the_exact_one(trained: bool) -> None:
    model = mlp()
    tuner = tuner_of(model)
    if trained:
        train(tuner, torch.optim.SGD(model.parameters(), lr=0.3))
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_it_is_the_derivative_of_training_anew() -> None:
    model = mlp()
    start = copy.deepcopy(model.state_dict())

    def retrained(decay: float) -> tuple[hyperopt.Tuner, float]:
        model.load_state_dict(start)
        tuner = tuner_of(model, hyper=hyperparameters(decay))
        train(tuner, torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.1), 300)
        with torch.no_grad():
            return tuner, float(fit(model, VAL, {}))

    slope = (retrained(0.301)[1] - retrained(0.299)[1]) / 0.002
    found = retrained(0.3)[0].step(TRAIN, VAL).grad["decay"]
    assert float(found) == pytest.approx(slope, rel=1e-4)


def test_frozen_parameters_are_constants_and_are_read_anew_at_each_step() -> None:
    model = mlp()
    tuner = tuner_of(model)
    model[0].requires_grad_(False)
    first = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, first)
    model[0].requires_grad_(True)
    second = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, second)
    assert abs(float(first["decay"]) / float(second["decay"]) - 1) > 0.01


def test_tied_parameters_are_one_variable() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.leave.weight = self.enter.weight
            self.end = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(torch.tanh(self.leave(torch.tanh(self.enter(x)))))

    torch.manual_seed(1)
    model = Tied().double()
    tuner = tuner_of(model)
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_parameters_that_the_loss_keeps_in_a_list_are_the_weights() -> None:
    model = mlp()
    kept = [p for p in model.parameters() if p.dim() > 1]
    own = dict(model.named_parameters())

    def loss(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        bias = own["0.bias"].square().sum() + own["2.bias"].square().sum()
        return fit(m, batch, lam) + lam["decay"] * sum(p.square().sum() for p in kept) + lam["bias"] * bias

    tuner = tuner_of(model, train_loss=loss)
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_a_loss_may_call_the_module_by_a_name_of_its_own() -> None:
    model = mlp()
    tuner = tuner_of(
        model,
        train_loss=lambda m, batch, lam: regularised(model, batch, lam),
        val_loss=lambda m, batch, lam: fit(model, batch, lam),
    )
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_hyperparameters_inside_of_the_module_are_no_weights() -> None:
    model = mlp()
    expected = reference(model, tuner_of(model))
    model.hyper = hyperparameters()
    tuner = tuner_of(
        model,
        hyper=model.hyper,
        train_loss=lambda m, batch, lam: regularised(m[:-1] if len(m) > 3 else m, batch, lam),
        val_loss=lambda m, batch, lam: fit(m[:-1] if len(m) > 3 else m, batch, lam),
    )
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


# ---- the optimizer that trains


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_weight_decay_of_the_training_optimizer_is_a_part_of_the_inner_loss(make: Any) -> None:
    model = mlp()
    tuner = tuner_of(model)
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.7)
    train(tuner, optimizer, 3)
    expected, without = reference(model, tuner, 0.7), reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    assert abs(float(expected["decay"]) / float(without["decay"]) - 1) > 0.1


def test_each_parameter_group_has_its_own_decay() -> None:
    model = mlp()
    tuner = tuner_of(model)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.9}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.2, momentum=0.5)
    train(tuner, optimizer, 3)
    expected = reference(model, tuner, {"0.weight": 0.9, "0.bias": 0.9, "2.weight": 0.2, "2.bias": 0.2})
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    optimizer.param_groups[0]["weight_decay"] = 0.0  # a schedule of the user's: read at the step
    expected = reference(model, tuner, {"2.weight": 0.2, "2.bias": 0.2})
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_a_decay_of_the_weights_alone_is_none_of_the_biases() -> None:
    """As most recipes have it. Names in the order of the module are not names in the order of the alphabet."""
    for decayed in ("weight", "bias"):
        model = mlp()
        tuner = tuner_of(model)
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if name.endswith(decayed)], "weight_decay": 0.8},
            {"params": [p for name, p in named.items() if not name.endswith(decayed)], "weight_decay": 0.0},
        ]
        train(tuner, torch.optim.SGD(groups, lr=0.1), 3)
        expected = reference(model, tuner, {f"0.{decayed}": 0.8, f"2.{decayed}": 0.8})
        assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_two_optimizers_train_one_model() -> None:
    model = mlp()
    tuner = tuner_of(model)
    one = torch.optim.SGD(model[0].parameters(), lr=0.1, weight_decay=0.4)
    two = torch.optim.Adam(model[2].parameters(), lr=0.1, weight_decay=0.1)
    train(tuner, one, 3)
    train(tuner, two, 3)
    expected = reference(model, tuner, {"0.weight": 0.4, "0.bias": 0.4, "2.weight": 0.1, "2.bias": 0.1})
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_parameters_that_no_optimizer_holds_are_constants() -> None:
    model = mlp()
    tuner = tuner_of(model)
    train(tuner, torch.optim.SGD(model[2].parameters(), lr=0.1), 3)
    expected = reference(model, tuner, names=["2.weight", "2.bias"])
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


@pytest.mark.parametrize("given", [False, True])
def test_a_group_with_a_learning_rate_of_zero_is_constant_until_it_moves(given: bool) -> None:
    """Gradual unfreezing. Where a schedule begins or ends at zero for all groups, their weights are trained ones."""
    model = mlp()
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "lr": 0.0} for layer in (model[0], model[2])], lr=0.1)
    tuner = tuner_of(model, **({"trained_by": optimizer} if given else {}))
    for rates, names in (((0.0, 0.1), ["2.weight", "2.bias"]), ((0.1, 0.1), None), ((0.0, 0.0), None)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        train(tuner, optimizer, 2)
        expected = reference(model, tuner, names=names)
        assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_the_optimizer_may_be_named_before_it_steps() -> None:
    model = mlp()
    tuner = tuner_of(model, trained_by=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.6))
    expected = reference(model, tuner, 0.6)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_the_latest_optimizer_counts() -> None:
    model = mlp()
    tuner = tuner_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.6)
    train(tuner, optimizer, 2)
    tuner.step(TRAIN, VAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    train(tuner, optimizer, 2)
    expected = reference(model, tuner, 0.1)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


def test_an_optimizer_that_is_gone_is_remembered() -> None:
    model = mlp()
    tuner = tuner_of(model)
    train(tuner, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.6), 2)
    expected = reference(model, tuner, 0.6)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01), "AdamW with weight_decay=0.01 shrinks the weights outside"),
        (lambda p: torch.optim.SGD(p, lr=0.01, maximize=True), "maximize=True climbs train_loss"),
        (lambda p: torch.optim.ASGD(p, lr=0.01), "lambd=0.0001 shrinks"),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True), "weight_decay=0.1 shrinks"),
    ],
)
def test_an_optimizer_that_follows_no_gradient_is_refused_at_the_step_and_not_in_training(make: Any, words: str) -> None:
    model = mlp()
    tuner = tuner_of(model)
    optimizer = make(model.parameters())
    train(tuner, optimizer, 2)
    with pytest.raises(ValueError, match=words):
        tuner.step(TRAIN, VAL)
    assert tuner.steps == 0


def test_an_optimizer_of_an_unknown_kind_with_weight_decay_is_refused_and_one_without_is_not() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any, weight_decay: float) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay})

        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p -= 0.1 * p.grad

    model = mlp()
    tuner = tuner_of(model)
    optimizer = Own(model.parameters(), 0.0)
    train(tuner, optimizer, 2)
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"Own with weight_decay=0\.1"):
        tuner.step(TRAIN, VAL)


def test_adamw_without_decay_is_adam() -> None:
    model = mlp()
    tuner = tuner_of(model)
    train(tuner, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0), 2)
    expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)


# ---- how a training step is made


def test_accumulation_and_clipping_change_nothing_of_the_hypergradient() -> None:
    model = mlp()
    tuner = tuner_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        for part in range(2):
            (tuner.loss((TRAIN[0][part::2], TRAIN[1][part::2])) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    tuner.loss(TRAIN).backward()  # a gradient that is under way stays
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = reference(model, tuner, 0.2)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad is not None)


@pytest.mark.parametrize("around", [False, True])
def test_under_autocast_the_hypergradient_is_that_of_full_precision(around: bool) -> None:
    model = mlp().float()
    batch, val = (tuple(t.float() for t in pair) for pair in (TRAIN, VAL))

    def autocast(loss: Any) -> Any:
        def cast(m: Any, b: Any, lam: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(m, b, lam)

        return loss if around else cast

    hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.3), "bias": hyperopt.Positive(0.2)})
    adjoint = hyperopt.Implicit(hyperopt.GMRES(rtol=1e-5, max_steps=300, window=300))
    tuner = tuner_of(model, hyper=hyper, train_loss=autocast(regularised), val_loss=autocast(fit), adjoint=adjoint)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        train(tuner, torch.optim.SGD(model.parameters(), lr=0.1), 3, batch)
        assert tuner.loss(batch).item() != regularised(model.double(), TRAIN, hyper.read()).item()
        expected = exact(
            model,
            {k: v.double() for k, v in hyper.read().items()},
            lambda c, lam: regularised(c, TRAIN, lam),
            lambda c, lam: fit(c, VAL, lam),
        )
        model.float()
        assert_close(tuner.step(batch, val).grad, expected, 1e-4)


def test_a_gradient_scaler_concerns_training_alone() -> None:
    model = mlp()
    tuner = tuner_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuner.loss(TRAIN)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    expected = reference(model, tuner, 0.3)
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    assert scaler.get_scale() == 256.0


# ---- what stays as it was


def norms(**given: Any) -> nn.Sequential:
    return mlp(between=[nn.BatchNorm1d(5, dtype=DOUBLE, **given)])


@pytest.mark.parametrize("mode", [True, False])
def test_buffers_and_modes(mode: bool) -> None:
    model = norms().train(mode)
    with torch.no_grad():
        model(VAL[0])
        model(TRAIN[0])
    tuner = tuner_of(model)
    expected = reference(model, tuner)
    before = copy.deepcopy(model.state_dict())
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert all(m.training == mode for m in model.modules())
    model.train(not mode)
    other = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, other)
    assert abs(float(other["decay"]) / float(expected["decay"]) - 1) > 0.01


def test_a_loss_may_choose_the_mode() -> None:
    model = norms().train()
    with torch.no_grad():
        model(VAL[0])

    def evaluated(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        m.eval()
        found = fit(m, batch, lam)
        m.train()
        return found

    def stays(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        m.eval()
        return fit(m, batch, lam)

    found = [tuner_of(model, val_loss=loss).step(TRAIN, VAL).grad for loss in (evaluated, stays)]
    assert all(m.training for m in model.modules())

    def outer(call: Any, lam: Any) -> torch.Tensor:
        model.eval()
        found = fit(call, VAL, lam)
        model.train()
        return found

    expected = exact(model, hyperparameters().read(), lambda call, lam: regularised(call, TRAIN, lam), outer)
    for each in found:
        assert_close(each, expected)


def test_dropout_is_replayed() -> None:
    model = mlp(between=[nn.Dropout(0.4)]).train()
    tuner = tuner_of(model)
    torch.manual_seed(5)
    found = tuner.step(TRAIN, VAL).grad
    after = torch.rand(1)

    def masked(batch: Any, mask: torch.Tensor) -> Any:
        def loss(call: Any, lam: Any) -> torch.Tensor:
            w1, b1, w2, b2 = call.parameters()
            hidden = torch.tanh((batch[0] @ w1.T + b1) * mask)
            penalty = lam["decay"] * (w1.square().sum() + w2.square().sum()) + lam["bias"] * (
                b1.square().sum() + b2.square().sum()
            )
            return (hidden @ w2.T + b2 - batch[1]).square().mean() + (penalty if batch is TRAIN else 0)

        return loss

    torch.manual_seed(5)
    ones = torch.ones(len(VAL[0]), 5, dtype=DOUBLE), torch.ones(len(TRAIN[0]), 5, dtype=DOUBLE)
    val, inner = (nn.functional.dropout(each, 0.4) for each in ones)  # the outer loss is evaluated first
    hyper = hyperparameters().read()
    assert_close(found, exact(model, hyper, masked(TRAIN, inner), masked(VAL, val)))
    assert torch.equal(after, torch.rand(1))  # no more was drawn than by one evaluation of each loss


def test_a_step_moves_the_hyperparameters_and_nothing_else() -> None:
    model: Any = norms().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    tuner = tuner_of(model)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    record = tuner.step(TRAIN, VAL)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(flags) - 1)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in tuner.hyper.parameters())
    fresh = hyperparameters()
    (slope,) = torch.autograd.grad(fresh.values()["decay"], fresh.raw["decay"], record.grad["decay"])
    torch.testing.assert_close(tuner.hyper.raw["decay"].detach(), fresh.raw["decay"].detach() - 0.1 * slope, rtol=1e-13, atol=0)


def test_the_training_loss_is_the_users_own_and_makes_no_graph_to_the_hyperparameters() -> None:
    model = mlp()
    tuner = tuner_of(model)
    loss = tuner.loss(TRAIN)
    assert torch.equal(loss, regularised(model, TRAIN, tuner.hyper.read()))
    loss.backward()
    assert all(p.grad is None for p in tuner.hyper.parameters())


def test_no_hook_stays_once_the_optimizer_is_known() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    model = mlp()
    before = len(_global_optimizer_pre_hooks)
    tuner = tuner_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(_global_optimizer_pre_hooks) == before + 1
    train(tuner, optimizer, 2)
    assert len(_global_optimizer_pre_hooks) == before
    tuner.step(TRAIN, VAL)
    assert len(_global_optimizer_pre_hooks) == before + 1
    del tuner
    assert len(_global_optimizer_pre_hooks) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


# ---- compiled modules


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "in place", "a part", "loss"])
def test_compiled_modules_give_the_numbers_of_the_original(way: str) -> None:
    torch.compiler.reset()
    original = norms().train()
    expected = reference(original, tuner_of(original), 0.2)
    model: Any = copy.deepcopy(original)
    losses: dict[str, Any] = {}
    if way == "whole":
        model = torch.compile(model, backend="eager")
    elif way == "in place":
        model.compile(backend="eager")
    elif way == "a part":
        model[0].compile(backend="eager")
    else:
        losses = {"train_loss": torch.compile(regularised, backend="eager"), "val_loss": torch.compile(fit, backend="eager")}
    tuner = tuner_of(model, **losses, trained_by=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2))
    with torch.no_grad():
        tuner.loss(TRAIN)  # compiles
        model.load_state_dict({k: v for k, v in zip(model.state_dict(), original.state_dict().values(), strict=True)})
    assert_close(tuner.step(TRAIN, VAL).grad, expected)
    assert (model._compiled_call_impl is not None) == (way == "in place")
    torch.compiler.reset()


# ---- data


def test_several_batches_are_one_mean() -> None:
    model = mlp()
    parts = [(TRAIN[0][i::3], TRAIN[1][i::3]) for i in range(3)]
    cases: list[Any] = [
        (parts, None),
        ([list(p) for p in parts], 3),
        (iter(parts), 3),
        ((p for p in parts), 3),
        (DataLoader(TensorDataset(*TRAIN), 8), 3),
        (DataLoader(TensorDataset(*TRAIN), 8, shuffle=True), 3),
        (hyperopt.Minibatches(TRAIN, 8), 3),
        (list(TRAIN), None),
        (TensorDataset(*TRAIN), None),
    ]
    expected = reference(model, tuner_of(model))
    for given, count in cases:
        tuner = tuner_of(model)
        assert_close(tuner.step(given, VAL, batches=None if count is None else (count, 1)).grad, expected)


def test_a_loader_goes_on_from_step_to_step() -> None:
    seen: list[float] = []

    def loss(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        seen.append(float(batch[0][0, 0]))
        return regularised(m, batch, lam)

    tuner = tuner_of(mlp(), train_loss=loss)
    loader = DataLoader(TensorDataset(*TRAIN), 6)
    for _ in range(5):
        tuner.step(loader, VAL)
    assert list(dict.fromkeys(seen)) == [float(TRAIN[0][i, 0]) for i in (0, 6, 12, 18)] and seen[-1] == seen[0]


def test_a_loader_that_is_made_anew_at_each_step_goes_on_too() -> None:
    seen: list[float] = []

    def loss(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        seen.append(float(batch[0][0, 0]))
        return regularised(m, batch, lam)

    tuner, dataset = tuner_of(mlp(), train_loss=loss), TensorDataset(*TRAIN)
    for _ in range(4):
        tuner.step(DataLoader(dataset, 6, shuffle=True), VAL)
    assert len(set(seen)) == 4
    tuner.step(DataLoader(dataset, 4), VAL)  # other batches: from the first on
    assert seen[-1] == float(TRAIN[0][0, 0])
    tuner.step(DataLoader(TensorDataset(*TRAIN), 4), VAL)
    assert seen[-1] == float(TRAIN[0][0, 0])


def test_losses_may_have_their_data_themselves() -> None:
    model = mlp()
    tuner = tuner_of(model, train_loss=lambda m, b, lam: regularised(m, TRAIN, lam), val_loss=lambda m, b, lam: fit(m, VAL, lam))
    expected = reference(model, tuner)
    assert_close(tuner.step(None, None).grad, expected)


# ---- modules and surroundings of other kinds


@pytest.mark.parametrize("mode", [True, False])
def test_attention_has_second_derivatives(mode: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True, dtype=DOUBLE)
            self.end = nn.Linear(2, 1, dtype=DOUBLE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.layer(x.view(-1, 2, 2))[:, 0])

    torch.manual_seed(0)
    model = Attends().train(mode)
    tuner = tuner_of(model)
    with sdpa_kernel(SDPBackend.MATH):
        expected = reference(model, tuner)
    assert_close(tuner.step(TRAIN, VAL).grad, expected, 1e-7)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_step_may_be_made_where_derivatives_are_off(off: Any) -> None:
    model = mlp()
    tuner = tuner_of(model)
    expected = reference(model, tuner)
    with off():
        record = tuner.step(TRAIN, VAL)
    assert_close(record.grad, expected)
    tuner.loss(TRAIN).backward()
    tuner.step(TRAIN, VAL)


def test_several_modules_in_one_and_hyperparameters_for_each_parameter() -> None:
    parts = nn.ModuleDict({"body": mlp(), "head": nn.Linear(1, 1).double()})
    weights = {name.replace(".", "/"): p for name, p in parts.named_parameters()}
    hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.3, per="element")}, {"decay": weights}, dtype=DOUBLE)

    def loss(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        penalty = sum(lam["decay"][n.replace(".", "/")].mul(p.square()).sum() for n, p in m.named_parameters())
        return (m["head"](m["body"](batch[0])) - batch[1]).square().mean() + penalty

    def outer(m: Any, batch: Any, lam: Any) -> torch.Tensor:
        return (m["head"](m["body"](batch[0])) - batch[1]).square().mean()

    tuner = tuner_of(parts, hyper=hyper, train_loss=loss, val_loss=outer)
    found = tuner.step(TRAIN, VAL).grad["decay"]
    own = dict(parts.named_parameters())
    sizes = [p.numel() for p in own.values()]

    def at(w: torch.Tensor, h: torch.Tensor, penalised: bool, batch: Any) -> torch.Tensor:
        split = {n: p.view(own[n].shape) for n, p in zip(own, w.split(sizes), strict=True)}
        w1, b1, w2, b2, w3, b3 = split.values()
        out = (torch.tanh(batch[0] @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
        return (out - batch[1]).square().mean() + ((h * w.square()).sum() if penalised else 0)

    w = torch.cat([p.detach().flatten() for p in own.values()])
    h = torch.full_like(w, 0.3)
    hessian = torch.autograd.functional.hessian(lambda w: at(w, h, True, TRAIN), w)
    slope = torch.autograd.functional.jacobian(lambda w: at(w, h, False, VAL), w)
    expected = -2 * w * torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(torch.cat([found[n.replace(".", "/")].flatten() for n in own]), expected, rtol=1e-8, atol=1e-12)


# ---- the record, the cost, the state


def test_the_record_says_it_in_one_line() -> None:
    model = mlp()
    tuner = tuner_of(model, adjoint="auto")
    record = tuner.step(TRAIN, VAL)
    line = str(record)
    assert "\n" not in line and repr(record) == line
    assert repr(tuner).startswith("Tuner(Sequential, decay=") and repr(tuner).endswith(", adjoint='auto', steps=1)")
    for words in (
        "val_loss=",
        "decay=",
        "bias=",
        record.status.name,
        record.adjoint.partition(":")[0],
        "error estimate",
        "gradient evaluations",
    ):
        assert words in line, words
    numbers = record.as_dict()
    assert numbers["outer/loss"] == pytest.approx(float(fit(model, VAL, {}).detach()))
    assert numbers["hyper/decay"] == pytest.approx(float(tuner.hyper.read()["decay"]))
    assert numbers["cost/gradients"] == record.gradients
    for name in ("adjoint/iterations", "adjoint/residual", "hypergrad/error_estimate", "hypergrad/norm", "cost/hessian_products"):
        assert name in numbers
    assert all(isinstance(value, float) for value in numbers.values())


ADJOINTS = {
    "auto": "auto",
    "cg": hyperopt.Implicit(hyperopt.CG(max_steps=7, rtol=0.0), policy="ignore"),
    "neumann": hyperopt.Implicit(hyperopt.Neumann(max_steps=6), policy="ignore"),
    "one step": hyperopt.OneStep(),
    "finite differences": hyperopt.FiniteDifference(),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_a_step_costs_at_most_two_gradients_a_product_and_four_more(
    adjoint: Any, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.autograd import Variable

    calls: list[str] = []

    def counted(loss: Any) -> Any:
        def call(m: Any, batch: Any, lam: Any) -> torch.Tensor:
            calls.append("loss")
            return loss(m, batch, lam)

        return call

    class Engine:
        run = Variable._execution_engine.run_backward  # pyright: ignore[reportAttributeAccessIssue]

        def run_backward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("backward")
            return Engine.run(*args, **kwargs)

    model = mlp(between=[nn.Dropout(p)] if p else [])
    hyper = hyperparameters(2.0, 2.0)  # convex
    tuner = tuner_of(model, hyper=hyper, adjoint=adjoint, train_loss=counted(regularised), val_loss=counted(fit))
    monkeypatch.setattr(Variable, "_execution_engine", Engine())
    monkeypatch.setattr(
        torch.autograd, "_engine_run_backward", lambda outputs, *a, **k: Engine().run_backward(outputs, *a, **k), raising=False
    )
    record = tuner.step(TRAIN, VAL)
    bound = 2 * record.products + 4
    backward = calls.count("backward") - 1  # one through the map of the spaces, which evaluates no loss
    assert backward <= record.gradients <= bound, (calls, record)
    assert calls.count("loss") <= bound, (calls, record)


@pytest.mark.parametrize(
    "adjoint",
    ["auto", pytest.param(EXACT, marks=pytest.mark.slow), hyperopt.FiniteDifference()],
    ids=["auto", "gmres", "finite differences"],
)
def test_a_state_continues_to_the_bit(adjoint: Any) -> None:
    import io

    def made() -> tuple[nn.Module, hyperopt.Tuner, torch.optim.Optimizer]:
        model = mlp()
        hyper = hyperparameters()
        tuner = tuner_of(model, hyper=hyper, adjoint=adjoint, optimizer=torch.optim.Adam(hyper.parameters(), lr=0.05))
        return model, tuner, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)

    def loaders() -> tuple[DataLoader, DataLoader]:
        return DataLoader(TensorDataset(*TRAIN), 5, shuffle=True), DataLoader(TensorDataset(*VAL), 7, shuffle=True)

    def go(tuner: hyperopt.Tuner, optimizer: Any, data: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            record = tuner.step(*data, batches=2)
            found += [record.loss, *record.hyper.values(), record.error]
            train(tuner, optimizer, 4)
        return found

    torch.manual_seed(3)
    model, tuner, optimizer = made()
    data = loaders()
    go(tuner, optimizer, data, 3)
    held = io.BytesIO()
    torch.save({"tuner": tuner.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, held)
    expected = go(tuner, optimizer, data, 3)
    held.seek(0)
    kept = torch.load(held, weights_only=True)
    model, tuner, optimizer = made()
    tuner.load_state_dict(kept["tuner"])
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    assert go(tuner, optimizer, loaders(), 3) == expected

"""The callback for Lightning in the real trainer: the numbers of a loop of one's own, the log, checkpoints and modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tuner_reference import assert_close, data, exact, fit, mlp, regularised

import hyperopt

lightning = pytest.importorskip("lightning", reason="the extra 'trainers' is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Lightning's own

TRAIN, VAL = (tuple(t.float() for t in pair) for pair in (data(), data(16, seed=1)))


def hyperparameters() -> hyperopt.Hyperparameters:
    return hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.3), "bias": hyperopt.Positive(0.2)})


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(TensorDataset(*TRAIN), 6, shuffle=False), DataLoader(TensorDataset(*VAL), 8)


def tuner_of(model: nn.Module) -> hyperopt.Tuner:
    hyper = hyperparameters()
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
    return hyperopt.Tuner(model, hyper, train_loss=regularised, val_loss=fit, optimizer=optimizer)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().float()
        self.tuner = tuner_of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.tuner.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", fit(self, batch, {}))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.05)


def trained(folder: Path, epochs: int, ckpt: Any = None, every: int = 3, **given: Any) -> tuple[Net, Any, Any]:
    from lightning.pytorch.loggers import CSVLogger

    from hyperopt.integrations.lightning import TunerCallback

    torch.manual_seed(0)
    net = Net()
    callback = TunerCallback(net.tuner, every_n_steps=every, batches=2)
    settings: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], logger=CSVLogger(folder), default_root_dir=folder, **settings, **given
    )
    trainer.fit(net, *loaders(), ckpt_path=ckpt)
    return net, trainer, callback


def by_hand(epochs: int, every: int = 3, accumulate: int = 1, autocast: bool = False) -> tuple[nn.Module, hyperopt.Tuner]:
    model = mlp().float()
    tuner = tuner_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)
    train, val = loaders()
    steps = 0
    for _ in range(epochs):
        for i, batch in enumerate(train):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = tuner.loss(batch)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if steps % every == 0:
                    tuner.step(train, val, batches=2)
    return model, tuner


@pytest.mark.parametrize(
    "given, same",
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"precision": "bf16-mixed"}, {"autocast": True}),
        ({"gradient_clip_val": 100.0}, {}),
        ({"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {"autocast": True, "accumulate": 2}),
    ],
    ids=["plain", "accumulation", "mixed precision", "clipping", "both"],
)
def test_it_is_the_loop_of_ones_own(tmp_path: Path, given: Any, same: Any) -> None:
    net, _, callback = trained(tmp_path, 3, **given)
    model, tuner = by_hand(3, **same)
    assert tuner.steps == net.tuner.steps > 1
    for one, other in zip(net.net.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {k: float(v) for k, v in net.tuner.hyper.read().items()} == {k: float(v) for k, v in tuner.hyper.read().items()}
    assert abs(float(tuner.hyper.read()["decay"]) - 0.3) > 0.01
    assert callback.record.step == tuner.steps


def test_the_hypergradient_is_the_exact_one(tmp_path: Path) -> None:
    net, _, _ = trained(tmp_path, 1, every=100)
    lam = {k: v.double() for k, v in net.tuner.hyper.read().items()}
    train, val = data(), data(16, seed=1)
    net.double()
    names = [name for name, _ in net.named_parameters()]

    def inner(call: Any, lam: Any) -> torch.Tensor:
        return regularised(call, train, lam) + 0.025 * sum(p.square().sum() for p in call.parameters())

    expected = exact(net, lam, inner, lambda call, lam: fit(call, val, lam), names)
    net.float()
    net.tuner.adjoint = hyperopt.Implicit(hyperopt.GMRES(rtol=1e-6, max_steps=300, window=300))
    assert_close(net.tuner.step(TRAIN, VAL).grad, expected, 1e-4)


def test_the_numbers_are_in_the_log(tmp_path: Path) -> None:
    import csv

    net, trainer, callback = trained(tmp_path, 3)
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").open()))
    logged = [row for row in rows if row.get("hyper/decay")]
    assert [int(row["step"]) for row in logged] == [3, 6, 9, 12]
    assert float(logged[-1]["hyper/decay"]) == pytest.approx(float(net.tuner.hyper.read()["decay"]))
    for name in ("outer/loss", "hyper/bias", "adjoint/iterations", "hypergrad/error_estimate", "cost/gradients"):
        assert float(logged[-1][name]) == pytest.approx(callback.record.as_dict()[name], nan_ok=True)


def test_a_checkpoint_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole, _, _ = trained(tmp_path / "whole", 4)
    _, trainer, _ = trained(tmp_path / "half", 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _, _ = trained(tmp_path / "rest", 4, ckpt=tmp_path / "half.ckpt")
    assert rest.tuner.steps == whole.tuner.steps == 5
    for one, other in zip(rest.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(rest.tuner.hyper.parameters(), whole.tuner.hyper.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bad_input(tmp_path: Path) -> None:
    from hyperopt.integrations.lightning import TunerCallback

    tuner = tuner_of(mlp())
    with pytest.raises(ValueError, match="every_n_steps=0 must be a whole number"):
        TunerCallback(tuner, every_n_steps=0)
    with pytest.raises(ValueError, match="batches=0"):
        TunerCallback(tuner, batches=0)
    net = Net()
    trainer = lightning.Trainer(max_epochs=1, logger=False, callbacks=[TunerCallback(net.tuner)], enable_progress_bar=False)
    with pytest.raises(ValueError, match="the trainer has no val data for the tuner"):
        trainer.fit(net, loaders()[0])


def seen_in_two_fits(first: Any, second: Any, **given: Any) -> list[Any]:
    """Return the batches that the tuner gets in its one step of each of two fits with the same callback."""
    from hyperopt.integrations.lightning import TunerCallback

    net, seen = Net(), []
    callback = TunerCallback(net.tuner, every_n_steps=1, **given)
    net.tuner.step = lambda train, val, batches: seen.append((train.draw(), val.draw()))  # type: ignore[assignment]
    for pair in (first, second):
        settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, limit_train_batches=1, logger=False, callbacks=[callback], **settings
        )
        trainer.fit(net, *pair)
    return seen


def rows(loader: DataLoader[Any], number: int) -> torch.Tensor:
    return list(loader)[number][0]


@pytest.mark.parametrize("changed", [("train",), ("val",), ("train", "val"), ()], ids=str)
def test_another_fit_uses_its_own_loaders(changed: tuple[str, ...]) -> None:
    """A loader that is the same in both fits continues with its second batch; another one starts at its first."""
    first = loaders()
    others = [DataLoader(TensorDataset(*(t.float() for t in data(18, seed=n))), 6, shuffle=False) for n in (5, 6)]
    second = tuple(o if name in changed else f for name, f, o in zip(("train", "val"), first, others, strict=True))
    seen = seen_in_two_fits(first, second)
    for i, name in enumerate(("train", "val")):
        assert torch.equal(seen[0][i][0], rows(first[i], 0))
        assert torch.equal(seen[1][i][0], rows(second[i], 0 if name in changed else 1))


def test_data_that_are_given_serve_every_fit() -> None:
    given, first, second = loaders(), loaders(), loaders()
    own = DataLoader(TensorDataset(*(t.float() for t in data(18, seed=7))), 9, shuffle=False)
    seen = seen_in_two_fits(first, second, train=own, val=given[1])
    for number in (0, 1):
        assert torch.equal(seen[number][0][0], rows(own, number)) and torch.equal(seen[number][1][0], rows(given[1], number))

"""The callback for Hugging Face's trainer, in the real one with a small model from a config: numbers, log, checkpoints, modes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tuner_reference import assert_close, exact

import hyperopt

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="the extra 'trainers' is not installed")
pytest.importorskip("accelerate", reason="the extra 'trainers' is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of the packages


class Tokens(torch.utils.data.Dataset):
    """Rows of tokens with a class each."""

    def __init__(self, rows: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 11, (rows, 6), generator=draw)
        self.labels = (self.ids.sum(1) + torch.randint(0, 3, (rows,), generator=draw)) % 2

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def small(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def val_loss(model: Any, inputs: Any, lam: Any) -> torch.Tensor:
    return model(**inputs).loss


def train_loss(model: Any, inputs: Any, lam: Any) -> torch.Tensor:
    return val_loss(model, inputs, lam) + lam["decay"] * sum(p.square().sum() for p in model.parameters())


def trained(folder: Path, steps: int, resume: Any = None, every: int = 2, batches: Any = 2, **given: Any) -> Any:
    from hyperopt.integrations.transformers import TunerCallback

    model = small(given.pop("dropout", 0.0))
    hyper = hyperopt.Hyperparameters({"decay": hyperopt.Positive(0.02)})

    class Tuned(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            loss = train_loss(model, inputs, hyper.read())
            return (loss, None) if return_outputs else loss

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 5, "per_device_eval_batch_size": 8, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "save_steps": 4, "learning_rate": 0.01, "seed": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), max_steps=steps, **{**settings, **given})
    trainer = Tuned(model=model, args=args, train_dataset=Tokens(20, 0), eval_dataset=Tokens(16, 1))
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
    tuner = hyperopt.Tuner(model, hyper, train_loss=train_loss, val_loss=val_loss, optimizer=optimizer)
    callback = TunerCallback(tuner, trainer, every_n_steps=every, batches=batches)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tuner, callback


def tensors(trainer: Any, tuner: hyperopt.Tuner) -> list[torch.Tensor]:
    return [*trainer.model.parameters(), *tuner.hyper.parameters()]


@pytest.mark.cases(slow=1)
@pytest.mark.parametrize(
    "given",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"dropout": 0.2}, {"bf16": True, "gradient_accumulation_steps": 2}],
    ids=["plain", "accumulation", "mixed precision", "dropout", "both"],
)
def test_hyperparameters_learn_and_the_hypergradient_is_the_exact_one(tmp_path: Path, given: Any) -> None:
    trainer, tuner, callback = trained(tmp_path, 6, save_strategy="no", **given)
    assert tuner.steps == 3 and callback.record.step == 3
    assert abs(float(tuner.hyper.read()["decay"]) - 0.02) > 1e-4
    model = trainer.model.eval()
    train, val = ({"input_ids": t.ids, "labels": t.labels} for t in (Tokens(20, 0), Tokens(16, 1)))
    tuner.adjoint = hyperopt.Implicit(hyperopt.GMRES(rtol=1e-6, max_steps=500, window=500))
    found = tuner.step(train, val).grad
    before: Any = small().eval().double()  # without the wrappers of the trainer, and with attention that has second derivatives
    before.set_attn_implementation("eager")
    before.load_state_dict(model.state_dict())

    def call_of(call: Any) -> Any:
        class Call:
            def __call__(self, **inputs: Any) -> Any:
                return type("Out", (), {"loss": nn.functional.cross_entropy(call(inputs["input_ids"]).logits, inputs["labels"])})

            def parameters(self) -> Any:
                return call.parameters()

        return Call()

    lam = {"decay": torch.as_tensor(callback.record.hyper["hyper/decay"], dtype=torch.float64)}  # as it was at that step
    expected = exact(
        before, lam, lambda call, lam: train_loss(call_of(call), train, lam), lambda call, lam: val_loss(call_of(call), val, lam)
    )
    assert_close(found, expected, 1e-3)


def test_the_trainer_trains_as_without_the_callback_until_the_first_step(tmp_path: Path) -> None:
    one, tuner, _ = trained(tmp_path / "a", 7, every=8, save_strategy="no", dropout=0.1)
    two, _, _ = trained(tmp_path / "b", 7, every=7, save_strategy="no", dropout=0.1)
    assert tuner.steps == 0
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_numbers_are_in_the_log(tmp_path: Path) -> None:
    trainer, tuner, callback = trained(tmp_path, 6, save_strategy="no")
    logged = [row for row in trainer.state.log_history if "hyper/decay" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    for name, value in callback.record.as_dict().items():
        assert logged[-1][name] == pytest.approx(value, nan_ok=True)
    assert logged[-1]["hyper/decay"] == pytest.approx(float(tuner.hyper.read()["decay"]))


def test_a_checkpoint_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 8)[:2]
    half = tmp_path / "half"
    trained(half, 4)
    rest = trained(half, 8, resume=True)[:2]
    assert rest[1].steps == whole[1].steps == 4
    for one, other in zip(tensors(*rest), tensors(*whole), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_from_another_folder_is_named(tmp_path: Path) -> None:
    from hyperopt.integrations.transformers import TunerCallback

    trainer, tuner, callback = trained(tmp_path / "one", 4)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4.tuner\.pt does not exist; call load"):
        trained(tmp_path / "two", 8, resume=str(tmp_path / "one" / "checkpoint-4"))
    callback.load(tmp_path / "one" / "checkpoint-4")
    with pytest.raises(ValueError, match="every_n_steps=0 must be a whole number"):
        TunerCallback(tuner, trainer, every_n_steps=0)

"""Minibatches and warm starts of the equilibrium task: the store, what it saves, and a resume in the middle of an epoch."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from test_equilibrium_task import matrix, no_check, sgd, task
from torch import Tensor

from hyperopt.app.loop_state import MonitorError
from hyperopt.app.run import run
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.linear.base import fitted_start
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.solvers.picard import Picard
from hyperopt.data.digits import Digits
from hyperopt.tasks.equilibrium import EquilibriumTask
from hyperopt.tasks.warm import WarmStore

F64 = torch.float64
TIGHT: dict[str, Any] = {"solver": Picard(rtol=1e-13), "adjoint": Implicit(Neumann(rtol=1e-13))}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- the store -----------------------------------------------------------------------------------------------------------------


def test_rows_not_seen_start_cold_and_staleness_counts_steps() -> None:
    store = WarmStore(5, 2, F64)
    assert store.start(torch.tensor([0, 1]), 0).metrics == {"warm/rows": 0.0}
    assert store.start(None, 0).state is None and store.start(None, 0).adjoint is None
    w, v = random(2, 2), random(2, 2, seed=1)
    store.keep(torch.tensor([1, 3]), 4, w, v)
    store.keep(torch.tensor([4]), 6, w[:1], None)  # an adjoint method that solves for no v
    found = store.start(torch.tensor([0, 1, 4, 2]), 7)
    assert found.metrics == {"warm/rows": 0.5, "warm/staleness_mean": 2.0, "warm/staleness_max": 3.0}
    zero = torch.zeros(2, dtype=F64)
    assert found.state is not None and found.adjoint is not None
    torch.testing.assert_close(found.state, torch.stack([zero, w[0], w[0], zero]), rtol=0, atol=0)
    torch.testing.assert_close(found.adjoint, torch.stack([zero, v[0] * 2 / 4, zero, zero]), rtol=1e-15, atol=0)


def test_what_is_handed_out_is_a_copy() -> None:
    store = WarmStore(2, 2, F64)
    store.keep(None, 0, random(2, 2), random(2, 2))
    first = store.start(None, 1)
    assert first.state is not None
    store.keep(None, 1, 5 * random(2, 2), None)
    torch.testing.assert_close(first.state, random(2, 2), rtol=0, atol=0)


def test_half_the_bits_take_half_the_memory() -> None:
    whole, half = WarmStore(100, 30, torch.float32), WarmStore(100, 30, torch.float32, torch.bfloat16)
    assert whole.nbytes == 100 * (2 * 30 * 4 + 8) and half.nbytes == 100 * (2 * 30 * 2 + 8)
    w = random(100, 30).float()
    half.keep(None, 0, w, w)
    found = half.start(None, 1)
    assert found.state is not None and found.state.dtype == torch.float32
    torch.testing.assert_close(found.state, w, rtol=2**-8, atol=0)
    assert not torch.equal(found.state, w)


# --- where a linear solve starts -----------------------------------------------------------------------------------------------


def test_the_solution_of_a_scaled_system_is_found_at_once() -> None:
    m, b = 0.2 * random(4, 4), random(3, 4, seed=1)
    exact = torch.linalg.solve(torch.eye(4, dtype=F64) - m.T, b.T).T
    for factor in (1.0, 1e-9, -1e12):
        torch.testing.assert_close(fitted_start(lambda v: v @ m, b, factor * exact), exact, rtol=1e-12, atol=1e-12)


def test_a_start_is_one_step_from_the_best_multiple() -> None:
    m, b, v = 0.2 * random(4, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    image = v - v @ m
    best = torch.stack([torch.linalg.lstsq(image[i][:, None], b[i][:, None]).solution.squeeze() * v[i] for i in range(3)])
    torch.testing.assert_close(fitted_start(lambda v: v @ m, b, v), best @ m + b, rtol=1e-12, atol=1e-12)


def test_a_row_without_a_usable_solution_starts_at_b() -> None:
    b = random(3, 4)
    v = random(3, 4, seed=1)
    v[0], v[1, 2] = 0.0, math.nan
    found = fitted_start(lambda v: 0.5 * v, b, v)
    assert torch.equal(found[:2], b[:2]) and not torch.equal(found[2], b[2])
    assert torch.equal(fitted_start(lambda v: 0.5 * v, torch.zeros(3, 4, dtype=F64), v), torch.zeros(3, 4, dtype=F64))


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_start_off_by_orders_of_magnitude_costs_no_more_than_the_direction_is_worth(factor: float) -> None:
    m, b = 0.9 * torch.linalg.qr(random(4, 4))[0], random(3, 4, seed=1)
    solver = Neumann(rtol=1e-8, max_steps=500)
    cold = solver.solve(lambda v: v @ m, b).stats.vjps
    other = solver.solve(lambda v: v @ m, b, fitted_start(lambda v: v @ m, b, factor * random(3, 4, seed=2))).stats.vjps
    assert other <= cold + 1
    if factor > 1:
        assert solver.solve(lambda v: v @ m, b, factor * random(3, 4, seed=2)).stats.vjps > cold + 50


# --- minibatches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_batch_of_all_rows_is_the_full_batch(warm_start: bool) -> None:
    whole, batch = task(warm_start=warm_start), task(warm_start=warm_start, batch_size=60)
    first, second = sgd(whole), sgd(batch)
    for _ in range(4):
        a, b = whole.step(first, no_check), batch.step(second, no_check)
        assert a.loss == b.loss and a.metrics.items() <= b.metrics.items()
        assert set(b.metrics) - set(a.metrics) == {"batch/rows", "batch/epoch"}
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, batch.model.state_dict()[name]), name


def test_a_step_is_the_mean_over_its_batch_also_when_it_is_short() -> None:
    made = task(batch_size=25, **TIGHT)
    optimizer = sgd(made, lr=0.0)
    total = {name: [torch.zeros_like(t) for t in group] for name, group in made.groups().items()}
    loss = 0.0
    for rows in (25, 25, 10):
        record = made.step(optimizer, no_check)
        assert record.metrics["batch/rows"] == rows
        loss += record.loss * rows / 60
        for name, group in made.gradients().items():
            for sum_, gradient in zip(total[name], group, strict=True):
                sum_ += gradient * rows / 60
    whole = task(**TIGHT)
    assert whole.step(sgd(whole, lr=0.0), no_check).loss == pytest.approx(loss, rel=1e-12)
    for name, group in whole.gradients().items():
        for sum_, gradient in zip(total[name], group, strict=True):
            torch.testing.assert_close(sum_, gradient, rtol=0, atol=1e-11, msg=name)


def test_an_adjoint_of_a_batch_starts_one_of_another_size() -> None:
    """With frozen hyperparameters the second epoch starts at its solutions, whatever the sizes of a row's two batches."""
    made = task(batch_size=25, warm_start=True, **TIGHT)
    optimizer = sgd(made, lr=0.0)
    cold = [made.step(optimizer, no_check) for _ in range(3)]
    warm = [made.step(optimizer, no_check) for _ in range(3)]
    assert [record.metrics["warm/rows"] for record in cold + warm] == [0, 0, 0, 1, 1, 1]
    assert made.warm is not None
    start = made.warm.start(None, 6)  # adjoints of the mean over all 60 rows
    whole = task(**TIGHT)
    whole.step(sgd(whole, lr=0.0), no_check)
    solution = whole.model.solution
    assert solution is not None and start.state is not None and start.adjoint is not None
    torch.testing.assert_close(start.state, solution.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(start.adjoint, solution.v, rtol=1e-10, atol=1e-14)
    assert max(record.metrics["inner/iterations"] for record in warm) <= 2 < min(r.metrics["inner/iterations"] for r in cold)
    assert max(record.metrics["cost/vjps"] for record in warm) <= 4 < min(record.metrics["cost/vjps"] for record in cold)


def test_staleness_is_that_of_the_data_order() -> None:
    made = task(batch_size=25, warm_start=True)
    optimizer, last = sgd(made), {}
    for k in range(7):
        state = made.batches.state_dict()
        index = made.batches.take().index
        made.batches.load_state_dict(state)
        assert index is not None
        ages = [k - last[row] for row in index.tolist() if row in last]
        metrics = made.step(optimizer, no_check).metrics
        assert metrics["warm/rows"] == len(ages) / len(index)
        if ages:
            assert metrics["warm/staleness_mean"] == pytest.approx(sum(ages) / len(ages), rel=1e-12)
            assert metrics["warm/staleness_max"] == max(ages)
        else:
            assert "warm/staleness_mean" not in metrics
        last |= dict.fromkeys(index.tolist(), k)


def test_warm_starts_save_iterations_over_epochs() -> None:
    cold, warm = task(state_size=20, batch_size=20), task(state_size=20, batch_size=20, warm_start=True)
    first, second = sgd(cold, 0.05), sgd(warm, 0.05)
    pairs = [(cold.step(first, no_check), warm.step(second, no_check)) for _ in range(12)]
    assert pairs[0][0].metrics["inner/iterations"] == pairs[0][1].metrics["inner/iterations"]
    for name in ("inner/iterations_mean", "adjoint/iterations_mean"):
        a, b = (sum(record.metrics[name] for record in records[-3:]) for records in zip(*pairs, strict=True))
        assert b < a, name
    assert pairs[-1][0].loss == pytest.approx(pairs[-1][1].loss, abs=1e-4)


def test_an_unrolled_adjoint_keeps_states_alone() -> None:
    made = task(batch_size=30, warm_start=True, adjoint=Unrolled())
    optimizer = sgd(made)
    for _ in range(4):
        made.step(optimizer, no_check)
    assert made.warm is not None
    kept = made.warm.state_dict()
    assert bool((kept["state"] != 0).any()) and not bool((kept["adjoint"] != 0).any())


# --- resume --------------------------------------------------------------------------------------------------------------------


@pytest.mark.cases(quick=4)
@pytest.mark.parametrize("warm_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("last_batch", ["keep", "drop"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resume_in_the_middle_of_an_epoch_is_bit_for_bit(stop: int, last_batch: str, warm_dtype: str | None) -> None:
    settings = {"batch_size": 25, "last_batch": last_batch, "warm_start": True, "warm_dtype": warm_dtype, "tolerance": "gradient"}

    def make(seed: int = 0) -> tuple[EquilibriumTask, torch.optim.Optimizer]:
        made = task(seed=seed, dtype=torch.float32, **settings)
        return made, sgd(made)

    through, optimizer = make()
    for _ in range(stop):
        through.step(optimizer, no_check)
    file = io.BytesIO()
    torch.save({"task": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = [through.step(optimizer, no_check) for _ in range(5)]

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again, other = make()
    again.step(other, no_check)  # nothing of what it did may stay
    again.load_state_dict(saved["task"])
    other.load_state_dict(saved["optimizer"])
    found = [again.step(other, no_check) for _ in range(5)]
    assert [(r.loss, r.metrics) for r in found] == [(r.loss, r.metrics) for r in expected]
    assert torch.equal(matrix(again), matrix(through))
    for name, tensor in through.state_dict()["warm"].items():
        assert torch.equal(again.state_dict()["warm"][name], tensor)


def job(out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run the command in this process, in ``out``, and return its rows without ``time/*``."""
    rows = ["dataset.train=60", "dataset.val=0", "dataset.test=30"]
    small = ["task.state_size=8", "task.batch_size=25", "task.warm_start=true"]
    run(composed(*rows, *small, "device=cpu", "threads=1", "trainer.progress=false", *overrides), out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    shown = ["trainer.monitor=outer/loss", "trainer.eval_every=3"]
    whole = job(tmp_path / "whole", *shown, "trainer.max_steps=7")
    job(tmp_path / "stopped", *shown, "trainer.max_steps=4")  # one batch into its second epoch
    assert job(tmp_path / "stopped", *shown, "trainer.max_steps=7", "resume=auto") == whole
    assert len(whole) == 7 and whole[6]["batch/epoch"] == 2.0 and whole[6]["warm/rows"] == 1.0


def test_without_rows_selected_on_the_monitor_must_be_another(tmp_path: Path) -> None:
    with pytest.raises(
        MonitorError, match=r"monitor='val/loss' is not one of the task's metrics outer/accuracy, outer/loss, test/"
    ):
        job(tmp_path)


# --- which rows ----------------------------------------------------------------------------------------------------------------


def test_fitted_rows_can_be_measured_on_a_part() -> None:
    made, whole = task(eval_rows=20), task()
    first = whole.rows["outer"]
    logits = whole.model(first.x[:20])
    expected = torch.nn.functional.cross_entropy(logits, first.y[:20]).item()
    assert made.evaluate()["outer/loss"] == pytest.approx(expected, rel=1e-12) != whole.evaluate()["outer/loss"]
    assert made.evaluate()["val/loss"] == whole.evaluate()["val/loss"]
    assert made.describe()["rows"]["outer"] == {"split": "train", "count": 60, "evaluated": 20}
    assert whole.describe()["rows"]["outer"] == {"split": "train", "count": 60, "evaluated": 60}


def test_there_may_be_no_rows_selected_on() -> None:
    made = task(dataset=Digits(train=60, val=0, test=30))
    assert set(made.evaluate()) == {f"{split}/{kind}" for split in ("outer", "test") for kind in ("loss", "accuracy")}
    assert made.describe()["rows"]["val"] == {"split": "val", "count": 0, "evaluated": 0}
    with pytest.raises(ValueError, match=r"task\.fitted=val, but dataset\.val=0, so there are no rows to fit"):
        task(dataset=Digits(train=60, val=0, test=30), fitted="val")


def test_it_says_what_it_keeps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = task(dtype=torch.float32, warm_start=True, batch_size=25)
    assert "the warm starts of 60 rows take 0.0 MB in memory and in every checkpoint" in caplog.messages
    facts = made.describe()
    assert (facts["batch_size"], facts["batches_per_epoch"], facts["warm_bytes"]) == (25, 3, 60 * (2 * 8 * 4 + 8))
    plain = task().describe()
    assert (plain["batch_size"], plain["batches_per_epoch"], plain["warm_bytes"]) == (60, 1, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number >= 1; change batch_size"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"eval_rows": 0}, "eval_rows=0"),
        ({"last_batch": "pad"}, "last_batch='pad' is not one of keep, drop; change last_batch"),
        ({"warm_dtype": "float16"}, "warm_dtype='float16' is not one of None, float32, bfloat16; change warm_dtype"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquilibriumTask(**settings)


def test_a_batch_of_more_rows_than_are_fitted() -> None:
    with pytest.raises(ValueError, match=r"task\.batch_size=61 is more than the 60 fitted rows; lower task\.batch_size"):
        task(batch_size=61)

"""The equilibrium task as the outer loop drives it, on real digits."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.adjoints.shine import Shine
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.newton.chord import Chord
from hyperopt.core.newton.newton import Newton
from hyperopt.core.newton.newton_krylov import NewtonKrylov
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.solvers.broyden import Broyden
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Status
from hyperopt.data.digits import Digits
from hyperopt.nn.cells import HouseholderCell, ProjectedCell
from hyperopt.nn.contractive import ProjectedMatrix
from hyperopt.nn.equilibrium import EquilibriumCell
from hyperopt.tasks.base import Environment
from hyperopt.tasks.equilibrium import EquilibriumTask

ROWS: dict[str, Any] = {"train": 60, "val": 40, "test": 30}
KEYS = {
    "inner/iterations",
    "inner/iterations_mean",
    "inner/residual",
    "inner/contraction",
    "inner/fallbacks",
    "adjoint/fallbacks",
    "adjoint/iterations",
    "adjoint/iterations_mean",
    "adjoint/residual",
    "cost/evaluations",
    "cost/vjps",
    "cost/jvps",
}


def task(seed: int = 0, dtype: torch.dtype = torch.float64, compiled: bool = False, **settings: Any) -> EquilibriumTask:
    made = EquilibriumTask(**{"state_size": 8, "dataset": Digits(**ROWS), **settings})
    made.setup(Environment(torch.device("cpu"), dtype, seed, compiled, torch.Generator().manual_seed(seed)))
    return made


def no_check(gradients: Mapping[str, Sequence[Tensor]]) -> None:
    pass


def sgd(of: EquilibriumTask, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([tensor for group in of.groups().values() for tensor in group], lr, momentum=0.9)


def matrix(of: EquilibriumTask) -> Tensor:
    assert isinstance(of.model.cell, EquilibriumCell)
    return of.model.cell.recurrent.matrix().detach()


@pytest.mark.parametrize("cell", [ProjectedCell(), HouseholderCell()])
def test_steps_fit_the_rows_and_report_themselves(cell: object) -> None:
    made = task(cell=cell)
    optimizer, seen = sgd(made), []
    records = [made.step(optimizer, lambda gradients: seen.append(list(gradients))) for _ in range(30)]
    assert records[-1].loss < records[0].loss / 2
    assert set(records[0].metrics) == {*KEYS, "hypergrad/error_estimate", "hypergrad/is_bound"}
    assert records[0].statuses == {"inner": Status.converged, "adjoint": Status.converged}
    assert seen[0] == ["A", "B", "c", "classifier"] and len(seen) == 30
    assert records[0].metrics["inner/residual"] <= 1e-5 and records[0].metrics["adjoint/residual"] <= 1e-6


def test_the_check_sees_the_gradients_themselves() -> None:
    made = task()

    def zero(gradients: Mapping[str, Sequence[Tensor]]) -> None:
        for group in gradients.values():
            for gradient in group:
                gradient.zero_()

    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.step(sgd(made), zero)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


def test_fixed_counts_are_taken_and_counted() -> None:
    solver, linear = Picard(rtol=0.0, atol=0.0, max_steps=10), Neumann(rtol=0.0, atol=0.0, max_steps=20)
    made = task(cell=HouseholderCell(), solver=solver, adjoint=Implicit(linear_solver=linear))
    record = made.step(sgd(made), no_check)
    assert (record.metrics["inner/iterations"], record.metrics["adjoint/iterations"]) == (10, 20)
    assert (record.metrics["inner/iterations_mean"], record.metrics["adjoint/iterations_mean"]) == (10, 20)
    assert record.statuses == {"inner": Status.fixed_steps, "adjoint": Status.fixed_steps}


def test_a_line_search_is_logged_by_its_first_evaluation_and_costs_them_all() -> None:
    made = task(warm_start=True)
    parameters = [tensor for group in made.groups().values() for tensor in group]
    optimizer = torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe")
    one, losses = task(warm_start=True).step(sgd(task()), no_check), []
    record = made.step(optimizer, lambda gradients: losses.append(1))
    assert len(losses) > 2 and record.loss == one.loss
    assert record.metrics["inner/iterations"] == one.metrics["inner/iterations"]
    assert record.metrics["cost/evaluations"] >= 2 * one.metrics["cost/evaluations"]
    assert made.step(optimizer, no_check).loss < record.loss


def test_certificates_are_counted_in_outer_steps_also_under_a_line_search() -> None:
    made = task(certificate_every=2)
    parameters = [tensor for group in made.groups().values() for tensor in group]
    optimizer = torch.optim.LBFGS(parameters, max_iter=2, line_search_fn="strong_wolfe")
    records = [made.step(optimizer, no_check) for _ in range(4)]
    assert ["hypergrad/error_estimate" in record.metrics for record in records] == [True, False, True, False]


@pytest.mark.parametrize("solver", [Picard(rtol=1e-10), Anderson(rtol=1e-10)])
@pytest.mark.parametrize("adjoint", [None, Unrolled()])
def test_other_methods_give_the_same_step(solver: object, adjoint: object) -> None:
    reference, made = task(solver=Picard(rtol=1e-10)), task(solver=solver, adjoint=adjoint)
    for each in (reference, made):
        each.step(sgd(each, lr=0.1), no_check)
    for (name, a), b in zip(reference.model.state_dict().items(), made.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_after_a_step_a_is_inside_its_ball() -> None:
    made = task(cell=ProjectedCell(max_norm=0.5))
    optimizer = sgd(made, lr=30.0)
    for _ in range(3):
        made.step(optimizer, no_check)
    assert torch.linalg.matrix_norm(matrix(made), 2).item() == pytest.approx(0.5, rel=1e-9)


def test_l2_adds_its_gradient_and_its_loss() -> None:
    plain, pulled = task(), task(l2={"A": 0.0, "B": 0.3, "classifier": 2.0})
    first, second = plain.step(sgd(plain), no_check), pulled.step(sgd(pulled), no_check)
    fresh = task().groups()
    weights = {"A": 0.0, "B": 0.3, "c": 0.0, "classifier": 2.0}
    penalty = sum(weights[name] / 2 * t.square().sum().item() for name, group in fresh.items() for t in group)
    assert second.loss == pytest.approx(first.loss + penalty, rel=1e-12)
    for name, group in fresh.items():
        for start, a, b in zip(group, plain.gradients()[name], pulled.gradients()[name], strict=True):
            torch.testing.assert_close(b, a + weights[name] * start, rtol=0, atol=1e-12)
    assert plain.evaluate().keys() == pulled.evaluate().keys()


def test_which_rows_are_which() -> None:
    made, swapped = task(), task(fitted="val")
    splits = {name: facts["split"] for name, facts in made.describe()["rows"].items()}
    assert splits == {"outer": "train", "val": "val", "test": "test"}
    assert [facts["count"] for facts in swapped.describe()["rows"].values()] == [40, 60, 30]
    assert swapped.describe()["rows"]["outer"]["split"] == "val"
    first, second = made.evaluate(), swapped.evaluate()
    assert first["outer/loss"] == second["val/loss"] and first["val/loss"] == second["outer/loss"]
    assert first["test/accuracy"] == second["test/accuracy"]


def test_an_evaluation_is_right_and_changes_nothing() -> None:
    made = task(warm_start=True)
    made.step(sgd(made), no_check)
    before = copy.deepcopy(made.state_dict())
    metrics = made.evaluate()
    assert set(metrics) == {f"{split}/{kind}" for split in ("outer", "val", "test") for kind in ("loss", "accuracy")}
    for part in ("model", "warm"):
        assert all(torch.equal(tensor, made.state_dict()[part][name]) for name, tensor in before[part].items())
    held_out = made.rows["test"]
    logits = made.model(held_out.x)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, held_out.y, strict=True))
    assert metrics["test/accuracy"] == right / 30
    log_likelihood = logits.log_softmax(1)[torch.arange(30), held_out.y].mean().item()
    assert metrics["test/loss"] == pytest.approx(-log_likelihood, rel=1e-12)


def test_a_warm_start_saves_iterations_and_changes_little() -> None:
    cold, warm = task(state_size=20), task(state_size=20, warm_start=True)
    first, second = sgd(cold, 0.05), sgd(warm, 0.05)
    for _ in range(10):
        a, b = cold.step(first, no_check), warm.step(second, no_check)
    assert b.metrics["inner/iterations"] < a.metrics["inner/iterations"]
    assert a.loss == pytest.approx(b.loss, abs=1e-4)


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("cell", [ProjectedCell(), HouseholderCell()])
def test_a_restored_task_goes_on_bit_for_bit(warm_start: bool, cell: object) -> None:
    through = task(dtype=torch.float32, warm_start=warm_start, cell=cell)
    optimizer = sgd(through)
    for _ in range(3):
        through.step(optimizer, no_check)
    file = io.BytesIO()
    torch.save({"task": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = [through.step(optimizer, no_check).loss for _ in range(3)]

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = task(seed=9, dtype=torch.float32, warm_start=warm_start, cell=cell)
    other, parameters = sgd(again), [t for group in again.groups().values() for t in group]
    again.load_state_dict(saved["task"])
    other.load_state_dict(saved["optimizer"])
    assert all(a is b for a, b in zip(parameters, (t for group in again.groups().values() for t in group), strict=True))
    seeded_alike = task(dtype=torch.float32)  # the rows are the dataset's, not the task's
    assert torch.equal(again.rows["outer"].x, seeded_alike.rows["outer"].x)
    assert [again.step(other, no_check).loss for _ in range(3)] == expected
    assert again.evaluate() == through.evaluate()


SOLVERS = [Broyden(1e-9), Newton(1e-9), Chord(1e-9), NewtonKrylov(1e-9)]


@pytest.mark.parametrize("solver", SOLVERS, ids=[solver.name for solver in SOLVERS])
def test_every_solver_gives_the_same_step(solver: FixedPointSolver) -> None:
    want, got = (task(solver=chosen) for chosen in (Picard(1e-9, max_steps=1000), solver))
    record, other = (made.step(sgd(made), no_check) for made in (want, got))
    assert other.statuses == {"inner": Status.converged, "adjoint": Status.converged}
    assert other.loss == pytest.approx(record.loss, rel=1e-8)
    torch.testing.assert_close(matrix(got), matrix(want), rtol=1e-5, atol=1e-7)
    assert (other.metrics["cost/jvps"] > 0) == isinstance(solver, NewtonKrylov)


def test_the_shine_adjoint_moves_the_loss_down() -> None:
    made = task(solver=Broyden(1e-6), adjoint=Shine())
    optimizer = sgd(made)
    losses = [made.step(optimizer, no_check).loss for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


def test_a_failed_solver_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    made = task(solver=Picard(1e-9, max_steps=2), policy="fallback", fallback=[Broyden(1e-9, max_steps=2), Newton(1e-9)])
    record = made.step(sgd(made), no_check)
    assert record.statuses["inner"] == Status.converged and made.model.solution is not None
    assert made.model.solution.forward.method == "Newton" and made.model.solution.forward.fallbacks == ("Picard", "Broyden")
    switches = [message for message in caplog.messages if "falling back to" in message]
    assert len(switches) == 2 and switches[0].endswith("Broyden") and switches[1].endswith("Newton")


def test_one_seed_one_model() -> None:
    assert all(torch.equal(a, b) for a, b in zip(task(3).model.parameters(), task(3).model.parameters(), strict=True))
    assert not torch.equal(matrix(task(3)), matrix(task(4)))
    single, double = task(3, torch.float32), task(3)
    assert matrix(single).dtype == torch.float32
    torch.testing.assert_close(matrix(single).double(), matrix(double), rtol=1e-6, atol=0)


def test_the_figures() -> None:
    made = task()
    optimizer = sgd(made)
    made.step(optimizer, no_check)
    before = [gradient.clone() for group in made.gradients().values() for gradient in group]
    figures = made.figures()
    after = [gradient for group in made.gradients().values() for gradient in group]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(figures) == {"residual", "spectrum"}

    axes = figures["residual"].axes[0]
    assert axes.get_yscale() == "log" and [str(line.get_label()).split()[0] for line in axes.lines] == ["inner", "adjoint"]
    for line in axes.lines:
        residuals = list(line.get_ydata())  # pyright: ignore[reportArgumentType]
        assert len(residuals) >= 3 and residuals[-1] < residuals[0]

    dots = figures["spectrum"].axes[0].lines[-1]
    found = torch.complex(*(torch.as_tensor(xy) for xy in dots.get_data()))  # pyright: ignore[reportArgumentType]
    trace = found.sum()
    assert len(found) == 8 and trace.real.item() == pytest.approx(matrix(made).trace().item(), abs=1e-12)
    assert figures["spectrum"].axes[0].get_aspect() == 1.0
    for figure in figures.values():
        figure.savefig(io.BytesIO(), format="png")


def test_what_it_says_about_itself() -> None:
    facts = task(state_size=8).describe()
    assert (facts["features"], facts["classes"], facts["dataset"]) == (64, 10, "digits")
    assert facts["hyperparameters"] == {"A": 64, "B": 512, "c": 8, "classifier": 90}
    assert set(facts["checksums"]) == {"digits-images", "digits-labels"}


def test_defaults_are_whole() -> None:
    made = EquilibriumTask()
    made.setup(Environment(torch.device("cpu"), torch.float32, 0, False, torch.Generator()))
    assert isinstance(made.model.cell, EquilibriumCell) and isinstance(made.model.cell.recurrent, ProjectedMatrix)
    assert {name: len(rows) for name, rows in made.rows.items()} == {"outer": 1000, "val": 400, "test": 397}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_size": 0}, "state_size=0 must be a whole number >= 1; change state_size"),
        ({"state_size": -5}, "state_size=-5"),
        ({"fitted": "test"}, "fitted='test' is not one of train, val; change fitted"),
        ({"classifier_scale": -1.0}, "classifier_scale=-1.0"),
        ({"warm_start": 1}, "warm_start=1 must be true or false"),
        ({"l2": {"B": -1.0}}, r"l2\.B=-1.0 is not in \[0, inf\); change l2"),
        ({"l2": {"B": float("nan")}}, r"l2\.B=nan"),
        ({"l2": 0.1}, "l2=0.1 must map groups to strengths"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquilibriumTask(**settings)


def test_a_strength_for_a_group_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"task\.l2\.D: the model has no such group; its groups are A, B, c, classifier; change task\.l2"
    ):
        task(l2={"D": 1.0})

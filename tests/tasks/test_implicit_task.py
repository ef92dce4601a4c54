"""The task of networks with implicit layers as the outer loop drives it, on real digits."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.linear.dense import Dense
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.newton.newton import Newton
from hyperopt.core.solvers.anderson import Anderson
from hyperopt.core.solvers.picard import Picard
from hyperopt.core.status import Status
from hyperopt.data.augment import Augment
from hyperopt.data.digits import Digits
from hyperopt.nn.deq import DEQ
from hyperopt.nn.factories import DEQResNet, Methods, NetworkFactory, TanhMLP
from hyperopt.nn.tanh_layer import TanhFixedPoint
from hyperopt.tasks.base import Environment
from hyperopt.tasks.implicit import ImplicitTask

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores

ROWS: dict[str, Any] = {"train": 60, "val": 40, "test": 30}
RUNNING = {"loss", "accuracy", "inner_iterations", "inner_iterations_mean", "adjoint_iterations", "adjoint_iterations_mean"}
RUNNING |= {"inner_failed", "inner_fallbacks", "adjoint_failed", "adjoint_fallbacks"}


def task(seed: int = 0, dtype: torch.dtype = torch.float64, generator: int | None = None, **settings: Any) -> ImplicitTask:
    made = ImplicitTask(**{"network": TanhMLP(8), "batch_size": 20, "dataset": Digits(**ROWS), **settings})
    generated = torch.Generator().manual_seed(seed if generator is None else generator)
    made.setup(Environment(torch.device("cpu"), dtype, seed, False, generated))
    return made


def no_check(gradients: Mapping[str, Sequence[Tensor]]) -> None:
    pass


def sgd(of: ImplicitTask, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([tensor for group in of.groups().values() for tensor in group], lr, momentum=0.9)


def parameters(of: ImplicitTask) -> list[Tensor]:
    return [tensor for group in of.groups().values() for tensor in group]


class Two(NetworkFactory):
    """Two implicit layers, dropout between them and a BatchNorm after."""

    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        first, second = (TanhFixedPoint(6, **methods.keywords()) for _ in range(2))
        norm = nn.BatchNorm1d(6)
        parts = (nn.Flatten(), nn.Linear(64, 6), first, nn.Dropout(0.2), nn.Linear(6, 6), second, norm, nn.Linear(6, classes))
        return nn.Sequential(*parts)


class Plain(NetworkFactory):
    def build(self, shape: tuple[int, ...], classes: int, methods: Methods) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def test_steps_fit_the_rows_and_report_themselves() -> None:
    made = task()
    optimizer, seen = sgd(made, lr=0.2), []
    records = [made.step(optimizer, lambda gradients: seen.append(list(gradients))) for _ in range(40)]
    assert records[-1].loss < records[0].loss / 2
    assert seen[0] == ["inject", "deq", "classifier"] and len(seen) == 40
    assert records[0].statuses == {"inner": Status.converged, "adjoint": Status.converged}
    assert records[4].metrics["batch/epoch"] == 1 + 1 / 3 and records[4].metrics["batch/rows"] == 20
    assert 0 <= records[0].metrics["outer/step_accuracy"] <= 1
    solution = made.layers["deq"].solution
    assert solution is not None and records[-1].metrics["inner/iterations"] == int(solution.forward.iterations.max())
    assert records[-1].metrics["cost/evaluations"] == solution.forward.evaluations


def test_one_step_is_that_of_a_plain_loop() -> None:
    """Against the same network written out, its equilibrium unrolled 200 times."""
    made = task(solver=Picard(1e-12, max_steps=500), adjoint=Implicit(Neumann(1e-12, max_steps=500)))
    inject, classifier = (copy.deepcopy(made.model.get_submodule(name)) for name in ("inject", "classifier"))
    layer = made.layers["deq"]
    assert isinstance(layer, TanhFixedPoint)
    weight = layer.weight.detach().clone().requires_grad_()
    batch = made.batches.at((0, 0))
    rows = made.rows["outer"].take(batch.index)
    x, z = inject(rows.x), torch.zeros(20, 8, dtype=torch.float64)
    for _ in range(200):
        z = torch.tanh(z @ weight.T + x)
    loss = nn.functional.cross_entropy(classifier(z), rows.y)
    loss.backward()
    record = made.step(sgd(made, lr=0.0), no_check)
    assert record.loss == pytest.approx(loss.item(), rel=1e-10)
    want = [inject.weight.grad, inject.bias.grad, weight.grad, classifier.weight.grad, classifier.bias.grad]  # pyright: ignore
    for parameter, expected in zip(parameters(made), want, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-11)


def test_pretraining_unrolls_a_few_evaluations_and_then_ends() -> None:
    made = task(pretrain_steps=1, pretrain_iterations=3, solver=Anderson(1e-10))
    inject, classifier = (copy.deepcopy(made.model.get_submodule(name)) for name in ("inject", "classifier"))
    layer = made.layers["deq"]
    assert isinstance(layer, TanhFixedPoint)
    weight = layer.weight.detach().clone().requires_grad_()
    rows = made.rows["outer"].take(made.batches.at((0, 0)).index)
    x, z = inject(rows.x), torch.zeros(20, 8, dtype=torch.float64)
    for _ in range(3):
        z = torch.tanh(z @ weight.T + x)
    loss = nn.functional.cross_entropy(classifier(z), rows.y)
    loss.backward()
    record = made.step(sgd(made, lr=0.0), no_check)
    assert record.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)
    assert layer.solver == Anderson(1e-10)
    assert made.step(sgd(made, lr=0.0), no_check).metrics["inner/residual"] < 1e-10 < record.metrics["inner/residual"]


def test_a_jacobian_penalty_is_in_the_loss_and_shrinks_the_jacobian() -> None:
    exact = {"solver": Picard(1e-12, max_steps=500), "adjoint": Implicit(Neumann(1e-12, max_steps=500))}
    plain, made = task(**exact), task(jacobian=2.0, **exact)
    torch.manual_seed(0)
    one, other = plain.step(sgd(plain), no_check), made.step(sgd(made), no_check)
    penalty = other.metrics["outer/jacobian"]
    assert penalty > 0 and "outer/jacobian" not in one.metrics
    assert other.loss == pytest.approx(one.loss + 2 * penalty, rel=1e-12)
    for _ in range(30):
        plain.step(sgd(plain, lr=0.2), no_check)
        last = made.step(sgd(made, lr=0.2), no_check)
    norms = [float(torch.linalg.matrix_norm(t.layers["deq"].weight.detach())) for t in (plain, made)]  # pyright: ignore
    assert norms[1] < 0.7 * norms[0] and last.metrics["outer/jacobian"] < penalty / 4


def test_every_call_of_a_closure_sees_one_function() -> None:
    made, losses = task(jacobian=1.0, network=Two()), []

    class Twice(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # pyright: ignore
            losses.extend(closure() for _ in range(2))

    torch.manual_seed(0)
    made.step(Twice(parameters(made), 0.1), no_check)
    assert losses[0] == losses[1]


METHODS = [
    (Picard(1e-10, max_steps=500), Implicit(Dense())),
    (Anderson(1e-10), Implicit(Dense())),
    (Newton(1e-10), Implicit(Neumann(1e-10, max_steps=500))),
    (Newton(1e-10), Unrolled()),
    (Anderson(1e-10), Unrolled()),
]


@pytest.mark.parametrize(("solver", "adjoint"), METHODS, ids=str)
def test_methods_agree_on_a_step(solver: Any, adjoint: Any) -> None:
    want, got = (task(solver=s, adjoint=a) for s, a in ((Picard(1e-10, max_steps=500), Unrolled()), (solver, adjoint)))
    losses = [made.step(sgd(made), no_check).loss for made in (want, got)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    for a, b in zip(parameters(want), parameters(got), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_an_evaluation_is_right_and_changes_nothing_but_where_the_running_means_begin() -> None:
    made = task(network=Two(), solver=Picard(1e-12, max_steps=500))
    optimizer = sgd(made, lr=0.1)
    records = [made.step(optimizer, no_check) for _ in range(3)]
    solution, before = made.layers["2"].solution, copy.deepcopy(made.model.state_dict())
    metrics = made.evaluate()
    assert metrics == made.evaluate() and made.model.training and made.layers["2"].solution is solution
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert {name for name in metrics if name.startswith("running/")} == {f"running/{name}" for name in RUNNING}
    assert metrics["running/loss"] == pytest.approx(sum(record.loss for record in records) / 3, rel=1e-12)
    for name in ("inner", "adjoint"):
        mean = sum(record.metrics[f"{name}/iterations"] for record in records) / 3
        assert metrics[f"running/{name}_iterations"] == pytest.approx(mean, rel=1e-12)
    held_out, model = made.rows["test"], copy.deepcopy(made.model).eval()
    logits = torch.cat([model(x.view(1, 1, 8, 8)) for x in held_out.x])
    assert metrics["test/accuracy"] == (logits.argmax(1) == held_out.y).double().mean().item()
    assert metrics["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, held_out.y).item(), rel=1e-9)
    last = made.step(optimizer, no_check)
    assert made.evaluate()["running/loss"] == last.loss


def test_the_size_of_an_evaluations_batches_changes_no_number() -> None:
    few, many = (task(eval_batch_size=size, solver=Picard(1e-13, max_steps=500)).evaluate() for size in (7, 500))
    assert few.keys() == many.keys() and all(few[name] == pytest.approx(many[name], rel=1e-11) for name in few)
    assert "running/loss" not in few


def test_several_layers_are_reported_together() -> None:
    made = task(network=Two())
    record = made.step(sgd(made), no_check)
    found = made.solutions()
    assert list(made.layers) == ["2", "5"] and len(found) == 2
    assert record.metrics["inner/iterations"] == max(int(each.forward.iterations.max()) for each in found)
    mean = torch.cat([each.forward.iterations.double() for each in found]).mean().item()
    assert record.metrics["inner/iterations_mean"] == pytest.approx(mean)
    assert record.metrics["cost/evaluations"] == sum(each.forward.evaluations for each in found)


def test_steps_that_fell_back_are_counted() -> None:
    adjoint = Implicit(Neumann(1e-10, max_steps=1), policy="fallback", fallback=[Dense()])
    made = task(adjoint=adjoint, solver=Picard(1e-10, max_steps=1), policy="fallback", fallback=[Newton(1e-10)])
    optimizer = sgd(made)
    for _ in range(2):
        made.step(optimizer, no_check)
    metrics = made.evaluate()
    assert metrics["running/inner_fallbacks"] == metrics["running/adjoint_fallbacks"] == 1
    assert metrics["running/inner_failed"] == metrics["running/adjoint_failed"] == 0


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("network", [TanhMLP(8), Two()], ids=["tanh", "two"])
def test_a_restored_task_goes_on_bit_for_bit(stop: int, workers: int, network: NetworkFactory) -> None:
    settings: dict[str, Any] = {"dtype": torch.float32, "network": network, "workers": workers, "augment": Augment(padding=1)}
    torch.manual_seed(5)
    through = task(**settings)
    optimizer = sgd(through)
    for step in range(stop):
        through.step(optimizer, no_check)
        if step == 1:
            through.evaluate()  # the running means begin anew after it, also in a run that goes on from here
    file = io.BytesIO()
    torch.save({"task": through.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    expected = [through.step(optimizer, no_check).loss for _ in range(3)]

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = task(generator=9, **settings)
    other = sgd(again)
    again.load_state_dict(saved["task"])
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert [again.step(other, no_check).loss for _ in range(3)] == expected
    assert again.evaluate() == through.evaluate()


def test_workers_change_no_number() -> None:
    settings: dict[str, Any] = {"augment": Augment(padding=1), "network": Two()}
    losses = []
    for workers in (0, 2):
        made = task(workers=workers, **settings)
        optimizer = sgd(made)
        torch.manual_seed(3)  # the network's dropout
        losses.append([made.step(optimizer, no_check).loss for _ in range(5)])
    assert losses[0] == losses[1]


def test_augmentation_changes_steps_and_no_evaluation() -> None:
    plain, changed = task(), task(augment=Augment(padding=2))
    assert plain.evaluate() == changed.evaluate()
    assert plain.step(sgd(plain), no_check).loss != changed.step(sgd(changed), no_check).loss


def test_one_seed_one_network() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), task(3)
    assert torch.equal(torch.get_rng_state(), before)  # initial values come from the run's own generator
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(task(3)), strict=True))
    assert not torch.equal(parameters(first)[0], parameters(task(4))[0])
    single = task(3, torch.float32)
    assert all(torch.equal(a, b.double()) for a, b in zip(parameters(first), parameters(single), strict=True))


def test_the_figures() -> None:
    made = task(network=Two())
    made.step(sgd(made), no_check)
    gradients = [gradient.clone() for gradient in (p.grad for p in parameters(made)) if gradient is not None]
    solutions = made.solutions()
    figures = made.figures()
    assert set(figures) == {"residual", "misclassified"}
    assert all(torch.equal(a, b) for a, b in zip(gradients, [p.grad for p in parameters(made)], strict=True))  # pyright: ignore
    assert all(a is b for a, b in zip(solutions, made.solutions(), strict=True)) and made.model.training
    axes = figures["residual"].axes[0]
    labels = [str(line.get_label()) for line in axes.lines]
    assert axes.get_yscale() == "log" and [label.split()[:2] for label in labels] == [
        ["2", "inner"],
        ["2", "adjoint"],
        ["5", "inner"],
        ["5", "adjoint"],
    ]
    held_out, model = made.rows["test"], copy.deepcopy(made.model).eval()
    wrong = [(int(p), int(y)) for p, y in zip(model(held_out.x.view(-1, 1, 8, 8)).argmax(1), held_out.y, strict=True) if p != y]
    titles = [axes.get_title() for axes in figures["misclassified"].axes]
    assert titles[: len(wrong)] == [f"{p}, is {y}" for p, y in wrong[:25]] and len(wrong) > 5
    for figure in figures.values():
        figure.savefig(io.BytesIO(), format="png")


def test_an_objective_for_the_check() -> None:
    made = task()
    layer = made.layers["deq"]
    loss, solution = made.objective(Newton(1e-10), Implicit(Dense()))
    assert solution.forward.method == "Newton" and layer.solver is None and layer.solution is None and made.model.training
    torch.autograd.grad(loss, parameters(made))
    assert solution.adjoint is not None and solution.adjoint.method == "Dense"


def test_what_it_says_about_itself() -> None:
    facts = task().describe()
    assert (facts["name"], facts["shape"], facts["classes"], facts["layers"]) == ("implicit", [1, 8, 8], 10, ["deq"])
    assert facts["hyperparameters"] == {"inject": 8 * 65, "deq": 64, "classifier": 90}
    assert (facts["batch_size"], facts["batches_per_epoch"], facts["rows"]["outer"]["count"]) == (20, 3, 60)


def test_defaults_are_whole() -> None:
    made = ImplicitTask()
    made.setup(Environment(torch.device("cpu"), torch.float32, 0, False, torch.Generator()))
    assert isinstance(made.layers["deq"], DEQ) and made.batches.size == 100


BAD = [
    ({"batch_size": 61}, r"task\.batch_size=61 is more than the 60 fitted rows"),
    ({"network": Plain()}, r"task\.network=.*Plain.* built Sequential without an implicit layer .*; change task\.network"),
    ({"network": DEQResNet(8, 8, pool=3)}, "pool=3 does not divide images of 8 x 8; change pool"),
    ({"network": DEQResNet(8, 12)}, "inner=12 is not divisible by groups=8"),
    ({"eval_batch_size": 0}, "eval_batch_size=0 must be a whole number >= 1"),
    ({"workers": -1}, "workers=-1 must be a whole number >= 0; change workers"),
    ({"jacobian": -1.0}, "jacobian=-1.0 is not in"),
    ({"pretrain_iterations": 0}, "pretrain_iterations=0 must be a whole number >= 1"),
    ({"fitted": "test"}, "fitted='test' is not one of train, val"),
    ({"policy": "shrug"}, "policy='shrug' is not one of"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**settings)


def test_images_of_another_size_or_channels_are_refused() -> None:
    made = task()
    for shape in ((2, 3, 8, 8), (2, 1, 9, 8)):
        with pytest.raises(ValueError, match=r"the images have shape .* but the network takes .* 1, 8, 8"):
            made.model(torch.zeros(shape, dtype=torch.float64))


def test_a_dense_method_on_a_state_of_images_is_refused_with_its_size() -> None:
    made = task(network=DEQResNet(48, 64), solver=Newton(max_gib=0.1))
    with pytest.raises(ValueError, match=r"20 rows of 3072 entries take 1\.41 GiB, more than max_gib=0\.1; use NewtonKrylov"):
        made.step(sgd(made), no_check)

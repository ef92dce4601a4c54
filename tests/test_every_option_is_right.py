"""Every option's hypergradient has the sign and the size of a difference of the outer loss, and a wrong one fails its test.

``hypergradients.py`` says how: the real task of a command line, at a small size in float64, does one outer step under an
optimizer that stays where it is and looks around. An exact method agrees to ``EXACT``; one that is not, by its nature, to a
tolerance that is stated beside it, always well below the half that a doubled hypergradient would be off by.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypergradients import Mutation, Slope, assert_right, made, measured, settled

from hyperopt.app.options import own

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # PyTorch's own, on the first jvp
EXACT = 1e-4
ROWS = ("dataset.train=12", "dataset.val=6", "dataset.test=6")
ADJOINT = ("adjoint.linear_solver.rtol=1e-11", "adjoint.linear_solver.max_steps=500")
SOLVED = ("solver.rtol=1e-11", "solver.max_steps=500")
# A Jacobian that is not small, so that what the adjoint solve adds is seen.
EQUILIBRIUM = ("task=equilibrium", *ROWS, "task.state_size=6", "task.cell.init_scale=0.15", *SOLVED)
IMPLICIT = ("task=implicit", *ROWS, "task.batch_size=null", *SOLVED, *ADJOINT, "solver=anderson", "adjoint=gmres")
TRAINED = (
    *("task=quadratic", "task.rows=50", "task.val_rows=50", "task.batch_size=null", "task.val_batch_size=null"),
    *("task.dim=6", "task.hyper_dim=3", "task.least=0.5"),
)
CONVERGED = ("inner=lbfgs", "inner.rtol=1e-11", "inner.max_steps=500")
NETWORK = (*ROWS, "task.hidden=[4]", "inner=gradient_descent", "inner.max_steps=20", "adjoint=unrolled")
IMAGES = ("task=stn_images", *ROWS, "task.batch_size=12", "task.val_batch_size=6", "task.classifier.dense=[8]")
DEQ = ("dataset.train=4", "dataset.val=3", "dataset.test=3", "task.network.groups=2")
MDEQ = (*DEQ, "task.network.channels=[4,4]", "task.network.head=[2,2]", "task.network.final=8", "task.network.expansion=1")

CASES: dict[str, tuple[tuple[str, ...], float]] = {
    **{f"solver={name}": ((*EQUILIBRIUM, *ADJOINT), EXACT) for name in ("picard", "anderson", "rre", "broyden")},
    **{f"solver={name}": ((*EQUILIBRIUM, *ADJOINT), EXACT) for name in ("newton", "chord", "newton_krylov")},
    # The linear solvers for any Jacobian through an equilibrium, and all of them through a trained problem, below.
    **{
        f"adjoint={name}": ((*EQUILIBRIUM, *ADJOINT), EXACT) for name in ("anderson", "bicgstab", "gmres", "neumann", "normal_cg")
    },
    "adjoint=dense": (EQUILIBRIUM, EXACT),
    "adjoint=unrolled": (EQUILIBRIUM, EXACT),
    "adjoint=checkpointed": (EQUILIBRIUM, EXACT),
    "adjoint=one_step": (EQUILIBRIUM, 0.1),  # off by the size of the Jacobian
    "adjoint=damped": ((*EQUILIBRIUM, *ADJOINT, "adjoint.damping=1e-3"), 0.01),  # off by about the damping
    "adjoint=phantom": (EQUILIBRIUM, 0.1),  # what five damped steps leave, 0.5^5
    "adjoint=shine": ((*EQUILIBRIUM, "solver=broyden"), 0.1),  # as good as the inverse estimate of the last iterations
    "task/cell=projected": ((*EQUILIBRIUM, *ADJOINT), EXACT),
    "task/cell=householder": (("task=equilibrium", *ROWS, "task.state_size=6", *SOLVED, *ADJOINT, "solver=anderson"), EXACT),
    "task=equilibrium": ((*EQUILIBRIUM[1:], *ADJOINT), EXACT),
    "task=coupled": (("task.rows=10", *SOLVED, *ADJOINT), EXACT),
    "task=implicit": ((*IMPLICIT[1:], "task.network.width=8"), EXACT),
    "task/augment=crop_flip": ((*IMPLICIT, "task.network.width=8"), EXACT),
    "task/network=tanh_mlp": ((*IMPLICIT, "task.network.width=8"), EXACT),
    "task/network=deq_resnet": ((*IMPLICIT, *DEQ, "task.network.channels=4", "task.network.inner=4"), EXACT),
    # Nothing keeps this cell a contraction, so that there need be no equilibrium, and after a second evaluation of it many
    # inputs of a ReLU are exactly at its kink. One evaluation, unrolled.
    "task/network=mdeq": (
        ("task=implicit", *MDEQ, "task.batch_size=null", "adjoint=unrolled", "solver.rtol=0", "solver.max_steps=1"),
        EXACT,
    ),
    **{f"inner={name}": ((*TRAINED, "adjoint=cg", *ADJOINT, *CONVERGED[1:]), EXACT) for name in ("lbfgs", "heavy_ball")},
    "inner=gradient_descent": ((*TRAINED, "adjoint=cg", *ADJOINT, "inner.rtol=1e-9", "inner.step_size=0.5"), EXACT),
    **{
        f"inner={name}": ((*TRAINED, "adjoint=cg", *ADJOINT, "inner.lr=0.05", "inner.max_steps=300"), EXACT)
        for name in ("adam", "torch_optimizer")
    },
    "task=quadratic": ((*TRAINED[1:], *CONVERGED, "adjoint=cg", *ADJOINT), EXACT),
    "task=l2": ((*ROWS, *CONVERGED), EXACT),
    "task=bias_regularization": (("dataset=diabetes", *CONVERGED), EXACT),
    "task=data_cleaning": ((*ROWS, *CONVERGED, "task.decay=0.1", "task.products.curvature=hessian"), EXACT),
    "task=data_distillation": ((*ROWS, *CONVERGED, "task.decay=0.1"), EXACT),
    "task=weight_decay": (NETWORK, EXACT),
    "task=weight_net": (NETWORK, EXACT),
    "task=augmentation": ((*NETWORK, "task.width=2"), EXACT),
    "task/space@task.l2=bounded": (("task=l2", *ROWS, *CONVERGED, "adjoint.rtol=1e-11"), EXACT),
    "task/space@task.l2=positive": (("task=l2", *ROWS, *CONVERGED, "adjoint.rtol=1e-11", "task.l2.map=softplus"), EXACT),
    "task/space@task.centre=real": (("task=bias_regularization", "dataset=diabetes", *CONVERGED), EXACT),
    "task.l2.by=projection": (("task=l2", *ROWS, *CONVERGED, "adjoint.rtol=1e-11"), EXACT),
    "task=few_shot": (
        (
            *("dataset.train=200", "dataset.val=150", "dataset.test=150", "task.channels=[3,4]", "task.tasks=2"),
            *("task.val_tasks=2", "task.test_tasks=2", "inner.max_steps=2"),
        ),
        EXACT,
    ),
    "task=sinusoid": (("inner.max_steps=3", "inner.step_size=0.02"), EXACT),
    "task.meta_sgd=true": (("task=sinusoid", "inner.max_steps=3", "inner.step_size=0.02"), EXACT),
    "task.proximal=5": (
        ("task=sinusoid", "task.hidden=[]", "inner.step_size=0.02", "inner.max_steps=300", "adjoint=cg", *ADJOINT),
        EXACT,
    ),
    "task=stn_ridge": ((), EXACT),
    "task=stn_quadratic": ((), EXACT),
    "task=stn_images": (IMAGES[1:], EXACT),
    "task/classifier=layers": ((*IMAGES, "task.classifier.channels=[4]", "task.classifier.strides=[1]"), EXACT),
    "task/tuned@task.decay=bounded": (("task=stn_ridge",), EXACT),
    "task/tuned@task.decay=positive": (("task=stn_ridge", "stn.mode=classic"), EXACT),
    "+task/tuned@task.tuned.cut_length=discrete": (IMAGES, EXACT),
    "stn.mode=delta": (("task=stn_ridge",), EXACT),
    "stn.mode=delta_linear": (("task=stn_ridge",), EXACT),
}
ADJOINTS: dict[str, tuple[tuple[str, ...], float]] = {  # through training
    **{
        f"adjoint={name}": ((*CONVERGED, *ADJOINT), EXACT)
        for name in ("anderson", "bicgstab", "cg", "gmres", "minres", "neumann", "normal_cg")
    },
    "adjoint=dense": (CONVERGED, EXACT),
    "adjoint=auto": ((*CONVERGED, "adjoint.rtol=1e-11"), EXACT),
    "adjoint=unrolled": (("inner.max_steps=20",), EXACT),
    "adjoint=checkpointed": (("inner.max_steps=20",), EXACT),
    "adjoint=nystrom": (CONVERGED, 0.05),  # off by rho, a hundredth of the least curvature
    "adjoint=one_step": (CONVERGED, 0.35),  # v = g, where the step is 1 / L and the curvature between L / 2 and L
    "adjoint=damped": ((*CONVERGED, *ADJOINT, "adjoint.damping=1e-3"), 0.01),  # off by the damping over the curvature
    "adjoint=phantom": (CONVERGED, 0.35),
    "adjoint=t1t2": ((*CONVERGED, "task.least=0.9", "task.rows=500"), 0.2),  # a Hessian near the identity, which it takes it for
    "adjoint=finite_difference": ((*CONVERGED, "task.least=0.9", "task.rows=500"), 0.2),  # likewise
}
LOOPS: dict[str, tuple[tuple[str, ...], float]] = {  # methods that train the weights themselves, once they have settled
    "adjoint=soba": (("adjoint.step_size=0.5",), 1e-3),
    "adjoint=saba": (("adjoint.step_size=0.5",), 1e-3),
    "adjoint=stocbio": (("adjoint.step_size=0.5", "adjoint.steps=2"), 0.1),  # ten terms of its series
    "adjoint=f2sa": (("adjoint.steps=2", "adjoint.multiplier=20", "adjoint.growth=0.1"), 0.05),  # O(1 / penalty)
    "adjoint=v_pbgd": (("adjoint.step_size=0.5", "adjoint.ramp=50", "adjoint.end=100"), 0.05),  # likewise
}
OPTIMIZERS = {
    **{f"optimizer={name}": ("optimizer.lr=1e-3",) for name in ("sgd", "momentum", "adam", "adamw")},
    "optimizer=lbfgs": (),
    **{f"optimizer/scheduler={name}": ("optimizer=sgd", "optimizer.lr=1e-3") for name in ("step", "exponential", "power")},
    "optimizer/scheduler=cosine": ("optimizer=sgd", "optimizer.lr=1e-3"),
    "optimizer/scheduler=plateau": ("optimizer=sgd", "optimizer.lr=1e-3"),
}


def of(option: str, overrides: tuple[str, ...], steps: int = 0) -> list[Slope]:
    with made(*overrides, option) as (task, _):
        if option.endswith("mdeq"):  # away from biases of zero, where its ReLUs have a kink at the start of the iteration
            draw = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for tensor in (tensor for group in task.groups().values() for tensor in group):
                    tensor += 0.05 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
        return settled(task, steps) if steps else measured(task)


def check_an_option(option: str) -> None:
    overrides, tolerance = CASES[option]
    assert_right(of(option, overrides), tolerance)


def check_an_adjoint_of_a_trained_problem(option: str) -> None:
    overrides, tolerance = ADJOINTS[option]
    assert_right(of(option, (*TRAINED, *overrides)), tolerance)


def check_a_method_that_trains_itself(option: str) -> None:
    overrides, tolerance = LOOPS[option]
    assert_right(of(option, (*TRAINED, *overrides), steps=100), tolerance)


def check_an_optimizer(option: str) -> None:
    """Its first step is along the hypergradient that differences confirm, and lowers the outer loss by what that says."""
    overrides = (*TRAINED, *CONVERGED, "adjoint=cg", *ADJOINT, *OPTIMIZERS[option], option)
    with made(*overrides) as (task, built):
        optimizer = built.optimizer.build(task.groups())
        [lam] = task.groups()["lam"]
        assert_right(measured(task), EXACT)
        before, start, grads = task.evaluate()["outer/loss"], lam.detach().clone(), []
        task.step(optimizer, lambda gradients: grads.append(gradients["lam"][0].clone()))
        gone, foreseen = task.evaluate()["outer/loss"] - before, float(grads[0] @ (lam.detach() - start))
        assert foreseen < 0 and gone < 0
        if "lbfgs" not in option:  # whose steps are as long as they should be
            assert abs(gone - foreseen) < 0.02 * abs(foreseen)


CHECKS: dict[Callable[[str], None], tuple[str, ...]] = {
    check_an_option: tuple(CASES),
    check_an_adjoint_of_a_trained_problem: tuple(ADJOINTS),
    check_a_method_that_trains_itself: tuple(LOOPS),
    check_an_optimizer: tuple(OPTIMIZERS),
}
PAIRS = [(check, option) for check in CHECKS for option in CHECKS[check]]
IDS = [f"{check.__name__[6:]}-{option}" for check, option in PAIRS]
# A linear solver is right for an equilibrium already, and these take the longest: in the quick run they are left out.
QUICK = ("adjoint=cg", "adjoint=auto", "adjoint=unrolled", "adjoint=nystrom", "adjoint=soba", "adjoint=saba")
LONG = ("task/network=deq_resnet", "task.proximal=5", "inner=heavy_ball", "inner=adam")  # others of their kind are quick


def marks(check: Callable[[str], None], option: str) -> tuple[pytest.MarkDecorator, ...]:
    quick = (check is check_an_option or not option.startswith("adjoint") or option in QUICK) and option not in LONG
    return () if quick else (pytest.mark.slow,)


ONE_OF_EACH = {  # group, and what stands for it
    "solver": (check_an_option, "solver=anderson"),
    "adjoint": (check_an_option, "adjoint=gmres"),
    "adjoint, not exact": (check_an_option, "adjoint=one_step"),
    "adjoint, through training": (check_an_adjoint_of_a_trained_problem, "adjoint=cg"),
    "adjoint, trains itself": (check_a_method_that_trains_itself, "adjoint=soba"),
    "inner": (check_an_option, "inner=lbfgs"),
    "task": (check_an_option, "task=coupled"),
    "cell": (check_an_option, "task/cell=householder"),
    "network": (check_an_option, "task/network=tanh_mlp"),
    "space": (check_an_option, "task/space@task.l2=bounded"),
    "optimizer": (check_an_optimizer, "optimizer=adam"),
    "classifier": (check_an_option, "task/classifier=layers"),
    "tuned": (check_an_option, "task/tuned@task.decay=bounded"),
}


def names(option: str) -> str:
    """An option as ``own`` writes it: without the place that it is put at."""
    group, _, name = option.removeprefix("+").partition("=")
    return f"{group.partition('@')[0]}/{name}"


def test_no_option_is_left_out() -> None:
    groups = ("task/", "solver/", "adjoint/", "inner/", "optimizer/")
    checked = {names(option) for options in CHECKS.values() for option in options}
    assert {each for each in own() if each.startswith(groups)} - checked == set()


@pytest.mark.cases(quick=20)
@pytest.mark.parametrize(("check", "option"), [pytest.param(*pair, marks=marks(*pair)) for pair in PAIRS], ids=IDS)
def test_its_hypergradient_is_a_difference(check: Callable[[str], None], option: str) -> None:
    check(option)


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("option", [option for option in CASES if option.startswith("task=")])
def test_an_evaluation_has_only_names_that_the_task_states(option: str) -> None:
    """Else ``trainer.monitor`` would refuse a name that there is."""
    with made(*CASES[option][0], option) as (task, built):
        task.step(built.optimizer.build(task.groups()), lambda gradients: None)
        assert set(task.evaluate()) <= set(task.MEASURES)


def assert_caught(check: Callable[[str], None], option: str, factor: float, patch: pytest.MonkeyPatch) -> None:
    Mutation(factor, patch).outer()
    with pytest.raises(AssertionError, match=r"Slope\(group="):
        check(option)


@pytest.mark.cases(quick=2, slow=6)
@pytest.mark.parametrize("factor", [-1.0, pytest.param(2.0, marks=pytest.mark.slow)], ids=["negated", "doubled"])
@pytest.mark.parametrize("group", ONE_OF_EACH)
def test_a_wrong_one_is_caught(group: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(*ONE_OF_EACH[group], factor, monkeypatch)


@pytest.mark.cases(slow=8)
@pytest.mark.slow
@pytest.mark.parametrize("factor", [-1.0, pytest.param(2.0, marks=pytest.mark.manual)], ids=["negated", "doubled"])
@pytest.mark.parametrize(("check", "option"), PAIRS, ids=IDS)
def test_a_wrong_one_of_any_option_is_caught(
    check: Callable[[str], None], option: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(check, option, factor, monkeypatch)

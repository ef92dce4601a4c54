"""Meta-learning: weights from which a few examples of a new task are learned. A subclass gives the network and the tasks.

    min over theta   mean_t E_t(w_t(theta))           E_t: loss on the queries of task t
    MAML             w_t: a few training steps on the shots of task t, from theta; differentiated by unrolling
    iMAML            w_t = argmin L_t(w) + proximal / 2 |w - theta|^2; differentiated at the minimum by an implicit adjoint

The tasks of an outer step form one inner problem. ``w`` has a row of weights for each task and the inner loss is the sum over
the tasks, so each task is trained as it would be alone. Task number ``i`` depends only on the seed and ``i``; every outer step
takes the next ``tasks`` numbers. The tasks of ``val/*`` and ``test/*`` are other ones and always the same. With ``meta_sgd``
the learning rate of the inner solver is a hyperparameter too, one for each weight.

References: C. Finn, P. Abbeel and S. Levine, ICML 2017, arXiv 1703.03400; A. Rajeswaran, C. Finn, S. Kakade and S. Levine,
NeurIPS 2019, arXiv 1909.04630; Z. Li, F. Zhou, F. Chen and H. Li, Meta-SGD, arXiv 1707.09835.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyperopt.bilevel.estimate import State
from hyperopt.bilevel.estimator import Estimator
from hyperopt.bilevel.functional import Functional
from hyperopt.bilevel.inner.base import DifferentiableSolver, InnerSolver
from hyperopt.bilevel.problem import BilevelProblem, Composite
from hyperopt.core.adjoints.base import Adjoint
from hyperopt.core.adjoints.checkpointed import Checkpointed
from hyperopt.core.adjoints.unrolled import Unrolled
from hyperopt.core.checks import check_count, check_counts, check_flag, check_number
from hyperopt.core.policy import SolveError
from hyperopt.core.random import Keys
from hyperopt.core.solvers.base import FixedPointSolver
from hyperopt.core.status import Solution
from hyperopt.spaces.hyperparameters import Hyperparameters
from hyperopt.tasks.base import Environment, GradientCheck, StepRecord
from hyperopt.tasks.bilevel import BilevelSetup, BilevelTask, starting_at

SPLITS = ("outer", "val", "test")  # the tasks of each are drawn independently of the others
AT_A_TIME = 100  # number of tasks that an evaluation trains at a time, which bounds its memory


@dataclass(frozen=True)
class Episodes:
    """The examples of some tasks.

    Attributes:
        x, y: inputs and targets to learn from (the shots). shape of each: (tasks, examples, ...)
        query_x, query_y: inputs and targets to test on. shape of each: (tasks, queries, ...)
    """

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor


@dataclass(eq=False)
class MetaTask(BilevelTask):
    """Initial weights of a network, learned so that little training adapts it to a new task.

    Attributes:
        adjoint: the adjoint (default: backpropagation through training).
        warm_start: not a setting here, since every training starts from the learned weights.
        tasks: number of tasks of an outer step.
        shots: number of examples of a task to learn from (of each class, if there are classes).
        queries: number of other examples on which the adapted network is tested, likewise.
        proximal: strength of the penalty on the distance from the initial weights (0: none, which is MAML).
        meta_sgd: whether to learn a learning rate of the inner solver for each weight, from the solver's own rate.
        val_tasks, test_tasks: numbers of tasks of ``val/*`` and of ``test/*``.
        eval_shots: numbers of shots for the metrics ``test/<kind>_<shots>_shots_<steps>_steps`` (none: ``shots``).
        eval_steps: numbers of inner steps for these metrics; 0 means the initial weights.
        env: the environment of the run, after ``setup``.
        kinds: names of the metrics that ``measures`` returns.
        model: the network, after ``setup``.
        episodes: the tasks of the present outer step, after ``setup``.
    """

    spaces = ()
    kinds: ClassVar[tuple[str, ...]] = ("loss",)

    adjoint: Adjoint | Estimator | None = field(default_factory=Unrolled)
    warm_start: bool = field(default=False, init=False)
    tasks: int = 25
    shots: int = 10
    queries: int = 10
    proximal: float = 0.0
    meta_sgd: bool = False
    val_tasks: int = 100
    test_tasks: int = 600
    eval_shots: tuple[int, ...] = ()
    eval_steps: tuple[int, ...] = (1, 5, 10)

    env: Environment = field(init=False, repr=False)
    model: Functional = field(init=False, repr=False)
    episodes: Episodes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ranges, and that adjoint, inner solver and method fit together."""
        super().__post_init__()
        for name in ("tasks", "shots", "queries", "val_tasks", "test_tasks"):
            check_count(self, name)
        check_number(self, "proximal", 0.0)
        check_flag(self, "meta_sgd")
        check_counts(self, "eval_shots")
        check_counts(self, "eval_steps", 0)
        names = (f"{split}/{{}}" for split in SPLITS)
        further = (self._further(shots, steps) for shots in self._shots for steps in self.eval_steps)
        measured = tuple(name.format(kind) for name in (*names, *further) for kind in self.kinds)
        self.MEASURES = measured  # pyright: ignore[reportAttributeAccessIssue]  # an attribute of the object
        who, through, inner = type(self).__name__, isinstance(self.adjoint, Unrolled | Checkpointed), super()._inner
        used = f"adjoint={'auto' if self.adjoint is None else type(self.adjoint).__name__}"
        if isinstance(self.adjoint, Estimator):
            raise ValueError(
                f"{who}: {used} continues training from one outer step to the next, but each has new tasks; change adjoint"
            )
        if through and not isinstance(inner, DifferentiableSolver):
            raise ValueError(f"{who}: {used} cannot differentiate inner={type(inner).__name__}; change inner")
        if isinstance(self.adjoint, Unrolled) and self.adjoint.last is not None:
            raise ValueError(f"{who}: adjoint.last={self.adjoint.last} never reaches the initial weights; change it to null")
        if not through and (not self.proximal or self.meta_sgd):
            why = "a rate" if self.proximal else "the start of training if proximal=0"
            raise ValueError(
                f"{who}: {used} differentiates the minimum, which does not depend on {why}; change adjoint to unrolled"
            )
        rates = [name for name in getattr(inner, "rate_names", ()) if isinstance(getattr(inner, name), str)]
        if rates:
            raise ValueError(
                f"{who}: inner.{rates[0]}={getattr(inner, rates[0])!r} names a hyperparameter that does not exist here; change "
                f"inner.{rates[0]} to a number, and meta_sgd to true if it is to be learned"
            )

    @abstractmethod
    def network(self, env: Environment) -> nn.Module:
        """Build the network of one task, with initial values from ``env.generator``."""

    @abstractmethod
    def draw(self, keys: Keys, split: str, shots: int) -> Episodes:
        """Return the tasks of a split with these keys."""

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of each task. shapes: (tasks, examples, ...) to (tasks,)."""

    def measures(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Return a mean over the tasks for each of ``kinds``."""
        return {"loss": float(self.losses(outputs, y).mean())}

    def load(self, env: Environment) -> None:
        """Load nothing; a subclass may have a dataset."""

    def build(self, env: Environment) -> BilevelSetup:
        """Build the network, with a row of weights for each task."""
        self.env = env
        self.model = Functional(self.network(env).to(env.device, env.dtype))
        self.episodes = self.drawn("outer", 0, self.tasks)
        return BilevelSetup(self.problem(lambda: self.episodes), self.rows_of(self.model.w, self.tasks), {}, {})

    def hyperparameters(self, env: Environment) -> Hyperparameters:
        """Return the network's initial weights and, with ``meta_sgd``, the inner solver's own rate for each weight."""
        trees = {"initial": self.model.w}
        if self.meta_sgd:
            rate = getattr(super()._inner, self._rate)
            trees["rate"] = {name: torch.full_like(leaf, rate) for name, leaf in self.model.w.items()}
        return starting_at(trees)

    @property
    def _rate(self) -> str:
        """Name of the inner solver's argument that is its rate."""
        inner = super()._inner
        assert isinstance(inner, DifferentiableSolver)
        return inner.rate_names[0]

    @property
    def _inner(self) -> InnerSolver:
        return replace(super()._inner, **{self._rate: "rate"}) if self.meta_sgd else super()._inner

    @staticmethod
    def rows_of(w: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return weights repeated for each task. shapes: (...) to (count, ...)."""
        return {name: leaf.detach().expand(count, *leaf.shape).clone() for name, leaf in w.items()}

    def outputs(self, w: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return the network at each task's weights on that task's inputs. shapes: (tasks, ...), (tasks, examples, ...)."""
        return torch.vmap(self.model)(w, x)

    def problem(self, episodes: Callable[[], Episodes]) -> BilevelProblem:
        """Return the two losses on tasks. Their batch is None, so with several ranks each computes all tasks."""

        def model(w: dict[str, Tensor], lam: dict[str, Any], batch: None) -> Tensor:
            return self.outputs(w, episodes().x)

        def criterion(z: Tensor, w: dict[str, Tensor], lam: dict[str, Any], batch: None) -> Tensor:
            loss = self.losses(z, episodes().y).sum()
            if not self.proximal:
                return loss
            away = [(w[name] - start).square().sum() for name, start in lam["initial"].items()]
            return loss + self.proximal / 2 * torch.stack(away).sum()

        def outer(w: dict[str, Tensor], lam: dict[str, Any], batch: None) -> Tensor:
            at = episodes()
            return self.losses(self.outputs(w, at.query_x), at.query_y).mean()

        def initial(lam: dict[str, Any]) -> dict[str, Tensor]:
            count = len(episodes().x)
            return {name: start.expand(count, *start.shape) for name, start in lam["initial"].items()}

        return BilevelProblem(Composite(model, criterion), outer, initial=initial)

    def drawn(self, split: str, first: int, count: int, shots: int | None = None) -> Episodes:
        """Return the tasks of a split with numbers ``first`` to ``first + count - 1``."""
        numbers = torch.arange(first, first + count, device=self.env.device)
        return self.draw(Keys(numbers, self.env.seed, SPLITS.index(split)), split, shots or self.shots)

    def step(self, optimizer: torch.optim.Optimizer, check: GradientCheck) -> StepRecord:
        """Do one outer step, on the next tasks."""
        self.episodes = self.drawn("outer", self._steps * self.tasks, self.tasks)
        return super().step(optimizer, check)

    def adapted(self, episodes: Episodes, steps: int | None = None) -> dict[str, Tensor]:
        """Return the weights of each task after ``steps`` inner steps from the initial weights (None: as many as in training)."""
        lam = self.hyper.read()
        w = self.rows_of(lam["initial"], len(episodes.x))
        if steps != 0:
            inner = self._inner if steps is None else replace(self._inner, max_steps=steps)
            inner.solve(self.problem(lambda: episodes), lam, State(w))
        return w

    def evaluate(self) -> dict[str, float]:
        """Adapt to tasks that are always the same, and measure on their queries.

        ``outer/*`` uses the tasks of the first outer step; ``val/*`` and ``test/*`` have their own tasks. They take the steps
        of the inner solver. ``test/<kind>_<shots>_shots_<steps>_steps`` takes the steps in its name, and is NaN if these
        diverge: the weights and rates were not learned for so many.
        """
        found: dict[str, float] = {}

        @torch.no_grad()
        def measure(split: str, count: int, name: str, shots: int | None = None, steps: int | None = None) -> None:
            totals = dict.fromkeys(self.kinds, 0.0)
            for first in range(0, count, AT_A_TIME):
                some = min(AT_A_TIME, count - first)
                at = self.drawn(split, first, some, shots)
                try:
                    w = self.adapted(at, steps)
                except SolveError:
                    if steps is None:
                        raise
                    totals = dict.fromkeys(self.kinds, math.nan)
                    break
                for kind, value in self.measures(self.outputs(w, at.query_x), at.query_y).items():
                    totals[kind] += value * some / count
            found.update({name.format(kind): value for kind, value in totals.items()})

        for split, count in zip(SPLITS, (self.tasks, self.val_tasks, self.test_tasks), strict=True):
            measure(split, count, split + "/{}")
        for shots in self._shots:
            for steps in self.eval_steps:
                measure("test", self.test_tasks, self._further(shots, steps), shots, steps)
        return found

    @property
    def _shots(self) -> tuple[int, ...]:
        """The numbers of shots of the further metrics."""
        return self.eval_shots or (self.shots,)

    @staticmethod
    def _further(shots: int, steps: int) -> str:
        """Return the name of a further metric, as a format string for its kind."""
        return f"test/{{}}_{shots}_shots_{steps}_steps"

    def objective(self, solver: FixedPointSolver, adjoint: Adjoint) -> tuple[Tensor, Solution]:
        """Return the outer loss at the minimum of the inner loss on the next tasks; see ``Task.objective``.

        Raises:
            NotImplementedError: ``proximal`` is 0, so the minimum does not depend on the initial weights.
        """
        if not self.proximal:
            raise NotImplementedError("mode=check needs a minimum that depends on the initial weights; set task.proximal above 0")
        self.episodes = self.drawn("outer", self._steps * self.tasks, self.tasks)
        return super().objective(solver, adjoint)

    def learned(self) -> Any:
        """Refuse: the network predicts nothing before it is adapted to a task."""
        raise NotImplementedError(f"task={self.name} learns initial weights, which predict nothing before they are trained")

    def describe_data(self) -> dict[str, Any]:
        """Return the number of tasks of each metric."""
        return {"dataset": "drawn", "rows": {"outer": self.tasks, "val": self.val_tasks, "test": self.test_tasks}}

"""Bilevel hyperparameter optimization by implicit hypergradients. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt.core.lazy import lazily

__version__ = "0.1.0"
__docformat__ = "google"  # for pdoc

_PUBLIC = {
    "fixed_point": "hyperopt.core.fixed_point",
    "diagnose": "hyperopt.core.diagnose",
    "Diagnosis": "hyperopt.core.diagnose",
    "Solution": "hyperopt.core.status",
    "SolveStats": "hyperopt.core.status",
    "Status": "hyperopt.core.statuses",
    "SolveError": "hyperopt.core.policy",
    "SolveWarning": "hyperopt.core.policy",
    "Certificate": "hyperopt.core.certificate",
    "Constants": "hyperopt.core.certificate",
    "certify": "hyperopt.core.certificate",
    "check_hypergradient": "hyperopt.core.verify",
    "compare_adjoints": "hyperopt.core.verify",
    "ClosureError": "hyperopt.core.captured",
    "ImpureMapError": "hyperopt.core.policy",
    "check_map": "hyperopt.core.purity",
    "over_ranks": "hyperopt.bilevel.over_ranks",
    "mean_over_ranks": "hyperopt.core.distributed",
    "InexactError": "hyperopt.core.differentiate",
    "LinearOperator": "hyperopt.core.operator",
    "FunctionOperator": "hyperopt.core.operator",
    "MatrixOperator": "hyperopt.core.operator",
    "ClosedForm": "hyperopt.core.operator",
    "Picard": "hyperopt.core.solvers.picard",
    "Anderson": "hyperopt.core.solvers.anderson",
    "RRE": "hyperopt.core.solvers.rre",
    "Broyden": "hyperopt.core.solvers.broyden",
    "Newton": "hyperopt.core.newton.newton",
    "NewtonKrylov": "hyperopt.core.newton.newton_krylov",
    "Chord": "hyperopt.core.newton.chord",
    "Neumann": "hyperopt.core.linear.neumann",
    "LinearAnderson": "hyperopt.core.linear.anderson",
    "GMRES": "hyperopt.core.linear.gmres",
    "BiCGStab": "hyperopt.core.linear.bicgstab",
    "CG": "hyperopt.core.linear.cg",
    "MINRES": "hyperopt.core.linear.minres",
    "NormalCG": "hyperopt.core.linear.normal_cg",
    "Dense": "hyperopt.core.linear.dense",
    "Implicit": "hyperopt.core.adjoints.implicit",
    "Shine": "hyperopt.core.adjoints.shine",
    "Unrolled": "hyperopt.core.adjoints.unrolled",
    "OneStep": "hyperopt.core.adjoints.onestep",
    "Phantom": "hyperopt.core.adjoints.phantom",
    "Damped": "hyperopt.core.adjoints.damped",
    "Checkpointed": "hyperopt.core.adjoints.checkpointed",
    "BilevelProblem": "hyperopt.bilevel.problem",
    "Tuner": "hyperopt.bilevel.tuner",
    "Bilevel": "hyperopt.bilevel.hypergradient",
    "hypergradient": "hyperopt.bilevel.hypergradient",
    "Estimate": "hyperopt.bilevel.estimate",
    "Auto": "hyperopt.bilevel.auto",
    "Choice": "hyperopt.bilevel.estimate",
    "Estimator": "hyperopt.bilevel.estimator",
    "Composite": "hyperopt.bilevel.problem",
    "Functional": "hyperopt.bilevel.functional",
    "GradientMap": "hyperopt.bilevel.gradient_map",
    "InnerConstants": "hyperopt.bilevel.problem",
    "Minibatches": "hyperopt.bilevel.batches",
    "ProductSettings": "hyperopt.bilevel.implicit",
    "SparseRows": "hyperopt.data.sparse",
    "GradientDescent": "hyperopt.bilevel.inner.gradient_descent",
    "HeavyBall": "hyperopt.bilevel.inner.heavy_ball",
    "InnerAdam": "hyperopt.bilevel.inner.adam",
    "TorchOptimizer": "hyperopt.bilevel.inner.torch_optimizer",
    "InnerLBFGS": "hyperopt.bilevel.inner.lbfgs",
    "T1T2": "hyperopt.bilevel.t1t2",
    "FiniteDifference": "hyperopt.bilevel.finite_difference",
    "SOBA": "hyperopt.bilevel.soba",
    "SABA": "hyperopt.bilevel.saba",
    "StocBiO": "hyperopt.bilevel.stocbio",
    "F2SA": "hyperopt.bilevel.f2sa",
    "VPBGD": "hyperopt.bilevel.v_pbgd",
    "Nystrom": "hyperopt.core.linear.nystrom",
    "Hyperparameters": "hyperopt.spaces.hyperparameters",
    "Space": "hyperopt.spaces.space",
    "Real": "hyperopt.spaces.space",
    "Positive": "hyperopt.spaces.space",
    "Bounded": "hyperopt.spaces.space",
    "Simplex": "hyperopt.spaces.space",
    "SpectralBall": "hyperopt.spaces.spectral_ball",
    "PositiveDefinite": "hyperopt.spaces.positive_definite",
    "HyperSpace": "hyperopt.stn.space",
    "convert": "hyperopt.stn.network",
    "SelfTuning": "hyperopt.stn.step",
    "SelfTuningSettings": "hyperopt.stn.rounds",
    "load_exported": "hyperopt.app.export.load",
}
__all__ = ["__version__", *_PUBLIC, "nn", "stn"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt import app as app
    from hyperopt import bilevel as bilevel
    from hyperopt import core as core
    from hyperopt import data as data
    from hyperopt import integrations as integrations
    from hyperopt import nn as nn
    from hyperopt import spaces as spaces
    from hyperopt import stn as stn
    from hyperopt import tasks as tasks
    from hyperopt.app.export.load import load_exported as load_exported
    from hyperopt.bilevel.auto import Auto as Auto
    from hyperopt.bilevel.batches import Minibatches as Minibatches
    from hyperopt.bilevel.estimate import Choice as Choice
    from hyperopt.bilevel.estimate import Estimate as Estimate
    from hyperopt.bilevel.estimator import Estimator as Estimator
    from hyperopt.bilevel.f2sa import F2SA as F2SA
    from hyperopt.bilevel.finite_difference import FiniteDifference as FiniteDifference
    from hyperopt.bilevel.functional import Functional as Functional
    from hyperopt.bilevel.gradient_map import GradientMap as GradientMap
    from hyperopt.bilevel.hypergradient import Bilevel as Bilevel
    from hyperopt.bilevel.hypergradient import hypergradient as hypergradient
    from hyperopt.bilevel.implicit import ProductSettings as ProductSettings
    from hyperopt.bilevel.inner.adam import InnerAdam as InnerAdam
    from hyperopt.bilevel.inner.gradient_descent import GradientDescent as GradientDescent
    from hyperopt.bilevel.inner.heavy_ball import HeavyBall as HeavyBall
    from hyperopt.bilevel.inner.lbfgs import InnerLBFGS as InnerLBFGS
    from hyperopt.bilevel.inner.torch_optimizer import TorchOptimizer as TorchOptimizer
    from hyperopt.bilevel.over_ranks import over_ranks as over_ranks
    from hyperopt.bilevel.problem import BilevelProblem as BilevelProblem
    from hyperopt.bilevel.problem import Composite as Composite
    from hyperopt.bilevel.problem import InnerConstants as InnerConstants
    from hyperopt.bilevel.saba import SABA as SABA
    from hyperopt.bilevel.soba import SOBA as SOBA
    from hyperopt.bilevel.stocbio import StocBiO as StocBiO
    from hyperopt.bilevel.t1t2 import T1T2 as T1T2
    from hyperopt.bilevel.tuner import Tuner as Tuner
    from hyperopt.bilevel.v_pbgd import VPBGD as VPBGD
    from hyperopt.core.adjoints.checkpointed import Checkpointed as Checkpointed
    from hyperopt.core.adjoints.damped import Damped as Damped
    from hyperopt.core.adjoints.implicit import Implicit as Implicit
    from hyperopt.core.adjoints.onestep import OneStep as OneStep
    from hyperopt.core.adjoints.phantom import Phantom as Phantom
    from hyperopt.core.adjoints.shine import Shine as Shine
    from hyperopt.core.adjoints.unrolled import Unrolled as Unrolled
    from hyperopt.core.captured import ClosureError as ClosureError
    from hyperopt.core.certificate import Certificate as Certificate
    from hyperopt.core.certificate import Constants as Constants
    from hyperopt.core.certificate import certify as certify
    from hyperopt.core.diagnose import Diagnosis as Diagnosis
    from hyperopt.core.diagnose import diagnose as diagnose
    from hyperopt.core.differentiate import InexactError as InexactError
    from hyperopt.core.distributed import mean_over_ranks as mean_over_ranks
    from hyperopt.core.fixed_point import fixed_point as fixed_point
    from hyperopt.core.linear.anderson import LinearAnderson as LinearAnderson
    from hyperopt.core.linear.bicgstab import BiCGStab as BiCGStab
    from hyperopt.core.linear.cg import CG as CG
    from hyperopt.core.linear.dense import Dense as Dense
    from hyperopt.core.linear.gmres import GMRES as GMRES
    from hyperopt.core.linear.minres import MINRES as MINRES
    from hyperopt.core.linear.neumann import Neumann as Neumann
    from hyperopt.core.linear.normal_cg import NormalCG as NormalCG
    from hyperopt.core.linear.nystrom import Nystrom as Nystrom
    from hyperopt.core.newton.chord import Chord as Chord
    from hyperopt.core.newton.newton import Newton as Newton
    from hyperopt.core.newton.newton_krylov import NewtonKrylov as NewtonKrylov
    from hyperopt.core.operator import ClosedForm as ClosedForm
    from hyperopt.core.operator import FunctionOperator as FunctionOperator
    from hyperopt.core.operator import LinearOperator as LinearOperator
    from hyperopt.core.operator import MatrixOperator as MatrixOperator
    from hyperopt.core.policy import ImpureMapError as ImpureMapError
    from hyperopt.core.policy import SolveError as SolveError
    from hyperopt.core.policy import SolveWarning as SolveWarning
    from hyperopt.core.purity import check_map as check_map
    from hyperopt.core.solvers.anderson import Anderson as Anderson
    from hyperopt.core.solvers.broyden import Broyden as Broyden
    from hyperopt.core.solvers.picard import Picard as Picard
    from hyperopt.core.solvers.rre import RRE as RRE
    from hyperopt.core.status import Solution as Solution
    from hyperopt.core.status import SolveStats as SolveStats
    from hyperopt.core.statuses import Status as Status
    from hyperopt.core.verify import check_hypergradient as check_hypergradient
    from hyperopt.core.verify import compare_adjoints as compare_adjoints
    from hyperopt.data.sparse import SparseRows as SparseRows
    from hyperopt.spaces.hyperparameters import Hyperparameters as Hyperparameters
    from hyperopt.spaces.positive_definite import PositiveDefinite as PositiveDefinite
    from hyperopt.spaces.space import Bounded as Bounded
    from hyperopt.spaces.space import Positive as Positive
    from hyperopt.spaces.space import Real as Real
    from hyperopt.spaces.space import Simplex as Simplex
    from hyperopt.spaces.space import Space as Space
    from hyperopt.spaces.spectral_ball import SpectralBall as SpectralBall
    from hyperopt.stn.network import convert as convert
    from hyperopt.stn.rounds import SelfTuningSettings as SelfTuningSettings
    from hyperopt.stn.space import HyperSpace as HyperSpace
    from hyperopt.stn.step import SelfTuning as SelfTuning


_PACKAGES = ("app", "bilevel", "core", "data", "integrations", "nn", "spaces", "stn", "tasks")
__getattr__, __dir__ = lazily(__name__, _PUBLIC, __all__, packages=_PACKAGES)

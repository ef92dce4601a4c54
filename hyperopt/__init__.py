"""Bilevel hyperparameter optimization by implicit hypergradients. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt.lazy import lazily

__version__ = "0.1.0"

_PUBLIC = {
    "fixed_point": "hyperopt.primitive",
    "diagnose": "hyperopt.diagnosis",
    "Diagnosis": "hyperopt.diagnosis",
    "Solution": "hyperopt.status",
    "SolveStats": "hyperopt.status",
    "Status": "hyperopt.status",
    "SolveError": "hyperopt.policy",
    "SolveWarning": "hyperopt.policy",
    "Certificate": "hyperopt.certificate",
    "Constants": "hyperopt.certificate",
    "certify": "hyperopt.certificate",
    "check_hypergradient": "hyperopt.check",
    "compare_adjoints": "hyperopt.check",
    "ClosureError": "hyperopt.closure",
    "ImpureMapError": "hyperopt.purity",
    "check_map": "hyperopt.purity",
    "over_ranks": "hyperopt.bilevel.over_ranks",
    "mean_over_ranks": "hyperopt.mesh",
    "InexactError": "hyperopt.adjoints.attach",
    "Picard": "hyperopt.solvers.picard",
    "Anderson": "hyperopt.solvers.anderson",
    "Broyden": "hyperopt.solvers.broyden",
    "Newton": "hyperopt.solvers.newton",
    "NewtonKrylov": "hyperopt.solvers.newton_krylov",
    "Chord": "hyperopt.solvers.chord",
    "Neumann": "hyperopt.linsolve.neumann",
    "LinearAnderson": "hyperopt.linsolve.anderson",
    "GMRES": "hyperopt.linsolve.gmres",
    "BiCGStab": "hyperopt.linsolve.bicgstab",
    "CG": "hyperopt.linsolve.cg",
    "NormalCG": "hyperopt.linsolve.normal_cg",
    "Dense": "hyperopt.linsolve.dense",
    "Implicit": "hyperopt.adjoints.implicit",
    "Shine": "hyperopt.adjoints.shine",
    "Unrolled": "hyperopt.adjoints.unrolled",
    "OneStep": "hyperopt.adjoints.onestep",
    "Phantom": "hyperopt.adjoints.phantom",
    "Checkpointed": "hyperopt.adjoints.checkpointed",
    "BilevelProblem": "hyperopt.bilevel.problem",
    "Bilevel": "hyperopt.bilevel.hypergradient",
    "hypergradient": "hyperopt.bilevel.hypergradient",
    "Estimate": "hyperopt.bilevel.estimate",
    "Estimator": "hyperopt.bilevel.estimator",
    "Composite": "hyperopt.bilevel.gauss_newton",
    "Functional": "hyperopt.bilevel.functional",
    "GradientMap": "hyperopt.bilevel.gradient_map",
    "InnerConstants": "hyperopt.bilevel.problem",
    "Minibatches": "hyperopt.bilevel.batches",
    "ProductSettings": "hyperopt.bilevel.settings",
    "SparseRows": "hyperopt.nn.sparse",
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
    "Nystrom": "hyperopt.linsolve.nystrom",
    "Hyperparameters": "hyperopt.spaces",
    "Space": "hyperopt.spaces",
    "Real": "hyperopt.spaces",
    "Positive": "hyperopt.spaces",
    "Bounded": "hyperopt.spaces",
    "Simplex": "hyperopt.spaces",
    "SpectralBall": "hyperopt.spaces",
    "HyperSpace": "hyperopt.stn.space",
    "convert": "hyperopt.stn.network",
    "SelfTuning": "hyperopt.stn.step",
    "SelfTuningSettings": "hyperopt.stn.settings",
    "load_exported": "hyperopt.exporting.load",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt.adjoints.attach import InexactError as InexactError
    from hyperopt.adjoints.checkpointed import Checkpointed as Checkpointed
    from hyperopt.adjoints.implicit import Implicit as Implicit
    from hyperopt.adjoints.onestep import OneStep as OneStep
    from hyperopt.adjoints.phantom import Phantom as Phantom
    from hyperopt.adjoints.shine import Shine as Shine
    from hyperopt.adjoints.unrolled import Unrolled as Unrolled
    from hyperopt.bilevel.batches import Minibatches as Minibatches
    from hyperopt.bilevel.estimate import Estimate as Estimate
    from hyperopt.bilevel.estimator import Estimator as Estimator
    from hyperopt.bilevel.f2sa import F2SA as F2SA
    from hyperopt.bilevel.finite_difference import FiniteDifference as FiniteDifference
    from hyperopt.bilevel.functional import Functional as Functional
    from hyperopt.bilevel.gauss_newton import Composite as Composite
    from hyperopt.bilevel.gradient_map import GradientMap as GradientMap
    from hyperopt.bilevel.hypergradient import Bilevel as Bilevel
    from hyperopt.bilevel.hypergradient import hypergradient as hypergradient
    from hyperopt.bilevel.inner.adam import InnerAdam as InnerAdam
    from hyperopt.bilevel.inner.gradient_descent import GradientDescent as GradientDescent
    from hyperopt.bilevel.inner.heavy_ball import HeavyBall as HeavyBall
    from hyperopt.bilevel.inner.lbfgs import InnerLBFGS as InnerLBFGS
    from hyperopt.bilevel.inner.torch_optimizer import TorchOptimizer as TorchOptimizer
    from hyperopt.bilevel.over_ranks import over_ranks as over_ranks
    from hyperopt.bilevel.problem import BilevelProblem as BilevelProblem
    from hyperopt.bilevel.problem import InnerConstants as InnerConstants
    from hyperopt.bilevel.saba import SABA as SABA
    from hyperopt.bilevel.settings import ProductSettings as ProductSettings
    from hyperopt.bilevel.soba import SOBA as SOBA
    from hyperopt.bilevel.stocbio import StocBiO as StocBiO
    from hyperopt.bilevel.t1t2 import T1T2 as T1T2
    from hyperopt.bilevel.v_pbgd import VPBGD as VPBGD
    from hyperopt.certificate import Certificate as Certificate
    from hyperopt.certificate import Constants as Constants
    from hyperopt.certificate import certify as certify
    from hyperopt.check import check_hypergradient as check_hypergradient
    from hyperopt.check import compare_adjoints as compare_adjoints
    from hyperopt.closure import ClosureError as ClosureError
    from hyperopt.diagnosis import Diagnosis as Diagnosis
    from hyperopt.diagnosis import diagnose as diagnose
    from hyperopt.exporting.load import load_exported as load_exported
    from hyperopt.linsolve.anderson import LinearAnderson as LinearAnderson
    from hyperopt.linsolve.bicgstab import BiCGStab as BiCGStab
    from hyperopt.linsolve.cg import CG as CG
    from hyperopt.linsolve.dense import Dense as Dense
    from hyperopt.linsolve.gmres import GMRES as GMRES
    from hyperopt.linsolve.neumann import Neumann as Neumann
    from hyperopt.linsolve.normal_cg import NormalCG as NormalCG
    from hyperopt.linsolve.nystrom import Nystrom as Nystrom
    from hyperopt.mesh import mean_over_ranks as mean_over_ranks
    from hyperopt.nn.sparse import SparseRows as SparseRows
    from hyperopt.policy import SolveError as SolveError
    from hyperopt.policy import SolveWarning as SolveWarning
    from hyperopt.primitive import fixed_point as fixed_point
    from hyperopt.purity import ImpureMapError as ImpureMapError
    from hyperopt.purity import check_map as check_map
    from hyperopt.solvers.anderson import Anderson as Anderson
    from hyperopt.solvers.broyden import Broyden as Broyden
    from hyperopt.solvers.chord import Chord as Chord
    from hyperopt.solvers.newton import Newton as Newton
    from hyperopt.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
    from hyperopt.solvers.picard import Picard as Picard
    from hyperopt.spaces import Bounded as Bounded
    from hyperopt.spaces import Hyperparameters as Hyperparameters
    from hyperopt.spaces import Positive as Positive
    from hyperopt.spaces import Real as Real
    from hyperopt.spaces import Simplex as Simplex
    from hyperopt.spaces import Space as Space
    from hyperopt.spaces import SpectralBall as SpectralBall
    from hyperopt.status import Solution as Solution
    from hyperopt.status import SolveStats as SolveStats
    from hyperopt.status import Status as Status
    from hyperopt.stn.network import convert as convert
    from hyperopt.stn.settings import SelfTuningSettings as SelfTuningSettings
    from hyperopt.stn.space import HyperSpace as HyperSpace
    from hyperopt.stn.step import SelfTuning as SelfTuning


__getattr__, __dir__ = lazily(__name__, _PUBLIC, __all__)

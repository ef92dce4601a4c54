"""Spaces of hyperparameters, and the hyperparameters of a problem. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt.core.lazy import lazily

_PUBLIC = {
    "Space": "hyperopt.spaces.space",
    "Real": "hyperopt.spaces.space",
    "Positive": "hyperopt.spaces.space",
    "Bounded": "hyperopt.spaces.space",
    "Simplex": "hyperopt.spaces.space",
    "SpectralBall": "hyperopt.spaces.spectral_ball",
    "PositiveDefinite": "hyperopt.spaces.positive_definite",
    "Hyperparameters": "hyperopt.spaces.hyperparameters",
}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt.spaces.hyperparameters import Hyperparameters as Hyperparameters
    from hyperopt.spaces.positive_definite import PositiveDefinite as PositiveDefinite
    from hyperopt.spaces.space import Bounded as Bounded
    from hyperopt.spaces.space import Positive as Positive
    from hyperopt.spaces.space import Real as Real
    from hyperopt.spaces.space import Simplex as Simplex
    from hyperopt.spaces.space import Space as Space
    from hyperopt.spaces.spectral_ball import SpectralBall as SpectralBall


__getattr__, __dir__ = lazily(__name__, _PUBLIC, __all__, also=", and its modules")

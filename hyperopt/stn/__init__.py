"""Self-tuning networks: hyperparameters tuned inside one training run. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt.core.lazy import lazily

_PUBLIC = {
    "Bounded": "hyperopt.stn.declare",
    "Positive": "hyperopt.stn.declare",
    "Discrete": "hyperopt.stn.declare",
    "Tuned": "hyperopt.stn.declare",
    "HyperSpace": "hyperopt.stn.space",
    "Draw": "hyperopt.stn.draw",
    "convert": "hyperopt.stn.network",
    "STN": "hyperopt.stn.network",
    "KINDS": "hyperopt.stn.kinds",
    "HyperLayer": "hyperopt.stn.layer",
    "Dropout": "hyperopt.stn.dropout",
    "VariationalDropout": "hyperopt.stn.dropout",
    "EmbeddingDropout": "hyperopt.stn.dropout",
    "DropConnect": "hyperopt.stn.dropout",
    "SelfTuning": "hyperopt.stn.step",
    "Round": "hyperopt.stn.rounds",
    "SelfTuningSettings": "hyperopt.stn.rounds",
    "TuningError": "hyperopt.stn.warnings",
    "TunedSchedule": "hyperopt.stn.schedule",
    "replay": "hyperopt.stn.schedule",
}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from hyperopt.stn.declare import Bounded as Bounded
    from hyperopt.stn.declare import Discrete as Discrete
    from hyperopt.stn.declare import Positive as Positive
    from hyperopt.stn.declare import Tuned as Tuned
    from hyperopt.stn.draw import Draw as Draw
    from hyperopt.stn.dropout import DropConnect as DropConnect
    from hyperopt.stn.dropout import Dropout as Dropout
    from hyperopt.stn.dropout import EmbeddingDropout as EmbeddingDropout
    from hyperopt.stn.dropout import VariationalDropout as VariationalDropout
    from hyperopt.stn.kinds import KINDS as KINDS
    from hyperopt.stn.layer import HyperLayer as HyperLayer
    from hyperopt.stn.network import STN as STN
    from hyperopt.stn.network import convert as convert
    from hyperopt.stn.rounds import Round as Round
    from hyperopt.stn.rounds import SelfTuningSettings as SelfTuningSettings
    from hyperopt.stn.schedule import TunedSchedule as TunedSchedule
    from hyperopt.stn.schedule import replay as replay
    from hyperopt.stn.space import HyperSpace as HyperSpace
    from hyperopt.stn.step import SelfTuning as SelfTuning
    from hyperopt.stn.warnings import TuningError as TuningError


__getattr__, __dir__ = lazily(__name__, _PUBLIC, __all__, also=", and its modules")

"""The config of a command line as Hydra composes it. A composition takes .2 s, so those that differ in values alone share one."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from hyperopt.app.resolvers import register

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@functools.cache
def _by_hydra(overrides: tuple[str, ...]) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def _sets_a_value(override: Override) -> bool:
    """Whether it is ``key=value``, and neither adds, deletes nor chooses an option of a group."""
    sets = not (override.is_add() or override.is_delete() or override.is_force_add())
    key = override.key_or_group
    return sets and override.package is None and not key.startswith("hydra") and not (CONFIGS / key).is_dir()


def composed(*overrides: str) -> DictConfig:
    """The config under these overrides. Hydra applies values after all choices, and so does this.

    Raises:
        hydra.errors.ConfigCompositionException: whatever Hydra refuses.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [override for override in parsed if _sets_a_value(override)]
    choices = tuple(text for text, override in zip(overrides, parsed, strict=True) if override not in values)
    cfg = copy.deepcopy(_by_hydra(choices))
    if any(OmegaConf.select(cfg, override.key_or_group, default=cfg, throw_on_missing=False) is cfg for override in values):
        return copy.deepcopy(_by_hydra(overrides))  # which says that there is no such key
    for override in values:
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return cfg

"""Composing of a sweep's jobs, of which those that differ only in values share one config. This module imports no torch."""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

SUBDIR = "${hydra.job.num}"  # the default of hydra.sweep.subdir


class Composer:
    """Composes the jobs of a sweep, whose config it is given, one after another.

    Jobs that differ only in values share one config, whose values are set in turn. A config is valid until the next job is
    composed.
    """

    KEPT = 32  # number of configs that are kept, a third of a megabyte each

    def __init__(self, config: DictConfig) -> None:
        """Start with nothing composed."""
        self.config, self.parser = config, OverridesParser.create()
        self.made: dict[tuple[str, ...], DictConfig] = {}
        where: Any = OmegaConf.to_container(config.hydra.sweep)
        self.reuses = where["subdir"] == SUBDIR  # another subdir may depend on how the job was composed

    def compose(self, overrides: list[str]) -> DictConfig:
        """Return the config of the job with these overrides."""
        parsed = self.parser.parse_overrides(overrides)
        values = {each.key_or_group: each for each in parsed if self._is_value(each)}
        kind = tuple(each.key_or_group if each.key_or_group in values else str(each.input_line) for each in parsed)
        if self.reuses and kind in self.made:
            found = self.made[kind]
            for key, each in values.items():
                OmegaConf.update(found, key, each.value())
            found.hydra.overrides.task = overrides
            return found
        if len(self.made) == self.KEPT:
            self.made.clear()
        given = list(self.config.hydra.overrides.hydra)
        found = hydra.compose(self.config.hydra.job.config_name, [*given, *overrides], return_hydra_config=True)
        self.made[kind] = found
        return found

    def _is_value(self, override: Override) -> bool:
        """Whether the override sets one value of a config, and does not choose a config."""
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or override.package is not None or "/" in key or key.startswith("hydra"):
            return False
        here = OmegaConf.select(self.config, key, default=OmegaConf)  # OmegaConf stands for a missing key
        return here is not OmegaConf and not OmegaConf.is_config(here) and not isinstance(override.value(), dict)

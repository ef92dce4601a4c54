"""Interpolations of our own, used in ``configs/hydra``."""

from __future__ import annotations

import secrets
from datetime import datetime
from importlib.resources.abc import Traversable

from omegaconf import OmegaConf


def run_stamp() -> str:
    """Return a directory name that sorts by time and that no other launch has, even one in the same second."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"


def config_groups(root: Traversable, parent: str = "") -> str:
    """Return one line per group under the config directory ``root`` with its options, for the text of ``--help``."""
    lines = []
    for folder in sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name):
        group = f"{parent}{folder.name}"
        options = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if group != "hydra" and options:
            lines += [f"  {group:<11}{', '.join(options)}", config_groups(folder, f"{group}/")]
    return "\n".join(line for line in lines if line)


def register_resolvers(root: Traversable) -> None:
    """Register ``${config_groups:}`` and ``${run_stamp:}``, which is one value per composed config, shared by a sweep's jobs.

    Args:
        root: the directory of the configs.
    """
    OmegaConf.register_new_resolver("config_groups", lambda: config_groups(root), replace=True)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)

"""The directory of the configs, and the interpolations that ``configs/hydra`` uses."""

from __future__ import annotations

import secrets
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from omegaconf import OmegaConf


def config_root() -> Traversable:
    """Return the directory of the configs: ``configs/`` of a checkout or editable install, else the one in the wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "configs"
    if not (package / "configs").is_dir() and (checkout / "train.yaml").is_file():
        return checkout
    return resources.files("hyperopt.configs")


def config_path() -> str:
    """Return ``config_root()`` in the form that Hydra needs."""
    root = config_root()
    return str(root) if isinstance(root, Path) else "pkg://hyperopt.configs"


def run_stamp() -> str:
    """Return a unique directory name that sorts by time, even among launches in the same second."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"


def config_groups(root: Traversable, parent: str = "") -> str:
    """Return one line with the options of each group under the config directory ``root``, for ``--help``."""
    lines = []
    for folder in sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name):
        group = f"{parent}{folder.name}"
        options = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if group != "hydra" and options:
            lines += [f"  {group:<20}{', '.join(options)}", config_groups(folder, f"{group}/")]
    return "\n".join(line for line in lines if line)


def register() -> None:
    """Register ``${config_groups:}`` and ``${run_stamp:}``; the latter has one value for all jobs of a sweep."""
    OmegaConf.register_new_resolver("config_groups", lambda: config_groups(config_root()), replace=True)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)

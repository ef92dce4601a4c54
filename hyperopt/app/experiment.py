"""Which configs describe the same experiment, so that a run may go on under a changed one. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hyperopt.core.text import printable
from hyperopt.data.reading import read_yaml

# What may change from a run to its continuation: where it runs, how long, and what it shows. All else makes another experiment.
FREE_KEYS = tuple("accept_lost_rows allow_targets ckpt_path compile device hydra mode name paths resume threads trainer".split())
FREE_NAMES = ("root", "dir", "download")
# What says which data and which model it is: all that an evaluation depends on.
DATA_AND_MODEL = ("seed", "dataset", "task")
MOST = 20  # differences that are named


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, resolved value)``.

    A node that is an interpolation of another one (``task.solver: ${solver}``) is left out, since its values are already there,
    and so is Hydra's part.
    """
    for name in map(str, node):
        if not prefix and name == "hydra":
            continue
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(node, name) or (OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name])):
            continue
        value = node[name]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config, without Hydra's part, as ``{dotted key: plain value}``, by which experiments are told apart."""
    return dict(leaves(cfg))


def plain_leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of plain data; a list is a value.

    Nothing is resolved: a file that was tampered with reads no environment.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from plain_leaves(value, f"{prefix}{name}.")
        elif value != "???":
            yield f"{prefix}{name}", value


def experiment_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flat config of the run in ``directory``, from its ``config.yaml``; None where there is none.

    Args:
        directory: a run directory.
        config: the flat config to compare it with. ``config.yaml`` is resolved, so ``task.solver.rtol`` repeats ``solver.rtol``
            there; such copies are left out.

    Raises:
        UnreadableError: the file is there, and is no config.
    """
    try:
        found = dict(plain_leaves(read_yaml(directory / "config.yaml")))
    except FileNotFoundError:
        return None
    return {key: found[key] for key in found if key in config or not any(key.endswith(f".{own}") for own in config)}


def differences(saved: Mapping[str, Any], config: Mapping[str, Any], *, evaluate: bool = False) -> str:
    """Return each key that makes ``config`` another experiment than ``saved``, with the value there and here; else nothing.

    Args:
        saved: the flat config of a checkpoint or of a run directory.
        config: the flat config now.
        evaluate: compare only what says which data and which model it is: another solver may evaluate it.
    """

    def counts(key: str) -> bool:
        parts = key.split(".")
        if evaluate and parts[0] not in DATA_AND_MODEL:
            return False
        return parts[0] not in FREE_KEYS and parts[-1] not in FREE_NAMES

    differ = [key for key in sorted({*saved, *config}) if counts(key) and saved.get(key) != config.get(key)]
    said = [f"{printable(key)} is {saved.get(key)!r:.80} there and {config.get(key)!r:.80} here" for key in differ[:MOST]]
    return "; ".join([*said, *([f"and {len(differ) - MOST} more"] if len(differ) > MOST else [])])

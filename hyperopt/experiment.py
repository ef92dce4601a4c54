"""Which configs describe the same experiment, so that a run may go on under a changed one. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, FloatNode, IntegerNode, OmegaConf

# What may change from a run to its continuation: where it runs, how long, and what it shows. All else makes another experiment.
FREE_KEYS = ("allow_targets", "ckpt_path", "compile", "device", "hydra", "mode", "name", "paths", "resume", "threads", "trainer")
FREE_NAMES = ("root", "dir", "download")
# What says which data and which model it is: all that an evaluation depends on.
DATA_AND_MODEL = ("seed", "dataset", "task")


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield ``(dotted key, resolved value, whether the schema says number)``.

    A node that is an interpolation of another one (``task.solver: ${solver}``) is left out, since its values are already there,
    and so is Hydra's part.
    """
    for name in map(str, node):
        if not prefix and name == "hydra":
            continue
        key, child = f"{prefix}{name}", node._get_node(name)
        if OmegaConf.is_missing(node, name) or (OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name])):
            continue
        value = node[name]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value
            yield key, value, isinstance(child, FloatNode | IntegerNode)


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config, without Hydra's part, as ``{dotted key: plain value}``."""
    return {key: value for key, value, _ in leaves(cfg)}


def experiment(cfg: DictConfig) -> dict[str, Any]:
    """Return the flat config as a checkpoint keeps it, to tell one experiment from another."""
    config = flatten(cfg)
    for key in [key for key, value in config.items() if key.endswith("scheduler.kind") and value == "cosine"]:
        length = f"{key.removesuffix('kind')}t_max"
        if config.get(length) is None:
            config[length] = config.get("trainer.max_steps")  # its default: here the length matters
    return config


def experiment_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flat config of the run in ``directory``, from its ``config.yaml``; None where there is none.

    Args:
        directory: a run directory.
        config: the flat config to compare it with. ``config.yaml`` is resolved, so ``task.solver.rtol`` repeats ``solver.rtol``
            there; such copies are left out.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        return None
    loaded = OmegaConf.load(path)
    found = experiment(loaded) if isinstance(loaded, DictConfig) else {}
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
    return "; ".join(f"{key} is {saved.get(key)!r} there and {config.get(key)!r} here" for key in differ)

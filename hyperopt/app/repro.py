"""Functions that make a run repeatable and leave the process as it was, and the facts for ``run.json``."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperopt.core import distributed
from hyperopt.core.checks import require_choice

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
DISTRIBUTIONS = ("hyperopt-bilevel", "torch", "torchvision", "hydra-core", "omegaconf", "numpy", "scikit-learn", "tensorboard")


def resolve_device(name: str) -> torch.device:
    """Return the device that ``name`` asks for.

    Args:
        name: ``auto`` (the current GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: the name has another form, or this machine does not have the GPU.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N; change device")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch sees no CUDA device on this machine; set device=cpu or device=auto")
    device = torch.device("cuda" if name == "auto" else name)
    count = torch.cuda.device_count()
    if device.index is None and distributed.ranks() > 1:  # each rank gets its own GPU, as far as there are enough
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
        torch.cuda.set_device(device)
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={name!r}, but there are {count} CUDA devices, cuda:0 to cuda:{count - 1}; change device")
    return device


def resolve_precision(name: str) -> torch.dtype:
    """Return the floating type called ``float32`` or ``float64``.

    Raises:
        ValueError: any other name.
    """
    require_choice("", "precision", name, PRECISIONS)
    return PRECISIONS[name]


def configure(device: torch.device, dtype: torch.dtype, threads: int | None) -> None:
    """Set the default type, the number of CPU threads (None: leave it) and reproducible GPU kernels.

    Raises:
        ValueError: ``threads`` is below 1.
    """
    if threads is not None:
        if isinstance(threads, bool) or threads < 1:
            raise ValueError(f"threads={threads!r} must be a whole number >= 1, or null for all; change threads")
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if device.type == "cuda":
        # cuBLAS sums in a fixed order only with this workspace; it reads the variable when its handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, numpy and torch (every device), and return a separate CPU generator with the same seed.

    Raises:
        ValueError: the seed is outside [0, 2**32), the range that all of them accept.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} is not a whole number in [0, 2**32); change seed")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every global generator as plain containers and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned; GPU states only if this machine has the same number of GPUs."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_global_state() -> Iterator[None]:
    """Restore, however the block ends, the state of the process that a job sets.

    This is the default dtype, threads, deterministic mode, cuDNN's flags, ``CUBLAS_WORKSPACE_CONFIG`` and all generators. The
    basic launcher runs all jobs of a sweep in one process.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    generators = rng_state()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
        set_rng_state(generators)


def git_state(directory: Path) -> dict[str, Any] | None:
    """Return ``{"hash", "dirty"}`` of the git checkout around ``directory``; None without a checkout, git or a commit."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(directory), *args], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def run_facts(device: torch.device) -> dict[str, Any]:
    """Return where, when and with what a run was started: git, versions, host, device, argv.

    ``git`` is the checkout of this package's source or, if the package is installed elsewhere, of the current directory.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    source = Path(__file__).resolve().parents[1]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "git": git_state(Path.cwd() if "site-packages" in source.parts else source),
        "versions": versions,
        "host": {"name": socket.gethostname(), "platform": platform.platform(), "cpus": os.cpu_count(), "pid": os.getpid()},
        "device": {
            "name": str(device),
            "model": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }

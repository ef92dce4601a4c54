"""Initial values that depend on a run's seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def drawing(generator: torch.Generator) -> Iterator[None]:
    """Initial values from ``generator`` alone, in float32 whatever the run's precision: one seed, one network."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)

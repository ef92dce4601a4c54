"""One job on all ranks that ``torchrun`` has started: rank 0 leads, the others follow.

    torchrun --nproc-per-node 2 -m hyperopt.app.cli experiment=equilibrium_mnist

Rank 0 is the command line: it composes, refuses, chooses the run directory and writes to it. The others wait for its config
and then run the same loop, which writes into a temporary directory. Nothing here imports torch before a job starts, nor
anything else that delays the first line of a launch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from hyperopt.app.search.search import Prune

_connection = contextlib.ExitStack()


def ranks() -> int:
    """Return the number of ranks that were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def follows() -> bool:
    """Whether this process is a rank other than 0."""
    return ranks() > 1 and int(os.environ.get("RANK", "0")) > 0


def lead(cfg: DictConfig, out: Path, prune: Prune | None = None) -> float:
    """Call ``hyperopt.app.run.run(cfg, out)`` on all ranks.

    An error on this rank ends the program, including the other ranks. Only this rank is given ``prune``, and tells the others.
    """
    from hyperopt.app.run import run

    if ranks() > 1:
        from omegaconf import OmegaConf

        from hyperopt.core import distributed

        _connection.enter_context(distributed.connected())
        distributed.from_first(OmegaConf.to_container(cfg, resolve=True))
    return run(cfg, out) if prune is None else run(cfg, out, prune)


def dismiss() -> None:
    """Tell the other ranks that there are no more jobs."""
    if ranks() > 1:
        from hyperopt.core import distributed

        with _connection, distributed.connected():
            distributed.from_first(None)


def leave() -> None:
    """End a rank whose work is done, with status 0 and without shutting the interpreter down.

    About once in ten runs, threads of gloo outlive the destroyed group and abort the process when the interpreter ends (torch
    2.14; pytorch/pytorch issue 190489). ``torchrun`` would then report a complete run as failed.
    """
    if ranks() > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def follow() -> None:
    """Run the jobs of rank 0 together with it, without output."""
    import logging
    import tempfile
    import warnings
    from pathlib import Path

    from omegaconf import DictConfig

    from hyperopt.app.run import run
    from hyperopt.core import distributed

    logging.disable(logging.WARNING)  # rank 0 reports it
    with warnings.catch_warnings(), distributed.connected():
        warnings.simplefilter("ignore")
        while (sent := distributed.from_first(None)) is not None:
            cfg = DictConfig(sent)
            cfg.trainer.progress = False
            with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                run(cfg, Path(out))

"""Scripts, and one that runs once for each rank, in processes that are forked from one that has already imported torch."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# Every optimizer imports the compiler when it is made.
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "hyperopt.app.run"])


def start(code: str, *arguments: object) -> ForkServerProcess:
    """Start Python code as another process, as ``python -c code *arguments`` does."""
    process = FORKS.Process(target=_execute, args=(code, tuple(map(str, arguments))))
    process.start()
    return process


def _execute(code: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def run_ranks(script: Path, world: int, *arguments: object, seconds: float = 300) -> None:
    """Run ``script RANK WORLD STORE *arguments`` on every rank; the ranks meet at the file STORE, which does not exist before.

    Raises:
        RuntimeError: a rank fails or takes more than these seconds; the message holds what it wrote to its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder, f"{rank}.txt") for rank in range(world)]
        last = (str(world), str(Path(folder, "store")), *map(str, arguments))
        processes = [
            FORKS.Process(target=_run, args=(str(script), (str(rank), *last), str(error))) for rank, error in enumerate(errors)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{[process.exitcode for process in processes]}\n" + "\n".join(e.read_text() for e in errors))


def _run(script: str, arguments: tuple[str, ...], errors: str) -> None:
    """Run a script as if it were started with these arguments; its error output goes to a file."""
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

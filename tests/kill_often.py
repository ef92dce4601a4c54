"""Kill runs of the toy task for real, at each of their writes in turn, resume them, and say what is left.

    python kill_often.py DIRECTORY

One process imports everything once, and forks for every run; it runs nothing of it itself, so that a child starts fresh.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from event_files import scalars
from matplotlib import pyplot
from toy_task import Toy, config, go, rows

SETTINGS: dict[str, Any] = {"max_steps": 6, "eval_every": 2, "checkpoint_every": 2}


def forked(body: Callable[[], Any]) -> int:
    """Run ``body`` in a child and return its wait status."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            body()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def killed_at(number: int) -> None:
    """Let the ``number``-th change to the file system of this process be its last, and half done where it is a write."""
    count = 0

    def reached() -> bool:
        nonlocal count
        count += 1
        return count == number

    def half(write: Any) -> Any:
        def call(handle: int, data: Any) -> int:
            if reached():
                write(handle, memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(handle, data)

        return call

    def after(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = change(*args, **kwargs)
            if reached():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.write = half(os.write)
    for name in ("replace", "unlink", "ftruncate", "truncate", "mkdir"):
        setattr(os, name, after(getattr(os, name)))


def main(root: Path) -> None:
    """Kill a run at its first change, at its second, ... until it has none left; print one line of JSON."""
    # What a first run loads on its way, once for all children: fonts, and what torch's optimizers import when they first step.
    Toy().figures()["residual"].savefig(io.BytesIO(), format="png")
    pyplot.close("all")
    importlib.import_module("torch._dynamo")
    whole = root / "whole"
    assert forked(lambda: go(config("momentum", "cosine", SETTINGS), whole)) == 0
    wrong, number, twice = [], 1, 0
    before = time.monotonic()
    while True:
        out = root / str(number)

        def run(at: int | None, out: Path = out) -> int:
            def body() -> None:
                if at is not None:
                    killed_at(at)
                go(config("momentum", "cosine", SETTINGS, resume="auto"), out)

            return forked(body)

        status = run(number)
        if status == 0:  # it made fewer changes
            break
        twice += os.WTERMSIG(run(number // 2 + 1)) == signal.SIGKILL  # the resume is killed as well
        left = run(None)
        same = [rows(out) == rows(whole), scalars(out) == scalars(whole), not list(out.rglob("*.tmp")), left == 0]
        if os.WTERMSIG(status) != signal.SIGKILL or not all(same):
            wrong.append([number, status, *same])
        number += 1
    kills = number - 1 + twice
    print(json.dumps({"kills": kills, "changes": number, "wrong": wrong, "seconds": round(time.monotonic() - before, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""``hyperopt tensorboard DIR``: TensorBoard on a folder of runs, opened on their losses and accuracies.

TensorBoard's Time Series tab sorts its sections by name, so that diagnostics of the adjoint come first. The address that is
printed pins the losses and accuracies above them, without smoothing. TensorBoard names a run by its path below the folder that
it is given, and its list of runs has room for twenty characters. It is therefore given a temporary folder of links whose names
are the overrides alone. ``tensorboard --logdir DIR`` shows the same runs, with their directories before the overrides.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from hyperopt.app.run_directory import RunDirectory, or_empty
from hyperopt.core.text import printable

HELP = """usage: hyperopt tensorboard [DIR] [option of tensorboard ...]

Start TensorBoard on the runs in and below DIR (default: outputs). The address that is printed opens the Time Series tab with the
losses and accuracies pinned at the top, without smoothing.

examples:
  hyperopt tensorboard multirun/mine                     a sweep, its runs named by what it varies
  hyperopt tensorboard outputs --port 6007 --bind_all    other options are passed on
"""
MOST = 10  # cards that TensorBoard's address may pin
LOOKED_AT = 100  # runs whose metrics are read
EVERY = 5.0  # seconds from one look for new runs to the next


def named(directory: Path) -> dict[str, Path]:
    """Return the folders with events in and below a directory, by the names to show: the sweep below it, and the overrides."""
    from hyperopt.app.dashboard import label, swept

    found: dict[str, Path] = {}
    for events in sorted({path.parent for path in directory.rglob("tb/**/events.out.tfevents.*")}):
        place = next(each for each in (events, *events.parents) if each.name == RunDirectory.tb.name).parent
        own = place.relative_to(directory)
        name = label(swept(RunDirectory(place))) or own.name or directory.resolve().name
        shown = str(own.parent / name)
        found[shown if shown not in found else f"{shown} ({own.name or events.name})"] = events
    return found


def link(directory: Path, links: Path) -> None:
    """Make a link for each folder of events that has none yet."""
    for name, events in named(directory).items():
        place = links / name
        if not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(events.resolve())


def pinned(directory: Path) -> list[str]:
    """Return the losses and accuracies that the runs in a directory have, those of validation first."""
    from hyperopt.app.dashboard import of_interest

    names: set[str] = set()
    for run in RunDirectory.below(directory, RunDirectory.summary)[:LOOKED_AT]:
        summary = or_empty(run.read_summary)
        names |= {*(summary.get("metrics") or {}), *((summary.get("best") or {}).get("metrics") or {})}
    return of_interest(names)[:MOST]


def address(url: str, tags: Sequence[str]) -> str:
    """Return the address of the Time Series tab with these scalars pinned."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in tags], separators=(",", ":"))
    pins = f"pinnedCards={quote(cards)}&" if tags else ""
    return f"{url.rstrip('/')}/?{pins}smoothing=0#timeseries"


def main(argv: Sequence[str]) -> None:
    """Run the subcommand until it is interrupted."""
    if {"--help", "-h"} & set(argv):
        print(HELP, end="")
        return
    given = bool(argv) and not argv[0].startswith("-")
    directory, options = Path(argv[0] if given else "outputs"), [*argv[given:]]
    if not directory.is_dir():
        print(f"hyperopt: {printable(str(directory))!r} is not a directory; give the folder of a run or a sweep", file=sys.stderr)
        sys.exit(1)
    print(f"hyperopt: loading TensorBoard for {printable(str(directory))}", file=sys.stderr, flush=True)
    from tensorboard import default, program

    with tempfile.TemporaryDirectory() as links:
        link(directory, Path(links))
        board = program.TensorBoard(default.get_plugins())
        try:
            board.configure(argv=["tensorboard", "--logdir", links, *options])
            url = board.launch()
        except program.TensorBoardServerException as error:
            print(f"hyperopt: {printable(str(error))}", file=sys.stderr)
            sys.exit(1)
        print(f"TensorBoard is at {address(url, pinned(directory))} (press CTRL+C to quit)", flush=True)
        try:
            while True:
                time.sleep(EVERY)
                link(directory, Path(links))
        except KeyboardInterrupt:
            pass

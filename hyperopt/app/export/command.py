"""``hyperopt export RUN``: writes what a run has learned as one file and a card. It imports torch only when there is a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.text import one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 1 and one line if there is nothing to export."""
    parser = argparse.ArgumentParser(
        prog="hyperopt export",
        description="Write the learned hyperparameters and the model of a run as one file of plain tensors, with a card. "
        "hyperopt.load_exported reads it back, ready to predict.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which one (default: best)")
    parser.add_argument("--format", choices=("pt", "safetensors"), default="pt", help="of the file (default: pt)")
    parser.add_argument("--out", type=Path, help="directory to write to (default: RUN/export)")
    parser.add_argument("--data", metavar="DIR", help="where the dataset lies now (default: where the run found it)")
    parser.add_argument(
        "--download", action="store_true", help="fetch the dataset if it is not there (default: no, whatever the run did)"
    )
    parser.add_argument("--program", action="store_true", help="write program.pt2 too, a graph by torch.export")
    parser.add_argument("--steps", type=int, help="solve by exactly so many Picard steps in program.pt2 (equilibrium models)")
    parser.add_argument(
        "--allow-targets", nargs="+", default=(), metavar="PACKAGE", help="packages of yours that the config names"
    )
    given = parser.parse_args(argv)
    if not RunDirectory(given.run).config.is_file():  # said before torch is imported
        print(f"hyperopt export: {given.run} holds no run: it has no {RunDirectory.config}", file=sys.stderr)
        sys.exit(1)

    from hyperopt.app.export.write import REFUSALS, export

    try:
        written = export(
            given.run,
            given.out,
            checkpoint=given.checkpoint,
            form=given.format,
            data=given.data,
            download=given.download,
            program=given.program or given.steps is not None,
            steps=given.steps,
            allow_targets=given.allow_targets,
        )
    except REFUSALS as error:
        print(f"hyperopt export: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    for path in written:
        print(path)

"""The command line: ``hyperopt`` (or ``python -m hyperopt.app.cli``) composes a config, checks it and runs it.

Nothing here imports torch before a job starts, nor Hydra before it is needed, so that help, ``--cfg job`` and tab completion
are fast. PyTorch alone takes seconds, so a launch first says what it loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from hyperopt import __version__
from hyperopt.app.launch import dismiss, follow, follows, leave
from hyperopt.core.text import printable

QUIET = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}
"""Flags with which Hydra prints something and stops, so that no job is loaded."""
SHOWN = 100  # characters of a command line that are shown
SUBCOMMANDS = {
    "report": "hyperopt.app.report.command",
    "export": "hyperopt.app.export.command",
    "tensorboard": "hyperopt.app.board",
}
"""The modules whose ``main`` runs a subcommand, beside ``check``; each is imported when it is asked for."""
CHECK = """usage: hyperopt check [group=option ...] [key=value ...]

Check the hypergradient of an experiment. It is compared with other adjoints and with finite differences in float64 (or in the
given precision), and a table shows the cost of each adjoint. The run's directory gets check.json and a figure.

examples:
  hyperopt check                                         the default job
  hyperopt check experiment=l2_ridge adjoint=neumann     another experiment and adjoint
"""


def main() -> None:
    """Run the command line on rank 0; on the other ranks of ``torchrun``, run the same jobs."""
    if follows():
        follow()
    else:
        command_line(sys.argv[1:])
        dismiss()
    leave()


def command_line(argv: Sequence[str]) -> None:
    """Print the help or the version, run a subcommand, or launch what is asked for."""
    name = argv[0] if argv else ""
    if name == "check":
        check(argv[1:])
    elif name in SUBCOMMANDS:
        import_module(SUBCOMMANDS[name]).main(argv[1:])
    elif name and name[0] not in "-+~" and "=" not in name:
        import difflib

        known = ("check", *SUBCOMMANDS)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        what = f"{name!r} is not a subcommand; {hint}subcommands: {', '.join(known)}; values are key=value"
        print(f"hyperopt: {what}", file=sys.stderr)
        sys.exit(1)
    elif "--version" in argv:
        print(f"hyperopt-bilevel {__version__}")
    elif {"--help", "-h"} & set(argv):
        print(help_text())
    else:
        launch(argv)


def launch(argv: Sequence[str]) -> None:
    """Run a job or a sweep; flags and overrides may come in any order, which Hydra's own parser does not accept."""
    overrides = [each for each in argv if each[:1] == "~" or (each[:1] != "-" and "=" in each)]
    flags = [each for each in argv if each not in overrides]
    if not QUIET & {each.partition("=")[0] for each in flags}:
        what = " ".join(each for each in overrides if not each.startswith("hydra."))
        shown = f"{what[:SHOWN]}..." if len(what) > SHOWN else what or "the main job"
        print(f"hyperopt: loading PyTorch for {printable(shown)}", flush=True)
    from hyperopt.app.command import launch as start  # after the line, since it imports Hydra, and a job PyTorch

    start(overrides, flags)


def check(argv: Sequence[str]) -> None:
    """Run ``hyperopt check ...``, which is ``hyperopt mode=check precision=float64 ...``."""
    if {"--help", "-h"} & set(argv):
        print(CHECK, end="")
        return
    given = {argument.partition("=")[0] for argument in argv}
    launch(["mode=check", *([] if "precision" in given else ["precision=float64"]), *argv])


def help_text() -> str:
    """Return the text of ``--help`` from ``configs/hydra``; Hydra itself would take a second to list all groups twice."""
    from omegaconf import OmegaConf

    from hyperopt.app.resolvers import config_root, register

    register()
    text = config_root().joinpath("hydra", "default.yaml").read_text(encoding="utf-8")
    return str(OmegaConf.create(text).help.template)


if __name__ == "__main__":
    main()

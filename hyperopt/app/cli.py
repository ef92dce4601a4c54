"""The command line: ``hyperopt`` (or ``python -m hyperopt.app.cli``) composes a config, checks it and runs it.

Nothing here imports torch before a job starts, nor Hydra before it is needed, so that help, ``--cfg job`` and tab completion
answer at once.
"""

from __future__ import annotations

import sys

from hyperopt import __version__
from hyperopt.app.launch import dismiss, follow, follows, leave


def main() -> None:
    """Run the command line on rank 0; on the other ranks that ``torchrun`` started, run its jobs with it."""
    if follows():
        follow()
    else:
        command_line()
        dismiss()
    leave()


def command_line() -> None:
    """Print the help or the version, or launch what is asked for."""
    if "--version" in sys.argv[1:]:
        print(f"hyperopt-bilevel {__version__}")
    elif {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text())
    else:
        from hyperopt.app.command import launch

        launch()


def help_text() -> str:
    """Return the text of ``--help``, written in ``configs/hydra``; Hydra would first list every group twice, a second's work."""
    from omegaconf import OmegaConf

    from hyperopt.app.resolvers import config_root, register

    register()
    text = config_root().joinpath("hydra", "default.yaml").read_text(encoding="utf-8")
    return str(OmegaConf.create(text).help.template)


def check() -> None:
    """``hyperopt-check ...`` is ``hyperopt mode=check precision=float64 ...``."""
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    sys.argv[1:1] = ["mode=check", *([] if "precision" in given else ["precision=float64"])]
    main()


if __name__ == "__main__":
    main()

"""The sweeper of this project, which Hydra finds as a plugin."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, all combinations of what is listed, without its composing every job once more before the first.

    ``hyperopt.app.preflight.Preflight`` has composed and checked all jobs by then; a thousand of them take minutes to compose.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing is left to check."""

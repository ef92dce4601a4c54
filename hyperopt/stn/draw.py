"""One draw of the hyperparameters for a batch: what its data, its regulariser and the network all read.

    m = u + softplus(s) * eps,     eps ~ N(0, 1), a row for each example          h = the space's map of m

Nothing that is drawn is kept in a module, and nothing knows the size of a batch before it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hyperopt.stn.space import HyperSpace


class Values(Mapping[str, Tensor]):
    """Each hyperparameter of a draw in the user's units, made when it is asked for. shape of each: (rows,)."""

    def __init__(self, draw: Draw) -> None:
        """Look at a draw."""
        self._draw = draw

    def __getitem__(self, name: str) -> Tensor:
        """One hyperparameter.

        Raises:
            KeyError: there is none of this name, or the draw hides them.
        """
        draw = self._draw
        names = draw.space.names
        if name not in names:
            raise KeyError(f"there is no hyperparameter {name!r}; there are {', '.join(names)}")
        if draw.hidden:
            raise KeyError(f"the validation loss may not see {name!r} itself; set direct_grad=true if it depends on it")
        if draw.seen is not None:
            draw.seen.add(name)
        return draw.space.declared[name].value(draw.m[:, names.index(name)])

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._draw.space.names)

    def __len__(self) -> int:
        """How many."""
        return len(self._draw.space.names)


@dataclass(frozen=True, eq=False)
class Draw:
    """The hyperparameters of the rows of one batch; immutable.

    Attributes:
        space: what was drawn from.
        m: in R. shape: (rows, H)
        delta: what the weights respond to: ``m``, or ``m - stopgrad(u)`` where the space is centred. shape: (rows, H)
        sigma: the scales ``softplus(s)``. shape: (H,)
        responds: False where ``delta`` is 0 and without derivative: layers then need no response at all.
        hidden: whether ``h`` refuses to be read: validation sees the weights alone.
        seen: gets the names that are read from ``h`` (None: nobody wants to know).
    """

    space: HyperSpace
    m: Tensor
    delta: Tensor
    sigma: Tensor
    responds: bool = True
    hidden: bool = False
    seen: set[str] | None = field(default=None, repr=False)

    @property
    def h(self) -> Values:
        """The hyperparameters in the user's units by name. shape of each: (rows,)."""
        return Values(self)

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.m.shape[0]

    def part(self, rows: slice) -> Draw:
        """The draw of some of its rows."""
        return replace(self, m=self.m[rows], delta=self.delta[rows])

    def entropy(self) -> Tensor:
        """That of the perturbation: ``sum log(sigma sqrt(2 pi e))``. shape: ()."""
        return self.entropy_of(self.sigma)

    @staticmethod
    def entropy_of(sigma: Tensor) -> Tensor:
        """That of scales. shape of sigma: (H,)."""
        return sigma.log().sum() + sigma.numel() * 0.5 * math.log(2 * math.pi * math.e)

    def without_h(self) -> Draw:
        """The same draw for a validation loss that sees the weights alone."""
        return replace(self, hidden=True)

    def watched(self, seen: set[str]) -> Draw:
        """The same draw, which puts the names that are read from ``h`` into ``seen``."""
        return replace(self, seen=seen)

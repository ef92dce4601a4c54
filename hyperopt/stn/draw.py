"""One draw of the hyperparameters for a batch, which its data, its regulariser and the network all use.

    m = u + softplus(s) * eps,     eps ~ N(0, 1), a row for each example          h = the space's map of m

No module keeps a draw, and the size of a batch is not needed before the batch comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from hyperopt.core.text import described

if TYPE_CHECKING:
    from hyperopt.stn.space import HyperSpace


class Values(Mapping[str, Tensor]):
    """The values of a draw's hyperparameters by name, computed when they are read. shape of each: (rows,)."""

    def __init__(self, draw: Draw) -> None:
        """Keep the draw."""
        self._draw = draw

    def __getitem__(self, name: str) -> Tensor:
        """Return one hyperparameter.

        Raises:
            KeyError: no hyperparameter has this name, or the draw hides the values.
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
        """Iterate over the names."""
        return iter(self._draw.space.names)

    def __len__(self) -> int:
        """Return the number of hyperparameters."""
        return len(self._draw.space.names)

    def __repr__(self) -> str:
        """Return the names and the number of rows, without reading a value."""
        return described(self, names=self._draw.space.names, rows=self._draw.rows)


@dataclass(frozen=True, eq=False)
class Draw:
    """The hyperparameters of the rows of one batch; immutable.

    Attributes:
        space: the space that was drawn from.
        m: variables in R. shape: (rows, H)
        delta: what the weights respond to: ``m``, or ``m - stopgrad(u)`` if the space is centred. shape: (rows, H)
        sigma: the scales ``softplus(s)``. shape: (H,)
        responds: False if ``delta`` is 0 and has no derivative, so that layers need no response.
        hidden: whether reading ``h`` is refused, since a validation loss must see only the weights.
        seen: a set to which the names that are read from ``h`` are added, or None.

    Example:
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"dropout": stn.Bounded(0.25, 0.0, 0.9)})
        >>> draw = space.draw(rows=5)
        >>> draw.h["dropout"].shape, bool((draw.h["dropout"] < 0.9).all())
        (torch.Size([5]), True)
    """

    space: HyperSpace
    m: Tensor
    delta: Tensor
    sigma: Tensor
    responds: bool = True
    hidden: bool = False
    seen: set[str] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Return the names and the shapes."""
        parts = {"m": self.m, "delta": self.delta, "sigma": self.sigma, "responds": self.responds, "hidden": self.hidden}
        return described(self, names=self.space.names, **parts)

    @property
    def h(self) -> Values:
        """The values of the hyperparameters by name. shape of each: (rows,)."""
        return Values(self)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.m.shape[0]

    def part(self, rows: slice) -> Draw:
        """Return the draw of some of its rows."""
        return replace(self, m=self.m[rows], delta=self.delta[rows])

    def entropy(self) -> Tensor:
        """Return the entropy of the perturbation: ``sum log(sigma sqrt(2 pi e))``. shape: ()."""
        return self.entropy_of(self.sigma)

    @staticmethod
    def entropy_of(sigma: Tensor) -> Tensor:
        """Return the entropy for given scales. shape of sigma: (H,)."""
        return sigma.log().sum() + sigma.numel() * 0.5 * math.log(2 * math.pi * math.e)

    def without_h(self) -> Draw:
        """Return the same draw for a validation loss that must see only the weights."""
        return replace(self, hidden=True)

    def watched(self, seen: set[str]) -> Draw:
        """Return the same draw, which adds the names that are read from ``h`` to ``seen``."""
        return replace(self, seen=seen)

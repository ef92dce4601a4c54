"""Dropout at a rate that is a hyperparameter of the draw, with one rate for each row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hyperopt.nn.regularise import sequences
from hyperopt.nn.regularise.sequences import kept
from hyperopt.stn.draw import Draw
from hyperopt.stn.layer import InContext


class TunedRate(InContext):
    """A module that drops at the rate ``draw.h[name]``, without a gradient in the rate.

    Attributes:
        name: name of the hyperparameter.
        shared: whether all rows must have the same rate, ``per="batch"``.
        p: the rate, after ``collapse``.
    """

    name: str
    shared: bool = False
    p: float

    def rate(self, input: Tensor) -> Tensor:
        """Return the rate of each row. shape: (rows,), or (1,) for all rows."""
        draw = self.draw
        self.rows(len(input), draw)
        return draw.h[self.name].detach()[: 1 if self.shared else None]

    def collapse_(self, draw: Draw) -> None:
        """Become the plain module at the rate of the first row of ``draw``."""
        self.p = float(draw.h[self.name][0])
        del self.name
        super().collapse_(draw)

    def extra_repr(self) -> str:
        """Return the name of the rate."""
        return repr(self.name) if "name" in vars(self) else super().extra_repr()


class Dropout(TunedRate, nn.Dropout):
    """``y = x * mask / (1 - p)`` with ``p = draw.h[name]`` for each row, without a gradient in p; the identity in eval mode.

    Args:
        name: name of the hyperparameter.
        inplace: as in ``torch.nn.Dropout``, for the plain network that ``collapse`` returns.

    Raises:
        KeyError: the draw has no hyperparameter of this name.

    Reference: Srivastava et al., JMLR 15, 2014; MacKay et al., ICLR 2019, arXiv 1903.03088.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"rate": stn.Bounded(0.5, 0.0, 0.9)})
        >>> net = stn.convert(torch.nn.Sequential(torch.nn.Linear(2, 100), stn.Dropout("rate")), space)
        >>> dropped = net(torch.ones(1, 2), space.draw(rows=1)) == 0
        >>> 0 < int(dropped.sum()) < 100
        True
    """

    plain = nn.Dropout

    def __init__(self, name: str, inplace: bool = False) -> None:
        """Keep the name."""
        super().__init__(0.0, inplace)
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries."""
        if not self.training:
            return input
        rate = self.rate(input).view(-1, *[1] * (input.dim() - 1))
        return input * kept(rate, tuple(input.shape), input)


class VariationalDropout(TunedRate, sequences.VariationalDropout):
    """Dropout of features at the rate ``draw.h[name]`` of each row, with one mask for all times of an example.

    Args:
        name: name of the hyperparameter.

    Reference: Gal & Ghahramani, NeurIPS 2016, arXiv 1512.05287, section 4.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"hidden": stn.Bounded(0.3, 0.0, 0.9)})
        >>> net = stn.convert(torch.nn.Sequential(stn.VariationalDropout("hidden"), torch.nn.Linear(4, 1)), space)
        >>> out = net(torch.ones(8, 5, 4), space.draw(rows=8))  # 8 examples of 5 times
        >>> out.shape
        torch.Size([8, 5, 1])
    """

    plain = sequences.VariationalDropout

    def __init__(self, name: str) -> None:
        """Keep the name."""
        super().__init__()
        self.name = name


class EmbeddingDropout(TunedRate, sequences.EmbeddingDropout):
    """An embedding that drops words at the rate ``draw.h[name]`` of each row, each word at all its places in the row.

    Args:
        name: name of the hyperparameter.
        module: the embedding, which responds.

    Reference: Gal & Ghahramani, NeurIPS 2016, arXiv 1512.05287, section 4.2.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"words": stn.Bounded(0.3, 0.0, 0.9)})
        >>> net = stn.convert(torch.nn.Sequential(stn.EmbeddingDropout("words", torch.nn.Embedding(10, 4))), space)
        >>> net(torch.zeros(8, 5, dtype=torch.long), space.draw(rows=8)).shape
        torch.Size([8, 5, 4])
    """

    plain = sequences.EmbeddingDropout

    def __init__(self, name: str, module: nn.Embedding) -> None:
        """Keep the embedding and the name."""
        super().__init__(module)
        self.name = name


class DropConnect(TunedRate, sequences.DropConnect):
    """A layer that drops weights, and the same entries of their responses, at the rate ``draw.h[name]`` of the batch.

    One mask serves all rows, since a mask for each would need a weight for each. So the rows must have one rate: declare it
    with ``per="batch"``.

    Args:
        name: name of the hyperparameter.
        module: the layer.
        weights: names of the weights in it (none: the hidden-to-hidden matrices of a recurrent layer).

    Raises:
        ValueError: the layer has no such weight; the message names those it has.

    Reference: Merity, Keskar & Socher, ICLR 2018, arXiv 1708.02182, section 3.

    Example:
        >>> import torch
        >>> from hyperopt import stn
        >>> space = stn.HyperSpace({"recurrent": stn.Bounded(0.3, 0.0, 0.9, per="batch")})
        >>> net = stn.convert(torch.nn.Sequential(stn.DropConnect("recurrent", torch.nn.LSTM(3, 4, batch_first=True))), space)
        >>> out, state = net(torch.ones(8, 5, 3), space.draw(rows=8))
        >>> out.shape
        torch.Size([8, 5, 4])
    """

    plain = sequences.DropConnect
    shared = True

    def __init__(self, name: str, module: nn.Module, weights: Sequence[str] = ()) -> None:
        """Keep the layer, the names of its weights, and that of the rate."""
        super().__init__(module, weights)
        self.name = name

"""Weight and spectral normalisation of the matrices and kernels of a cell, to keep its Jacobian from growing.

    weight:    W = g v / |v|, output channel by output channel                     Salimans & Kingma, 2016, arXiv 1602.07868
    spectral:  W = V / |V|_2, the norm by a power iteration, one step a solve      Miyato et al., 2018, arXiv 1802.05957

The spectral norm is that of the weight as a matrix (output channels) x (the rest): it bounds a linear layer, and a convolution up
to a factor of its kernel's size. The vectors of the power iteration move once a forward of the ``DEQ`` in training mode, and not
in eval mode.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations

NORMS = (None, "weight", "spectral")


def normalise(module: nn.Module, norm: str | None) -> None:
    """Parametrize every parameter of ``module`` that is called ``weight`` and has two dimensions or more, in place.

    Args:
        module: a cell.
        norm: ``"weight"``, ``"spectral"``, or None for nothing.

    Raises:
        ValueError: an unknown norm, or there is nothing to normalise.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is none of {', '.join(map(str, NORMS))}; change norm")
    if norm is None:
        return
    owners = [inner for inner in module.modules() if inner._parameters.get("weight") is not None and inner.weight.dim() >= 2]  # pyright: ignore[reportCallIssue]
    if not owners:
        raise ValueError(f"norm={norm!r}: {type(module).__name__} has no matrix or kernel called weight; set norm to null")
    for owner in owners:
        (parametrizations.weight_norm if norm == "weight" else parametrizations.spectral_norm)(owner)

"""Hyper-layers that are products with a matrix: ``Linear`` and ``Embedding``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.stn.layer import HyperLayer


class HyperLinear(HyperLayer, nn.Linear):
    """``y = W x + b + (V delta) * (H x) + (C delta) * h``. shapes: (rows, ..., in) to (rows, ..., out)."""

    plain = nn.Linear
    response_weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        y, draw = super().forward(input), self.draw
        return self.respond(y, functional.linear(self.primal(input), self.response_weight), draw) if draw.responds else y


class HyperEmbedding(HyperLayer, nn.Embedding):
    """``y = W[i] + (V delta) * H[i]``, the units being the embedding's dimensions. shapes: (rows, ...) to (rows, ..., dim)."""

    plain = nn.Embedding
    shifts_by = ()
    response_weight: nn.Parameter

    def units(self) -> int:
        """The dimensions of a vector."""
        return self.embedding_dim

    @torch.no_grad()
    def fresh(self, weight: Tensor) -> Tensor:
        """Normal, as a plain embedding, with a padding row that stays at zero."""
        found = torch.randn_like(weight)
        if self.padding_idx is not None:
            found[self.padding_idx] = 0
        return found

    def by_unit(self, weight: Tensor) -> Tensor:
        """One row for each dimension."""
        return weight.mT

    def scaled(self, gates: Tensor, weight: Tensor) -> Tensor:
        """``weight diag(gates)``."""
        return weight * gates

    def forward(self, input: Tensor) -> Tensor:
        """Look the rows up."""
        y, draw = super().forward(input), self.draw
        if not draw.responds:
            return y
        how: dict[str, Any] = {"padding_idx": self.padding_idx, "scale_grad_by_freq": self.scale_grad_by_freq}
        return self.respond(y, functional.embedding(input, self.response_weight, **how), draw)

"""An LSTM cell whose weights respond.

z = W_x x + b_x + W_h h + b_h + (V delta) * (H_x x + H_h h) + (C delta) * r            four gates of ``hidden_size`` units
i, f, g, o = sigma(z_i), sigma(z_f), tanh(z_g), sigma(z_o);     c' = f c + i g,     h' = o tanh(c')
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.stn.layer import HyperLayer


class HyperLSTMCell(HyperLayer, nn.LSTMCell):
    """One gate for each of the cell's ``4 * hidden_size`` affine outputs, shared by inputs and hidden state."""

    plain = nn.LSTMCell
    responds_by = ("weight_ih", "weight_hh")
    shifts_by = ("bias_ih",)
    response_weight_ih: nn.Parameter
    response_weight_hh: nn.Parameter

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; ``hx`` None: zeros. shapes: (rows, input_size), (rows, hidden_size) twice."""
        if hx is None:
            zeros = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        hidden, cell = hx
        # Not the fused cell, which has no forward derivative.
        z = functional.linear(input, self.weight_ih, self.bias_ih) + functional.linear(hidden, self.weight_hh, self.bias_hh)
        draw = self.draw
        if draw.responds:
            product = functional.linear(self.primal(input), self.response_weight_ih)
            z = self.respond(z, product + functional.linear(self.primal(hidden), self.response_weight_hh), draw)
        enter, forget, new, leave = z.chunk(4, 1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell

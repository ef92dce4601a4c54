"""Rules of recurrent layers and cells, as loops over responding products.

    lstm    i, f, g, o = sigma, sigma, tanh, sigma of a + b          c' = f c + i g,           h' = o tanh(c')
    gru     r, z = sigma(a + b),  n = tanh(a + r b)                  h' = n + z (h - n)
    rnn     h' = tanh(a + b) or relu(a + b)

    a = x W_ih^T + b_ih,    b = h W_hh^T + b_hh,     with the weights of each row

The inputs of all times take one product. Torch's fused kernels support neither weights for each row nor forward derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.stn.response import at_examples, no_rule, rule

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(a: Tensor, b: Tensor, state: State) -> State:
    enter, forget, new, leave = (a + b).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru(a: Tensor, b: Tensor, state: State) -> State:
    (r, z, n), (r_, z_, n_) = a.chunk(3, -1), b.chunk(3, -1)
    new = (n + (r + r_).sigmoid() * n_).tanh()
    return (new + (z + z_).sigmoid() * (state[0] - new),)


def _tanh(a: Tensor, b: Tensor, state: State) -> State:
    return ((a + b).tanh(),)


def _relu(a: Tensor, b: Tensor, state: State) -> State:
    return ((a + b).relu(),)


def _step(cell: Cell, input: Tensor, state: State, weights: Any) -> State:
    """Make one step of a cell. shapes: (rows, features), (rows, hidden)."""
    w_ih, w_hh, b_ih, b_hh = weights
    return cell(functional.linear(input, w_ih, b_ih), functional.linear(state[0], w_hh, b_hh), state)


@rule(torch.lstm_cell)
def _lstm_cell(input: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> State:
    """``torch.nn.LSTMCell``."""
    return _step(_lstm, input, tuple(hx), (w_ih, w_hh, b_ih, b_hh))


def _register_cell(function: Any, cell: Cell) -> None:
    def found(input: Tensor, hx: Tensor, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Tensor:
        return _step(cell, input, (hx,), (w_ih, w_hh, b_ih, b_hh))[0]

    rule(function)(found)


_register_cell(torch.gru_cell, _gru)
_register_cell(torch.rnn_tanh_cell, _tanh)
_register_cell(torch.rnn_relu_cell, _relu)


def _one_way(cell: Cell, x: Tensor, state: State, weights: Any, projection: Any, backwards: bool) -> tuple[Tensor, State]:
    """Run one layer in one direction. shapes: (time, rows, features), (rows, hidden); (time, rows, hidden)."""
    w_ih, w_hh, b_ih, b_hh = weights
    inputs = functional.linear(x, at_examples(w_ih, 1), at_examples(b_ih, 1)).unbind(0)
    w_hh, b_hh, projection = (at_examples(each, 0) for each in (w_hh, b_hh, projection))
    outputs: list[Tensor] = []
    for a in reversed(inputs) if backwards else inputs:
        state = cell(a, functional.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (functional.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _layers(cell: Cell, input: Any, hx: Any, weights: Any, *more: Any) -> tuple[Tensor, list[Tensor]]:
    """Run all layers, in both directions if asked for; return outputs, and the last states of every layer and direction."""
    has_biases, count, dropout, training, both, batch_first = more
    x = input.transpose(0, 1) if batch_first else input
    ways = 2 if both else 1
    states: State = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    each = 4 if has_biases else 2
    size = len(weights) // (count * ways)  # one more than ``each`` if outputs are projected
    last: list[State] = []
    for layer in range(count):
        outputs: list[Tensor] = []
        for way in range(ways):
            k = layer * ways + way
            own = list(weights[k * size : (k + 1) * size])
            w = own[:each] if has_biases else [*own[:2], None, None]
            projection = own[each] if size > each else None
            found, state = _one_way(cell, x, tuple(s[k] for s in states), w, projection, way == 1)
            outputs.append(found)
            last.append(state)
        x = torch.cat(outputs, -1) if both else outputs[0]
        if dropout and training and layer < count - 1:
            x = functional.dropout(x, dropout, training)
    stacked = [torch.stack(each) for each in zip(*last, strict=True)]
    return (x.transpose(0, 1) if batch_first else x), stacked


def _register_layers(function: Any, name: str, cell: Cell) -> None:
    def found(input: Any, hx: Any, weights: Any, *more: Any) -> tuple[Tensor, ...]:
        if not isinstance(weights, list | tuple) or not isinstance(more[0], bool):
            values = more[0] if isinstance(more[0], list | tuple) else weights
            no_rule(
                name, values, why="gets a packed sequence, whose rows are in another order than the examples; pad them instead"
            )
        outputs, states = _layers(cell, input, hx, weights, *more)
        return outputs, *states

    rule(function)(found)


_register_layers(torch.lstm, "lstm", _lstm)
_register_layers(torch.gru, "gru", _gru)
_register_layers(torch.rnn_tanh, "rnn_tanh", _tanh)
_register_layers(torch.rnn_relu, "rnn_relu", _relu)

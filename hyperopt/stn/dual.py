"""The linearised network: functions of duals whose torch kernels have no derivative of their forward derivative, or a wrong one.

Softmax and attention are made of elementary operations here; so are normalisations (``hyperopt.stn.norm``) and recurrent layers
(``hyperopt.stn.recurrent``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hyperopt.stn.response import RULES

ATTENTION = functional.scaled_dot_product_attention


def softmax(
    input: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None, *, empty: bool = False
) -> Tensor:
    """``exp(x) / sum exp(x)``; with ``empty`` it is 0 where every entry is -inf, and not NaN."""
    x = input if dtype is None else input.to(dtype)
    top = forward_ad.unpack_dual(x).primal.detach().amax(dim, keepdim=True)  # any number would do: it is divided out
    top = top.masked_fill(top == -math.inf, 0.0) if empty else top
    found = (x - top).exp()
    total = found.sum(dim, keepdim=True)
    return found / (total.masked_fill(total == 0, 1.0) if empty else total)


def log_softmax(input: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """``x - log sum exp(x)``."""
    x = input if dtype is None else input.to(dtype)
    x = x - forward_ad.unpack_dual(x).primal.detach().amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, *, linear: bool) -> Tensor:
    """``softmax(q k^T / sqrt(d) + mask) v``, by torch's own kernels unless the network is linearised."""
    if not linear:
        return ATTENTION(query, key, value, None if mask is None else mask.expand(-1, -1, query.shape[-2], -1), rate)
    return _attention(query, key, value, mask, rate)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
    scores = scores if attn_mask is None else scores + attn_mask
    return functional.dropout(softmax(scores, -1, empty=True), dropout_p) @ value


ELEMENTARY: dict[Any, Any] = {
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), softmax),
    **dict.fromkeys((functional.log_softmax, torch.log_softmax, Tensor.log_softmax), log_softmax),
    ATTENTION: _attention,
}
BY_RULE = (
    *(functional.batch_norm, functional.instance_norm, functional.group_norm, functional.layer_norm, functional.rms_norm),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
    functional.multi_head_attention_forward,
)
"""Functions whose rules are made of elementary operations, with a weight that responds or without."""


class Elementary(TorchFunctionMode):
    """Makes functions of duals of elementary operations; see the module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace those functions alone."""
        found = ELEMENTARY.get(func) or (RULES[func] if func in BY_RULE else func)
        return found(*args, **(kwargs or {}))

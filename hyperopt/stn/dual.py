"""Replacements of torch functions in the linearised network.

The kernels of these functions have no derivative of their forward-mode derivative, or a wrong one. Here softmax and attention
consist of elementary operations; see ``hyperopt.stn.norm`` and ``hyperopt.stn.recurrent`` for normalisations and recurrent
layers.
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
    """Return ``exp(x) / sum exp(x)``; with ``empty`` this is 0 instead of NaN where every entry is -inf."""
    x = input if dtype is None else input.to(dtype)
    top = forward_ad.unpack_dual(x).primal.detach().amax(dim, keepdim=True)  # the result does not depend on this number
    top = top.masked_fill(top == -math.inf, 0.0) if empty else top
    found = (x - top).exp()
    total = found.sum(dim, keepdim=True)
    return found / (total.masked_fill(total == 0, 1.0) if empty else total)


def log_softmax(input: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``x - log sum exp(x)``."""
    x = input if dtype is None else input.to(dtype)
    x = x - forward_ad.unpack_dual(x).primal.detach().amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, *, linear: bool) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d) + mask) v``, by torch's own kernels unless the network is linearised."""
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
    """Compute ``torch.nn.functional.scaled_dot_product_attention`` by elementary operations."""
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
"""Functions whose rules consist of elementary operations, whether a weight responds or not."""


class Elementary(TorchFunctionMode):
    """Replaces functions of dual numbers by elementary operations; see the module's docstring."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the replacement of the function, if it has one."""
        found = ELEMENTARY.get(func) or (RULES[func] if func in BY_RULE else func)
        return found(*args, **(kwargs or {}))

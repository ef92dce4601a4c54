"""The rule of attention, whose four projections may respond.

q, k, v = responding projections,     y = softmax(q k^T / sqrt(d) + mask) v,     out = responding projection of y
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.stn.dual import attend, softmax
from hyperopt.stn.response import Responding, at_examples, no_rule, rule, use_of

SIGNATURE = inspect.signature(functional.multi_head_attention_forward)
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@rule(functional.multi_head_attention_forward)
def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` for inputs of shape (length, rows, features).

    It is called without a responding weight too, by a linearised network.
    """
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    how = bound.arguments
    plain = ("query", "key", "value", "bias_k", "bias_v", "static_k", "static_v")
    if any(isinstance(how[name], Responding) for name in plain) or how["static_k"] is not None or how["static_v"] is not None:
        no_rule("nn.functional.multi_head_attention_forward", *how.values())
    if how["query"].dim() != 3:
        no_rule("nn.functional.multi_head_attention_forward", *how.values(), why="gets an input without a dimension of examples")
    uses = [use for value in how.values() if (use := use_of(value)) is not None]
    weights = [how[name] for name in PROJECTIONS] if how["use_separate_proj_weight"] else how["in_proj_weight"].chunk(3)
    biases = [None] * 3 if how["in_proj_bias"] is None else how["in_proj_bias"].chunk(3)
    q, k, v = (
        functional.linear(how[name], at_examples(weight, 1), at_examples(bias, 1))
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    rows, heads, extra = q.shape[1], how["num_heads"], 0
    if how["bias_k"] is not None:
        k, v = (torch.cat([each, more.expand(1, rows, -1)]) for each, more in ((k, how["bias_k"]), (v, how["bias_v"])))
        extra += 1
    if how["add_zero_attn"]:
        k, v = (torch.cat([each, torch.zeros_like(each[:1])]) for each in (k, v))
        extra += 1
    q, k, v = (
        each.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for each in (q, k, v)
    )  # shape: (rows, heads, length, features)
    mask = _mask(how["attn_mask"], how["key_padding_mask"], rows, extra, q)
    rate = how["dropout_p"] if how["training"] else 0.0
    if how["need_weights"]:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        found = functional.dropout(softmax(scores if mask is None else scores + mask, -1), rate)
        y = found @ v
    else:
        found = None
        y = attend(q, k, v, mask, rate, linear=not uses or uses[0].linear)
    y = y.permute(2, 0, 1, 3).flatten(2)
    y = functional.linear(y, at_examples(how["out_proj_weight"], 1), at_examples(how["out_proj_bias"], 1))
    return y, found.mean(1) if found is not None and how["average_attn_weights"] else found


def _mask(attention: Tensor | None, padding: Tensor | None, rows: int, extra: int, like: Tensor) -> Tensor | None:
    """Return what both masks add to the scores. shape: broadcasts to (rows, heads, queries, keys)."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
        return functional.pad(mask.to(like.dtype), (0, extra))

    found = None
    if attention is not None:
        found = added(attention)
        found = found.unflatten(0, (rows, -1)) if found.dim() == 3 else found[None, None]
    if padding is not None:
        padded = added(padding)[:, None, None]
        found = padded if found is None else found + padded
    return found

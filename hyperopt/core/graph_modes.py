"""Modes in which a function builds a graph that can be differentiated more than once and evaluates nothing again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore[reportMissingImports]
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hyperopt.core import weighted_losses
from hyperopt.core.captured import functorch_level, node_name, nodes, transformed


class KeepsGraph(TorchFunctionMode):
    """Makes functions under ``torch.utils.checkpoint`` keep their graph.

    If backward evaluated them again, they would meet other parameters (those that ``functional_call`` has restored), other
    random numbers and other buffers.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator so that it saves its tensors itself."""
        if torch.compiler.is_compiling():  # the hooks below cannot be traced
            return func(*args, **(kwargs or {}))
        hooks = _top_saved_tensors_default_hooks(False)
        if hooks is None or not getattr(hooks[0], "_checkpoint_internal", False):
            return func(*args, **(kwargs or {}))
        with saved_tensors_hooks(_same, _same):
            return func(*args, **(kwargs or {}))


class TwiceDifferentiable(KeepsGraph):
    """Computes attention by matrix products and bags of embeddings by sums, since their kernels have only first derivatives.

    Weight normalisation is computed by elementary operators, since the second derivative of its kernel is wrong: it treats the
    norms as constants. The gradient of an embedding is dense, since a sparse one has no second derivative. Losses are computed by
    elementary operators where they have weights of classes or entries (``hyperopt.core.weighted_losses``).
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator in a form that has derivatives of every order."""
        if func is F.multi_head_attention_forward:  # a mode does not see the functions that it calls
            with sdpa_kernel(SDPBackend.MATH):
                return super().__torch_function__(func, types, args, kwargs)
        return super().__torch_function__(PLAIN_FORMS.get(func, func), types, args, kwargs)


def twice_differentiable() -> contextlib.AbstractContextManager[Any]:
    """Return a ``TwiceDifferentiable`` if what is computed under it is differentiated, and else a block without effect."""
    return TwiceDifferentiable() if torch.is_grad_enabled() or transformed() else contextlib.nullcontext()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast is off in this block, on every kind of device."""
    with contextlib.ExitStack() as off:
        for kind in autocast_kinds():
            off.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_kinds() -> list[str]:
    """The kinds of devices on which autocast is on."""
    return [kind for kind in _kinds() if torch.is_autocast_enabled(kind)]


@functools.cache
def _kinds() -> tuple[str, ...]:
    """The kinds of devices that there are here."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def _plain_attention(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]


def _plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _plain_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    kernel = mode not in ("sum", "mean") or max_norm is not None or scale_grad_by_freq or sparse or weight.dim() != 2
    if kernel or not input.numel() or (input.dim() == 1 and offsets is None):
        others = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(input, weight, *others, padding_idx)
    flat = input.reshape(-1)
    if input.dim() == 2:
        bag, bags = torch.arange(len(flat), device=flat.device) // input.shape[1], len(input)
    else:
        assert offsets is not None
        begins = offsets[:-1] if include_last_offset else offsets
        bag, bags = torch.bucketize(torch.arange(len(flat), device=flat.device), begins, right=True) - 1, len(begins)
    factors = weight.new_ones(len(flat)) if per_sample_weights is None else per_sample_weights.reshape(-1)
    if padding_idx is not None:
        factors = factors * (flat != padding_idx % len(weight))
    rows = F.embedding(flat, weight) * factors[:, None]
    total = weight.new_zeros(bags, weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    return total / factors.new_zeros(bags).index_add(0, bag, factors).clamp(min=1)[:, None]


def _plain_embedding(input: Tensor, weight: Tensor, **named: Any) -> Tensor:
    return F.embedding(input, weight, **(named | {"sparse": False}))  # PyTorch gives a mode all others by name


PLAIN_FORMS: dict[Any, Callable[..., Any]] = {
    F.embedding: _plain_embedding,
    F.embedding_bag: _plain_embedding_bag,
    F.scaled_dot_product_attention: _plain_attention,
    torch._weight_norm: _plain_weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    **weighted_losses.FORMS,
}


WRONG_TWICE = {
    "SparseCooTensorWithDimsAndTensorsBackward0": (
        "torch.sparse_coo_tensor of values that require grad has a second derivative in PyTorch that leaves a part out: multiply "
        "by index_select and index_add, or make the sparse tensor by dense.to_sparse()"
    ),
    "SparseCompressedTensorBackward0": (
        "a compressed sparse tensor (torch.sparse_csr_tensor) of values that require grad has no second derivative in PyTorch: "
        "multiply by index_select and index_add, or make a sparse tensor by dense.to_sparse()"
    ),
}
"""Nodes of PyTorch whose backward has no graph, or one that leaves a part out, by name, with what to do instead."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def refuse_once(gradients: Iterable[Tensor | None], until: Iterable[Tensor]) -> None:
    """Refuse gradients, made with their graph, that went through an operator which is differentiable once.

    PyTorch puts a node that raises in their graph, but without a link to the inputs. The second derivative in another tensor
    would therefore silently be zero.

    Args:
        gradients: the gradients.
        until: tensors at which the search of the graph stops.

    Raises:
        RuntimeError: there is such an operator.
    """
    if any(node_name(node) == "torch::autograd::Error" for node in nodes(gradients, until)):
        raise RuntimeError(
            "the function calls an operator that is differentiable once (once_differentiable), so that it has no second "
            "derivative; write its backward in operators of PyTorch, without that decorator"
        )


def refuse_reentrant(out: Tensor) -> None:
    """Refuse a value that went through ``torch.utils.checkpoint`` in a way that hides what it was computed from.

    Raises:
        RuntimeError: ``use_reentrant`` was true.
    """
    if any(node_name(node) == "CheckpointFunctionBackward" for node in nodes([out])):
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True hides the weights from torch.autograd.grad; give use_reentrant=False"
        )


@contextlib.contextmanager
def refuse_constant_gradients(outputs: Iterable[Tensor], until: Iterable[Tensor]) -> Iterator[list[Any]]:
    """Refuse what in this block returns a gradient without a graph, as a Function with ``numpy`` or ``.data`` does.

    A gradient is linear in what the Function's backward is given. If that has a graph, then so has the gradient, or it is zero.
    Otherwise PyTorch would take it for a constant, and the second derivative would silently be wrong.

    Args:
        outputs: the tensors that are differentiated in the block, with ``create_graph=True``.
        until: tensors at which the search of the graph stops.

    Yields:
        The nodes of the graph that belong to an ``autograd.Function``.

    Raises:
        RuntimeError: the message names the Function, or what else it is (``WRONG_TWICE``).
    """
    constant: list[str] = []
    once: list[str] = []

    def before(given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in given)

    def after(node: Any, found: tuple[Tensor | None, ...]) -> None:
        gradients = [g for g in found if g is not None]
        if not any(g.requires_grad for g in gradients) and any(g.is_sparse or bool(g.any()) for g in gradients):
            constant.append(type(node).__name__.removesuffix("Backward"))

    every = [] if functorch_level() else list(nodes(outputs, until))
    functions = [node for node in every if isinstance(node, BackwardCFunction)]
    known = [(node, WRONG_TWICE[name]) for node in every if (name := node_name(node)) in WRONG_TWICE]
    handles = [node.register_prehook(lambda _, text=text: once.append(text)) for node, text in known]
    handles += [node.register_prehook(before) for node in functions]
    handles += [node.register_hook(lambda found, _, node=node: after(node, found)) for node in functions]
    try:
        yield functions
    finally:
        for handle in handles:
            handle.remove()
    if once:
        raise RuntimeError(once[0])
    if constant:
        raise RuntimeError(
            f"{constant[0]} does not support double backward: its backward returns a gradient without a graph (numpy, .data, "
            "detach or no_grad), so that a second derivative would silently be wrong; compute it with operators of PyTorch"
        )

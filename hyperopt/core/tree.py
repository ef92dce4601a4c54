"""Conversion between trees of tensors and one ``(rows, dim)`` matrix, so that every solver is plain algebra on a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hyperopt.core.checks import plain, require_choice
from hyperopt.core.precision import half_eps

ROWS = ("auto", "batch", "joint")


def tree_norm(tree: Any) -> float:
    """Return the Euclidean norm over all tensors of a tree, 0 if the tree has none."""
    tensors = [leaf.detach() for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return float(total_norm(tensors)) if tensors else 0.0


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm over all entries of at least one tensor, on the device of the first."""
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))


@dataclass(frozen=True)
class Layout:
    """How a tree of tensors lies in a matrix.

    Attributes:
        spec: structure of the tree.
        shapes: shape of each leaf.
        dtypes: dtype of each leaf; the map is called with leaves of these dtypes.
        rows: number of rows; ``rows="joint"`` gives 1.
        widths: number of columns of each leaf; their sum is ``dim``. A complex number takes two columns.
        dtype: dtype of the matrix: the promoted dtype of the leaves, at least float32.
        joint: whether all leaves form one row.
        device: where all leaves live.
        scales: the unit of each leaf in the matrix; an empty tuple stands for 1 everywhere.
    """

    spec: Any
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    joint: bool
    device: torch.device
    scales: tuple[float, ...] = ()

    @property
    def rounding(self) -> float:
        """The largest eps of the leaves in half precision, 0 without any: their rounding remains in the float32 matrix."""
        return max(map(half_eps, self.dtypes), default=0.0)

    @property
    def trivial(self) -> bool:
        """Whether the matrix is the tree's only leaf, unchanged."""
        one = len(self.shapes) == 1 and self.shapes[0] == (self.rows, self.widths[0]) and self.dtypes[0] == self.dtype
        return one and not self.scales

    def matrix(self, tree: Any, rows: int | None = None, *, dual: bool = False) -> Tensor:
        """Return the tree as a matrix of shape (rows, dim), in units of ``scales``; a single leaf is a view if possible.

        Args:
            tree: the state.
            rows: number of rows in ``tree``, if it holds only some of them (not for a joint layout).
            dual: whether ``tree`` holds derivatives with respect to a state, such as an adjoint variable.
        """
        count = self.rows if rows is None else rows
        leaves, spec = optree.tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(
                f"the map changed the structure of the state: got {spec}, w0 has {self.spec}; return the structure of w0"
            )
        flat = []
        for i, (leaf, shape, width) in enumerate(zip(leaves, self.shapes, self.widths, strict=True)):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"the map returned a {type(leaf).__name__} as leaf {i} of the state; it must be a tensor")
            expected = shape if self.joint else torch.Size((count, *shape[1:]))
            if leaf.shape != expected:
                raise ValueError(
                    f"the map changed the shape of leaf {i} of the state: got {tuple(leaf.shape)}, expected {tuple(expected)}; "
                    f"make w0 and phi(w0) the same shape"
                )
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"the map returned {leaf.dtype} for leaf {i} of the state; a state must be floating-point")
            if leaf.dtype != self.dtypes[i] and not torch.is_autocast_enabled(leaf.device.type):
                raise TypeError(
                    f"the map changed the dtype of leaf {i} of the state: got {leaf.dtype}, w0 has {self.dtypes[i]}; make w0 and "
                    f"phi(w0) the same dtype"
                )
            if leaf.device != self.device:
                raise ValueError(
                    f"the map moved leaf {i} of the state to {leaf.device}, w0 is on {self.device}; move w0 or what the map uses"
                )
            flat.append((torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).reshape(count, width))
        if self.scales:
            flat = [x.to(self.dtype) * (scale if dual else 1 / scale) for x, scale in zip(flat, self.scales, strict=True)]
        out = flat[0] if len(flat) == 1 else torch.cat([x.to(self.dtype) for x in flat], dim=1)
        return out if out.dtype == self.dtype else out.to(self.dtype)

    def tree(self, matrix: Tensor, *, dual: bool = False) -> Any:
        """Return a matrix (of any number of rows, unless joint) as a tree: the inverse of ``matrix``."""
        if self.trivial:
            return optree.tree_unflatten(self.spec, [matrix])
        parts = matrix.split(self.widths, dim=1) if len(self.widths) > 1 else (matrix,)
        if self.scales:
            parts = [x * (1 / scale if dual else scale) for x, scale in zip(parts, self.scales, strict=True)]
        leaves = []
        for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True):
            full = shape if self.joint else (matrix.shape[0], *shape[1:])
            if dtype.is_complex:
                leaves.append(torch.view_as_complex(part.reshape(*full, 2).contiguous()).to(dtype))
            else:
                leaves.append(part.reshape(full).to(dtype))
        return optree.tree_unflatten(self.spec, leaves)


def layout_of(w0: Any, rows: str = "auto", scales: Any = None) -> Layout:
    """Return the layout of ``w0`` in a matrix.

    Args:
        w0: tree of floating-point or complex tensors.
        scales: the unit of each leaf, in the structure of ``w0`` (None: 1 for all).
        rows: ``"batch"``: the leaves share a leading dimension of independent rows; ``"joint"``: everything is one row;
            ``"auto"``: batch if all leaves have at least two dimensions and share the first, else joint.

    Raises:
        ValueError: ``rows`` is unknown, ``w0`` has no leaf, its leaves do not fit ``"batch"``, or ``scales`` has another
            structure or holds something other than positive numbers.
        TypeError: a leaf is not a tensor, or its dtype is neither floating-point nor complex.
    """
    require_choice("", "rows", rows, ROWS)
    leaves, spec = optree.tree_flatten(w0)
    if not leaves:
        raise ValueError("w0 has no tensors; give a tensor, or a tuple, list or dict of tensors")
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"leaf {i} of w0 is a {type(leaf).__name__}; every leaf must be a tensor")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(f"leaf {i} of w0 has dtype {leaf.dtype}; a state must be floating-point: use w0.float()")
        if leaf.device != leaves[0].device:
            raise ValueError(f"w0 mixes devices {leaves[0].device} and {leaf.device}; move all leaves to one device")
    shapes = tuple(leaf.shape for leaf in leaves)
    shared = all(len(s) > 0 and s[0] == shapes[0][0] for s in shapes if len(shapes[0]))
    batch = rows == "batch" or (rows == "auto" and all(len(s) >= 2 for s in shapes) and shared)
    if batch and not (shared and len(shapes[0])):
        got = [tuple(s) for s in shapes]
        raise ValueError(f"rows='batch' needs leaves that share their first dimension, got shapes {got}; use rows='joint'")
    count = shapes[0][0] if batch else 1
    widths = tuple(
        torch.Size(s[1:] if batch else s).numel() * (2 if leaf.is_complex() else 1)
        for s, leaf in zip(shapes, leaves, strict=True)
    )
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype)
    units: tuple[float, ...] = ()
    if scales is not None:
        units, given = tuple(map(plain, optree.tree_leaves(scales))), optree.tree_structure(scales)
        if given != spec:
            raise ValueError(f"scales has the structure {given}, w0 has {spec}; give one number for each tensor of w0")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in units):
            raise ValueError(f"scales={scales!r} must be positive numbers; give each variable its typical size")
    return Layout(spec, shapes, tuple(leaf.dtype for leaf in leaves), count, widths, dtype, not batch, leaves[0].device, units)

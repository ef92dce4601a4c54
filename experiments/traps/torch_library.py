"""What the libraries on torch share: arrays, derivatives, counting and what outlives a solve."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from protocol import Library, NotOfferedError


class TorchLibrary(Library):
    """The part of ``Library`` that is torch's."""

    packages = ("torch",)

    def array(self, numbers: Any, kind: str = "float64") -> torch.Tensor:
        """A tensor."""
        return torch.tensor(numbers, dtype=getattr(torch, kind))

    def numbers(self, array: torch.Tensor) -> Any:
        """Nested lists."""
        return array.detach().double().tolist()

    def gradient(self, f: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
        """By backward, into ``x.grad`` of a leaf."""
        leaf = x.detach().clone().requires_grad_()
        f(leaf).backward()
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def hvp(self, f: Callable[[Any], Any], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Reverse over reverse, with ``create_graph=True``."""
        leaf = x.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad((g * u).sum(), leaf)[0]

    def second_backward(self, f: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
        """With ``retain_graph=True`` in the first."""
        leaf = x.detach().clone().requires_grad_()
        loss = f(leaf)
        loss.backward(retain_graph=True)
        leaf.grad = None
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    def counted(self, phi: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], int]]:
        """Counts the rows handed in."""
        seen = [0]

        def call(w: torch.Tensor, *params: Any) -> Any:
            seen[0] += w.shape[0] if w.dim() > 1 else 1
            return phi(w, *params)

        return call, lambda: seen[0]

    def alive(self, run: Callable[[Callable[..., Any]], Any], phi: Callable[..., Any]) -> int:
        """Weak references to what the map returned, after the result is dropped and garbage collected."""
        found: list[weakref.ref[torch.Tensor]] = []

        def call(w: Any, *params: Any) -> Any:
            leaves = [x.clone().requires_grad_() if not x.requires_grad and x.is_leaf else x for x in params]
            out = phi(w, *leaves)
            found.append(weakref.ref(out))
            return out

        result = run(call)
        assert found
        del result
        gc.collect()
        return sum(ref() is not None for ref in found)

    def batch_norm(self, width: int) -> tuple[Callable[..., Any], Callable[[], int]]:
        """``torch.nn.BatchNorm1d``."""
        layer = torch.nn.BatchNorm1d(width, dtype=torch.float64)
        counter = layer.num_batches_tracked
        assert counter is not None
        return layer, lambda: int(counter)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """On the CPU, bfloat16."""
        return torch.autocast("cpu", dtype=torch.bfloat16)


def tensors_only(w0: Any, what: str) -> None:
    """Refuse, for a library, a state that is no single tensor."""
    if not isinstance(w0, torch.Tensor):
        raise NotOfferedError(f"a state is {what}")

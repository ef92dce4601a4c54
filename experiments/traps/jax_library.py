"""What the libraries on JAX share: arrays, derivatives and counting. Double precision is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from protocol import Library

jax.config.update("jax_enable_x64", True)


LOCKSTEP = "under jax.vmap every row is evaluated until the last one stops, for any library"


class JaxLibrary(Library):
    """The part of ``Library`` that is JAX's."""

    packages = ("jax",)

    def array(self, numbers: Any, kind: str = "float64") -> jax.Array:
        """A JAX array."""
        return jnp.asarray(numbers, dtype=kind)

    def numbers(self, array: jax.Array) -> Any:
        """Nested lists."""
        return array.tolist()

    def gradient(self, f: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        """``jax.grad``."""
        return jax.grad(f)(x)

    def hvp(self, f: Callable[[Any], Any], x: jax.Array, u: jax.Array) -> jax.Array:
        """Forward over reverse, as JAX's documentation has it."""
        return jax.jvp(jax.grad(f), (x,), (u,))[1]

    def second_backward(self, f: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        """The pullback of ``jax.vjp``, called twice."""
        out, pullback = jax.vjp(f, x)
        pullback(jnp.ones_like(out))
        return pullback(jnp.ones_like(out))[0]

    def counted(self, phi: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], int]]:
        """By a callback from the running program; under ``vmap`` it is called once a row."""
        seen = [0]

        def tick(_: Any) -> None:
            seen[0] += 1

        def call(w: Any, *params: Any) -> Any:
            jax.debug.callback(tick, w.ravel()[0])
            return phi(w, *params)

        def count() -> int:
            jax.effects_barrier()
            return seen[0]

        return call, count


def in_batches(run: Callable[..., Any], w0: Any, params: tuple[Any, ...], row_params: tuple[int, ...]) -> Any:
    """``run(w0, *params)`` under ``jax.vmap``, over the rows of ``w0`` and of the parameters in ``row_params``."""
    axes = (0, *(0 if i in row_params else None for i in range(len(params))))
    return jax.vmap(run, in_axes=axes)(w0, *params)


def known(x: Any) -> bool:
    """Whether a number can be read: outside of a transformation."""
    return not isinstance(x, jax.core.Tracer)

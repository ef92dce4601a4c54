"""Ways to one outer gradient of the equilibrium model, for ``arithmetic.py``; each library is imported where it is used.

    w_i = tanh(w_i A + B x_i + c), T iterations from zero;   v <- J^T v + g, K terms;   d E / d (A, B, c, W, b)

Rivals are at their best documented settings for this problem: their own fixed-point iteration and Neumann terms, tolerances that
never stop them before T and K. hypertorch has the rows' input in its map, since that takes states and hyperparameters alone and
the gradient in B must pass through it; torchdeq and JAX get ``B x + c`` hoisted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Gradient = Callable[[], list[Any]]
NAMES = ("A", "B", "c", "W", "b")


def floor(p: dict[str, Tensor], steps: int) -> Gradient:
    """The hand-written loop: ``addmm`` and in-place ``tanh``, ``v <- g + (v (1 - w^2)) A^T``, three closing products."""
    x, y, A, B, c, W, b = (p[name] for name in ("x", "y", *NAMES))
    head = [W.clone().requires_grad_(), b.clone().requires_grad_()]

    def gradient() -> list[Tensor]:
        with torch.no_grad():
            u = functional.linear(x, B, c)
            w = x.new_zeros(len(x), len(A))
            for _ in range(steps):
                w = torch.addmm(u, w, A).tanh_()
        leaf = w.detach().requires_grad_()
        loss = functional.cross_entropy(functional.linear(leaf, *head), y)
        g, gW, gb = torch.autograd.grad(loss, (leaf, *head))
        with torch.no_grad():
            slope = 1 - w * w
            v = g
            for _ in range(steps):
                v = torch.addmm(g, v * slope, A.T)
            v = v * slope
            return [w.T @ v, v.T @ x, v.sum(0), gW, gb]

    return gradient


def ours(p: dict[str, Tensor], steps: int) -> dict[str, Gradient]:
    """``fixed_point`` with a plain closure and with the cell's closed-form products, unrolling, and the notebook's loop."""
    import hyperopt
    from hyperopt.nn.equilibrium import TanhAffine

    x, y = p["x"], p["y"]
    params = A, B, c, W, b = [p[name].clone().requires_grad_() for name in NAMES]
    w0 = x.new_zeros(len(x), len(A))
    solver = hyperopt.Picard(rtol=0, atol=0, max_steps=steps)
    adjoint = hyperopt.Implicit(hyperopt.Neumann(rtol=0, atol=0, max_steps=steps))
    cell = TanhAffine()

    def finish(w: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(functional.cross_entropy(functional.linear(w, W, b), y), params))

    def closure() -> list[Tensor]:
        u = functional.linear(x, B, c)
        sol = hyperopt.fixed_point(lambda w: torch.tanh(torch.addmm(u, w, A)), w0, solver=solver, adjoint=adjoint)
        found = finish(sol.value)
        hyperopt.certify(sol, 1.0)
        return found

    def closed_form() -> list[Tensor]:
        u = functional.linear(x, B, c)
        sol = hyperopt.fixed_point(cell, w0, (u, A), row_args=(0,), solver=solver, adjoint=adjoint)
        found = finish(sol.value)
        hyperopt.certify(sol, 1.0)
        return found

    def unrolled() -> list[Tensor]:
        u, w = functional.linear(x, B, c), w0
        for _ in range(steps):
            w = torch.tanh(torch.addmm(u, w, A))
        return finish(w)

    def phi(w: Tensor) -> Tensor:
        return torch.tanh(w @ A + x @ B.T + c)

    def notebook() -> list[Tensor]:
        with torch.no_grad():
            w = w0
            for _ in range(steps):
                w = phi(w)
        leaf = w.clone().requires_grad_()
        g, *head = torch.autograd.grad(functional.cross_entropy(functional.linear(leaf, W, b), y), (leaf, W, b))
        v = g
        for _ in range(steps):  # a graph for every term
            v = torch.autograd.grad(phi(leaf), leaf, v)[0] + g
        return [*torch.autograd.grad(phi(leaf), (A, B, c), v), *head]

    return {
        "`fixed_point`, a plain closure": closure,
        "`fixed_point`, the tanh-affine cell": closed_form,
        "autograd through the unrolled loop": unrolled,
        "the notebook's loop (from its description)": notebook,
    }


def hypertorch(p: dict[str, Tensor], steps: int) -> dict[str, Gradient]:
    """``fixed_point``, ``CG_normaleq`` and ``reverse_unroll`` as in its example of an equilibrium model."""
    import hypergrad  # pyright: ignore[reportMissingImports]

    x, y = p["x"], p["y"]
    params = [p[name].clone().requires_grad_() for name in NAMES]
    w0 = x.new_zeros(len(x), len(p["A"]))

    def dynamics(state: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        return [torch.tanh(torch.addmm(functional.linear(x, params[1], params[2]), state[0], params[0]))]

    def loss(state: list[Tensor], params: list[Tensor]) -> Tensor:
        return functional.cross_entropy(functional.linear(state[0], params[3], params[4]), y)

    def solved() -> list[Tensor]:
        state = [w0]
        with torch.no_grad():
            for _ in range(steps):
                state = dynamics(state, params)
        return state

    def by(method: Any) -> Gradient:
        return lambda: list(method(solved(), params, steps, dynamics, loss, set_grad=False))

    return {"hypertorch `fixed_point`": by(hypergrad.fixed_point), "hypertorch `CG_normaleq`": by(hypergrad.CG_normaleq)}


def torchdeq(p: dict[str, Tensor], steps: int) -> dict[str, Gradient]:
    """``get_deq(ift=True)`` with its fixed-point iteration both ways."""
    from torchdeq import get_deq  # pyright: ignore[reportMissingImports]

    x, y = p["x"], p["y"]
    params = A, B, c, W, b = [p[name].clone().requires_grad_() for name in NAMES]
    w0 = x.new_zeros(len(x), len(A))
    name, never = "fixed_point_iter", 1e-30
    deq = get_deq(ift=True, f_solver=name, b_solver=name, f_max_iter=steps, b_max_iter=steps, f_tol=never, b_tol=never)

    def gradient() -> list[Tensor]:
        u = functional.linear(x, B, c)
        out, _ = deq(lambda w: torch.tanh(torch.addmm(u, w, A)), w0)
        return list(torch.autograd.grad(functional.cross_entropy(functional.linear(out[-1], W, b), y), params))

    return {"torchdeq, `ift=True`": gradient}


def jax(p: dict[str, Tensor], steps: int) -> dict[str, Gradient]:
    """A jitted fixed point with a custom vjp of K Neumann terms."""
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    x, y = jnp.asarray(p["x"].numpy()), jnp.asarray(p["y"].numpy())
    params = tuple(jnp.asarray(p[name].numpy()) for name in NAMES)

    @jax.custom_vjp
    def solve(u: Any, A: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, w: jnp.tanh(w @ A + u), jnp.zeros((x.shape[0], A.shape[0]), x.dtype))

    def forward(u: Any, A: Any) -> Any:
        w = solve(u, A)
        return w, (w, u, A)

    def backward(kept: Any, g: Any) -> Any:
        w, u, A = kept
        _, pull = jax.vjp(lambda w, u, A: jnp.tanh(w @ A + u), w, u, A)
        v = jax.lax.fori_loop(0, steps, lambda _, v: pull(v)[0] + g, g)
        return pull(v)[1:]

    solve.defvjp(forward, backward)

    def loss(params: Any) -> Any:
        A, B, c, W, b = params
        logits = solve(x @ B.T + c, A) @ W.T + b
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    compiled = jax.jit(jax.grad(loss))
    return {"JAX, jitted": lambda: [np.asarray(each) for each in compiled(params)]}


LIBRARIES: dict[str, Callable[[dict[str, Tensor], int], dict[str, Gradient]]] = {
    "ours": ours,
    "hypertorch": hypertorch,
    "torchdeq": torchdeq,
    "jax": jax,
}

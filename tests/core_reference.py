"""A reference for the core that shares nothing with it: Newton steps with dense Jacobians, differentiable to any order."""

import torch
from optree.integrations.torch import tree_ravel
from torch.autograd.functional import jacobian


def newton(phi, w0, *, graph_steps=1, steps=30):
    """The fixed point of ``phi``, as a tree. ``n`` steps with a graph give right derivatives to order ``2**n - 1``."""
    flat, unravel = tree_ravel(w0)

    def f(z):
        return tree_ravel(phi(unravel(z)))[0]

    eye = torch.eye(flat.numel(), dtype=flat.dtype)
    z = flat.detach()
    with torch.no_grad():
        for _ in range(steps):
            z = z + torch.linalg.solve(eye - jacobian(f, z), f(z) - z)
    for _ in range(graph_steps):
        z = z + torch.linalg.solve(eye - jacobian(f, z, create_graph=True), f(z) - z)
    return unravel(z)


def unrolled(phi, w0, steps=200):
    """Plain loop: autograd through it is right to any order up to ``q**steps``."""
    w = w0
    for _ in range(steps):
        w = phi(w)
    return w


def square(tree):
    """An outer loss of any tree of tensors."""
    flat = tree_ravel(tree)[0]
    return (flat**2).sum() + flat.sin().sum()


def close(got, want, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


class Counted:
    """Counts the calls of a map and the rows passed in each."""

    def __init__(self, phi):
        self.phi, self.calls, self.rows = phi, 0, []

    def __call__(self, w, *args):
        self.calls += 1
        self.rows.append(w.shape[0] if isinstance(w, torch.Tensor) and w.dim() else 1)
        return self.phi(w, *args)

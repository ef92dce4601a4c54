# %% [markdown]
# # Reading a certificate
#
# A hypergradient is computed from two approximate solutions: the inner problem is solved to some tolerance, and so is
# the linear system of the backward pass (the *adjoint system*). How wrong is the result? A *certificate* gives the
# answer from the residuals, which were measured on the way. It costs nothing.
#
# This tutorial shows the two kinds of certificate, a bound and an estimate, holds both against the true error, and shows
# what is said when something goes wrong.

# %%
"""A tutorial: bounds and estimates of a hypergradient's error, beside the true error."""

import math

import torch
from matplotlib import pyplot

import hyperopt

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

DIM = 30
matrix = torch.randn(DIM, DIM)
matrix = 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)
target = torch.randn(1, DIM)

# %% [markdown]
# ## A bound
#
# The inner problem is the fixed point of `w = w A + lam`, where the matrix `A` has norm 0.9. The outer loss is half the
# squared distance of `w` from a target. Everything about this problem is known:
#
# - the map brings points closer by the factor 0.9 (`contraction`),
# - its Jacobian does not change with `w` (`jacobian_lipschitz=0`),
# - its derivative in `lam` is the identity (`input_norm=1`) and does not change either (`input_lipschitz=0`),
# - the gradient of the outer loss in `w` does not change faster than `w` (`outer_lipschitz=1`).
#
# With these constants the certificate is a bound: the true error cannot be larger. The theory is that of Grazzi et al.
# (ICML 2020, [arXiv 2006.16218](https://arxiv.org/abs/2006.16218)), applied to the residuals that were measured.

# %%
constants = hyperopt.Constants(contraction=0.9, jacobian_lipschitz=0.0, input_norm=1.0, input_lipschitz=0.0, outer_lipschitz=1.0)


def affine(w, lam):
    """Return the next state of the affine map."""
    return w @ matrix + lam


def curved(w, lam):
    """Return the next state of a map that bends; it contracts by 0.9 at most."""
    return torch.tanh(w @ matrix + lam)


def hypergradient(phi, tolerance):
    """Solve forward and backward to a tolerance; return the solution and the hypergradient."""
    lam = torch.full((1, DIM), 0.1, requires_grad=True)
    solution = hyperopt.fixed_point(
        phi,
        torch.zeros(1, DIM),
        args=(lam,),
        solver=hyperopt.Picard(rtol=tolerance, max_steps=1000),
        adjoint=hyperopt.Implicit(hyperopt.Neumann(rtol=tolerance, max_steps=1000)),
    )
    ((solution.value - target).square().sum() / 2).backward()
    return solution, lam.grad


tolerances = [10.0**-k for k in range(1, 10)]
rows = {"affine": [], "curved": []}
for name, phi in (("affine", affine), ("curved", curved)):
    _, exact = hypergradient(phi, 1e-13)
    for tolerance in tolerances:
        solution, gradient = hypergradient(phi, tolerance)
        norm = float(gradient.norm())
        bound = hyperopt.certify(solution, norm, constants) if name == "affine" else None
        rows[name].append((float((gradient - exact).norm()), hyperopt.certify(solution, norm), bound))

print("tolerance   true error   estimate     bound")
for tolerance, (error, estimate, bound) in zip(tolerances, rows["affine"], strict=True):
    print(f"{tolerance:9.0e} {error:12.2e} {estimate.error:10.2e} {bound.error:9.2e}")
    assert bound.is_bound and error <= bound.error

# %% [markdown]
# ## An estimate
#
# Nobody knows such constants for a real network. Without them the certificate is an *estimate*: the contraction is read
# off the decay of the residuals, and the sensitivity from the size of the adjoint solution. `is_bound` is then false.
# An estimate can be too small or too large. What matters is its order of magnitude.

# %%
ratios = []
for name in rows:
    for error, estimate, _ in rows[name]:
        assert not estimate.is_bound
        ratios.append(estimate.error / error)
print(f"the estimates are {min(ratios):.1f} to {max(ratios):.1f} times the true error")
assert 0.1 < min(ratios) and max(ratios) < 100

figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for panel, (name, found) in zip(panels, rows.items(), strict=True):
    panel.loglog(tolerances, [error for error, _, _ in found], "k-", label="true error")
    panel.loglog(tolerances, [estimate.error for _, estimate, _ in found], "C1.--", label="estimate")
    if name == "affine":
        panel.loglog(tolerances, [bound.error for _, _, bound in found], "C0.-", label="bound")
    panel.set(title=f"{name} map", xlabel="tolerance")
    panel.legend()
panels[0].set(ylabel="error of the hypergradient")
figure.savefig("certificates.png", dpi=80)

# %% [markdown]
# ## When something goes wrong
#
# Now the matrix is three times as large, so plain iteration runs away. Three things tell:
#
# - the *status* of the solve, here `diverged`, and its message, which says what to change;
# - a warning at once, because `policy="warn"` is the default (`policy="raise"` makes it an error, and `"ignore"`, which
#   is used below, leaves the statuses to you);
# - and the certificate, whose error is NaN: nothing can be said.

# %%
lam = torch.full((1, DIM), 0.1, requires_grad=True)


def growing(w):
    """Return the next state of a map that does not contract."""
    return 3 * w @ matrix + lam


solution = hyperopt.fixed_point(growing, torch.zeros(1, DIM), policy="ignore", adjoint=hyperopt.Implicit(policy="ignore"))
((solution.value - target).square().sum() / 2).backward()
certificate = hyperopt.certify(solution, float(lam.grad.norm()))
print(solution.forward.describe())
print(certificate)
print(hyperopt.diagnose(growing, torch.zeros(1, DIM)))
assert solution.status == hyperopt.Status.diverged and math.isnan(certificate.error)

# %% [markdown]
# Other solvers do not need a contraction. With Anderson acceleration and GMRES both solves converge, and the
# certificate says so again.

# %%
lam.grad = None
solution = hyperopt.fixed_point(
    growing,
    torch.zeros(1, DIM),
    solver=hyperopt.Anderson(rtol=1e-10, window=DIM, max_steps=500),
    adjoint=hyperopt.Implicit(hyperopt.GMRES(rtol=1e-10, window=DIM)),
)
((solution.value - target).square().sum() / 2).backward()
inverse = torch.linalg.inv(torch.eye(DIM) - 3 * matrix)
exact = (lam.detach() @ inverse - target) @ inverse.T
error = float((lam.grad - exact).norm() / exact.norm())
print(f"{solution.status}, {solution.adjoint.status}: relative error of the hypergradient {error:.1e}")
assert error < 1e-7

# %% [markdown]
# ## What to try next
#
# - Stop after a fixed number of steps: `hyperopt.Picard(rtol=0, max_steps=20)` and
#   `hyperopt.Implicit(hyperopt.Neumann(rtol=0, max_steps=20))`. The status is `fixed_steps`, and the certificate works.
# - Solve only the backward pass to a tight tolerance. Which of the two residuals limits the error?
# - Trained problems have certificates too: `estimate.certificate` of `hyperopt.hypergradient`.
#   `BilevelProblem(constants=...)` makes it a bound.
# - The same numbers of a run on the command line are `hypergrad/error_estimate` and `hypergrad/is_bound` in TensorBoard.

# %% [markdown]
# # Tuning a lasso
#
# The *lasso* is linear regression with a penalty on the absolute values of the weights. Most weights become exactly
# zero, so it selects features. Its loss is not differentiable at zero, and one usually tunes the penalty by trying many
# values. Yet the trained weights are the fixed point of a simple map, and a fixed point can be differentiated.
#
# `hyperopt.fixed_point` is the function below everything else in this library. Give it a map and a start, and it
# returns a solution that is differentiable in everything that the map uses.

# %%
"""A tutorial: the penalty of a lasso is tuned by the derivative of a fixed point, checked against the closed form."""

import torch
from matplotlib import pyplot
from sklearn.datasets import make_regression
from sklearn.linear_model import Lasso

import hyperopt

torch.set_default_dtype(torch.float64)

x, y = (
    torch.as_tensor(part) for part in make_regression(n_samples=240, n_features=60, n_informative=8, noise=40.0, random_state=0)
)
x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
train_x, train_y, val_x, val_y = x[:120], y[:120], x[120:], y[120:]

# %% [markdown]
# ## The map
#
# *Proximal gradient descent* makes a gradient step on the squared error, and then moves each weight towards zero by a
# constant, where it stops. This last operation is called soft thresholding. Where a step changes nothing, the weights
# minimise the loss of the lasso.

# %%
n = len(train_y)
gram, moments = train_x.T @ train_x / n, train_x.T @ train_y / n
step = 1 / torch.linalg.matrix_norm(gram, 2)


def phi(w, penalty):
    """Return the weights after one proximal gradient step."""
    moved = w - step * (gram @ w - moments)
    return moved.sign() * (moved.abs() - step * penalty).relu()


def trained(penalty, start=None):
    """Return the weights of the lasso, differentiable in the penalty."""
    return hyperopt.fixed_point(
        phi,
        torch.zeros(60) if start is None else start,
        args=(penalty,),
        solver=hyperopt.Anderson(rtol=1e-12, max_steps=2000),
        adjoint=hyperopt.Implicit(hyperopt.GMRES(rtol=1e-12, window=60)),
        policy="raise",
    )


def validation(w):
    """Return the error on the validation rows."""
    return (val_x @ w - val_y).square().mean() / 2


penalty = torch.tensor(0.05, requires_grad=True)
solution = trained(penalty)
(ours,) = torch.autograd.grad(validation(solution.value), penalty)
print(solution.forward.describe())
print(f"{int((solution.value != 0).sum())} of 60 weights are not zero; the hypergradient is {ours:.8f}")

# %% [markdown]
# ## Three checks
#
# 1. scikit-learn's `Lasso` must find the same weights.
# 2. Near a solution the set $S$ of weights that are not zero stays the same. On it the weights have a formula, and its
#    derivative is $dw_S / d\lambda = -(X_S^T X_S / n)^{-1} \, \mathrm{sign}(w_S)$.
# 3. A finite difference: train at a slightly larger and a slightly smaller penalty.

# %%
w = solution.value.detach()
reference = Lasso(alpha=0.05, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(train_x.numpy(), train_y.numpy())
assert torch.allclose(w, torch.as_tensor(reference.coef_), atol=1e-7)

kept = w != 0
slope = torch.zeros(60)
slope[kept] = -torch.linalg.solve(gram[kept][:, kept], w[kept].sign())
exact = slope @ (val_x.T @ (val_x @ w - val_y) / len(val_y))
with torch.no_grad():
    difference = (validation(trained(0.05 + 1e-6).value) - validation(trained(0.05 - 1e-6).value)) / 2e-6
print(f"hypergradient {ours:.8f}, closed form {exact:.8f}, finite difference {difference:.8f}")
assert abs(ours - exact) < 1e-7 * abs(exact)
assert abs(difference - exact) < 1e-4 * abs(exact)

# %% [markdown]
# ## Tuning
#
# Each step starts from the weights of the last one, so it takes few iterations. The optimizer moves the logarithm of
# the penalty, because `Positive` says so.

# %%
hyper = hyperopt.Hyperparameters({"penalty": hyperopt.Positive(0.01)})
optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
path, w = [], torch.zeros(60)
for _ in range(25):
    value = hyper.values()["penalty"]
    solution = trained(value, start=w)
    loss = validation(solution.value)
    path.append((value.item(), loss.item()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    w = solution.value.detach()

grid = torch.logspace(-2.5, -0.3, 40)
with torch.no_grad():
    losses = torch.stack([validation(trained(each).value) for each in grid])
print(f"validation loss {path[0][1]:.4f} at the start, {path[-1][1]:.4f} now, {losses.min():.4f} for the best of 40")
assert path[-1][1] < float(losses.min()) + 5e-3

# %%
figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
axes.semilogx(grid, losses, label="validation loss")
axes.plot(*zip(*path, strict=True), "k.", label="25 steps")
axes.set(xlabel="penalty", ylabel="validation loss")
axes.legend()
figure.savefig("lasso.png", dpi=80)

# %% [markdown]
# The idea is that of Bertrand et al. (ICML 2020, [arXiv 2002.08943](https://arxiv.org/abs/2002.08943)): the derivative
# needs only the weights that are not zero.

# %% [markdown]
# ## What to try next
#
# - Give each feature a penalty of its own, `hyperopt.Positive(0.01, per="element")`. Which features lose their penalty?
# - Use the elastic net: add `ridge * w` to the gradient, and tune both penalties.
# - At which penalties does the set of features change? The validation loss has a kink there, and the derivative jumps.
# - Look at `hyperopt.diagnose(lambda w: phi(w, 0.05), w)`. Why does plain iteration need many steps here?

# %% [markdown]
# # Your first hypergradient
#
# A *hyperparameter* is a number that training does not choose, such as the strength of a penalty. Usually one trains
# for several values and keeps the best. A *hypergradient* is the derivative of the validation loss with respect to the
# hyperparameter. With it, gradient descent can tune hyperparameters, also when there are thousands of them.
#
# This tutorial computes one hypergradient, checks it in two ways, and then tunes a penalty with it. The model is ridge
# regression on scikit-learn's diabetes data (442 patients, 10 features), since everything about it is known exactly.

# %%
"""A tutorial: the hypergradient of ridge regression, checked against the closed form, and ten steps with it."""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_diabetes

import hyperopt

torch.set_default_dtype(torch.float64)

x, y = (torch.as_tensor(part) for part in load_diabetes(return_X_y=True))
x, y = x / x.std(0), (y - y.mean()) / y.std()
train_x, train_y, val_x, val_y = x[:60], y[:60], x[60:260], y[60:260]  # few rows to train on, so that a penalty helps

# %% [markdown]
# ## Two losses
#
# The problem has two levels:
#
# - The *inner loss* is what training minimises over the weights `w`, for given hyperparameters `lam`.
# - The *outer loss* is what the hyperparameters should minimise. Here it is the error on the validation rows.
#
# Both are functions of `(w, lam, batch)`. The batch is `None` here, because the losses bring their own data.


# %%
def inner_loss(w, lam, batch):
    """Return the training error and the penalty."""
    return (train_x @ w - train_y).square().mean() / 2 + lam["penalty"] * w.square().sum() / 2


def outer_loss(w, lam, batch):
    """Return the validation error."""
    return (val_x @ w - val_y).square().mean() / 2


problem = hyperopt.BilevelProblem(inner_loss, outer_loss)

# %% [markdown]
# ## The hypergradient
#
# The penalty changes the validation loss only through the trained weights `w(lam)`. The rule for this is the *implicit
# function theorem*. With the Hessian $H$ of the inner loss,
#
# $$\frac{dE}{d\lambda} = \partial_\lambda E - (\partial_\lambda \nabla_w L)^T u, \qquad H u = \partial_w E.$$
#
# `hyperopt.hypergradient` trains the weights with the inner solver that you name, solves the linear system for `u`
# without ever forming $H$, and returns the result with everything that it knows about it.

# %%
lam = {"penalty": torch.tensor(0.02)}
start = torch.zeros(10)
estimate = hyperopt.hypergradient(problem, start, lam, inner=hyperopt.InnerLBFGS(rtol=1e-8))
ours = estimate.grad["penalty"]
print(estimate)
print("How the linear system was solved:", estimate.choice)

# %% [markdown]
# ## Is it right?
#
# Ridge regression has a formula for the trained weights, $w(\lambda) = (X^T X / n + \lambda I)^{-1} X^T y / n$.
# PyTorch can differentiate that formula, which gives the exact hypergradient. A *finite difference* is a second check,
# which needs no formula: train at a slightly larger and a slightly smaller penalty, and divide the difference of the
# validation losses by the distance.


# %%
def trained(penalty):
    """Return the weights of ridge regression by their formula."""
    n = len(train_y)
    return torch.linalg.solve(train_x.T @ train_x / n + penalty * torch.eye(10), train_x.T @ train_y / n)


def validation(penalty):
    """Return the validation loss after training with this penalty."""
    return outer_loss(trained(penalty), None, None)


penalty = torch.tensor(0.02, requires_grad=True)
(exact,) = torch.autograd.grad(validation(penalty), penalty)
with torch.no_grad():
    difference = (validation(0.02 + 1e-5) - validation(0.02 - 1e-5)) / 2e-5
print(f"hypergradient {ours:.10f}, closed form {exact:.10f}, finite difference {difference:.10f}")
assert abs(ours - exact) < 1e-6 * abs(exact)
assert abs(difference - exact) < 1e-5 * abs(exact)

# %% [markdown]
# ## Tuning
#
# `Hyperparameters` keeps each value inside its range: the optimizer moves the logarithm of a `Positive` number, so the
# penalty can never become negative. `Bilevel` does what `hypergradient` does, and keeps the weights from step to step,
# so that each training starts where the last one ended. The optimizer is an ordinary one of PyTorch.

# %%
hyper = hyperopt.Hyperparameters({"penalty": hyperopt.Positive(0.02)})
bilevel = hyperopt.Bilevel(problem, torch.zeros(10), inner=hyperopt.InnerLBFGS(rtol=1e-8))
optimizer = torch.optim.Adam(hyper.parameters(), lr=0.4)
path = []
for _ in range(25):
    lam = hyper.values()
    estimate = bilevel.step(lam)
    path.append((lam["penalty"].item(), estimate.loss))
    optimizer.zero_grad()
    estimate.backward(lam)
    optimizer.step()

grid = torch.logspace(-3, 1, 200)
losses = torch.stack([validation(each) for each in grid])
best = losses.min()
print(f"validation loss {path[0][1]:.5f} at the start, {path[-1][1]:.5f} now, {best:.5f} for the best of 200 penalties")
assert path[-1][1] < best + 1e-3

# %% [markdown]
# The curve below is the validation loss for 200 penalties, which one would have to train one by one without
# hypergradients. The line is the first hypergradient as a tangent, and the dots are the steps.

# %%
figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
axes.semilogx(grid, losses, label="validation loss")
near = torch.linspace(0.005, 0.06, 20)
axes.plot(near, path[0][1] + ours * (near - 0.02), "C1", label="tangent by the hypergradient")
axes.plot(*zip(*path, strict=True), "k.", label="25 steps of Adam")
axes.set(xlabel="penalty", ylabel="validation loss", ylim=(float(best) - 0.01, path[0][1] + 0.04))
axes.legend()
figure.savefig("first_hypergradient.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Give each feature a penalty of its own: `hyperopt.Positive(0.02, per="element")` with `shapes={"penalty": (10,)}`,
#   and `(lam["penalty"] * w**2).sum() / 2` in the loss. The number of hypergradient steps is almost the same.
# - Replace the linear model by a small network. `hyperopt.Functional(module)` makes a function of weights from it.
# - Use `adjoint=hyperopt.Implicit(hyperopt.Neumann(rtol=0, max_steps=5))`. How far off is the hypergradient now, and
#   what does `estimate.certificate` say about it?

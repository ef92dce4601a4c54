# %% [markdown]
# # A deep equilibrium layer in a network
#
# An ordinary layer computes its output by a formula. An *implicit layer* defines it by an equation. In a *deep
# equilibrium model* (DEQ) the output `z` is the point at which a small module changes nothing any more: `z = f(z, x)`.
# One such layer acts like infinitely many layers with shared weights, and needs the memory of one.
#
# This tutorial writes a cell, puts the layer into a network for scikit-learn's digits, checks its gradient, and looks
# at how the equation is solved.

# %%
"""A tutorial: a deep equilibrium layer in a classifier of digits; its gradient is that of unrolling."""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hyperopt

torch.set_default_dtype(torch.float32)
torch.manual_seed(0)

images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16).float()
train_x, train_y, test_x, test_y = images[:1200], labels[:1200], images[1200:], labels[1200:]

# %% [markdown]
# ## The cell
#
# A cell is any module with `forward(z, x)`. The equation has one solution if `f` brings points closer to each other.
# Here `tanh` never stretches, and spectral normalisation divides the matrix by its largest singular value, so a factor
# of 0.9 makes the map a *contraction*: each application brings two points closer by at least a tenth.


# %%
class Cell(nn.Module):
    """The map `z -> tanh(0.9 W z + x)` with a matrix of spectral norm 1."""

    def __init__(self, width):
        """Make the matrix."""
        super().__init__()
        self.inner = nn.Linear(width, width)
        hyperopt.nn.normalise(self.inner, "spectral")

    def forward(self, z, x):
        """Return the next state."""
        return torch.tanh(0.9 * self.inner(z) + x)


def network(width=40, **layer):
    """Return a classifier with an implicit layer; the keywords are those of the layer."""
    return nn.Sequential(nn.Linear(64, width), hyperopt.nn.DEQ(Cell(width), **layer), nn.Linear(width, 10))


# %% [markdown]
# ## Training
#
# The layer is used like any other. *How the equation is solved* (`solver=`) and *how the solution is differentiated*
# (`adjoint=`) are separate arguments. Anderson acceleration combines the last few iterates, and GMRES solves the linear
# system of the backward pass. After each pass `layer.solution` tells how both went.

# %%
net = network(solver=hyperopt.Anderson(rtol=1e-4), adjoint=hyperopt.Implicit(hyperopt.GMRES(rtol=1e-4)))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for epoch in range(5):
    for rows in torch.randperm(1200).split(100):
        optimizer.zero_grad()
        loss = cross_entropy(net(train_x[rows]), train_y[rows])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
print("forward: ", net[1].solution.forward.describe())
print("backward:", net[1].solution.adjoint.describe())
net.eval()
with torch.no_grad():
    accuracy = float((net(test_x).argmax(1) == test_y).float().mean())
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.85

# %% [markdown]
# ## Is the gradient right?
#
# *Unrolling* is the obvious way to differentiate the layer: apply the cell many times and backpropagate through all
# applications. It needs memory for each of them. The implicit gradient needs the solution only. In double precision,
# with tight tolerances, the two must agree.

# %%
layer = net[1].double()
inputs = torch.randn(5, 40, dtype=torch.float64)
weight = next(layer.parameters())
gradients = []
for solver, adjoint in (
    (hyperopt.Anderson(rtol=1e-12, max_steps=500), hyperopt.Implicit(hyperopt.GMRES(rtol=1e-12, max_steps=500))),
    (hyperopt.Picard(rtol=0, max_steps=400), hyperopt.Unrolled()),
):
    layer.solver, layer.adjoint = solver, adjoint
    gradients.append(torch.autograd.grad(layer(inputs).square().sum(), weight)[0])
implicit, unrolled = gradients
error = float((implicit - unrolled).norm() / unrolled.norm())
print(f"relative difference of the implicit and the unrolled gradient: {error:.1e}")
assert error < 1e-8

# %% [markdown]
# ## How the equation is solved
#
# The *residual* is `|f(z, x) - z|`, relative to the size of `z`. With `trace=True` each solve notes it for every
# iteration. Plain iteration (Picard) reduces it by a constant factor. Anderson acceleration and Broyden's method learn
# from the iterates before and need fewer evaluations of the cell.

# %%
figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
evaluations = {}
for solver in (hyperopt.Picard(rtol=1e-9, max_steps=200), hyperopt.Anderson(rtol=1e-9), hyperopt.Broyden(rtol=1e-9)):
    with torch.no_grad():
        solution = hyperopt.fixed_point(lambda z: layer.cell(z, inputs), torch.zeros_like(inputs), solver=solver, trace=True)
    evaluations[type(solver).__name__] = solution.forward.evaluations
    axes.semilogy(solution.forward.trace, label=type(solver).__name__)
print("evaluations of the cell:", evaluations)
assert evaluations["Anderson"] < evaluations["Picard"]
axes.set(xlabel="iteration", ylabel="relative residual")
axes.legend()
figure.savefig("deq_layer.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Leave the normalisation out and train for longer. Does the solver still converge? `print(hyperopt.diagnose(...))`
#   estimates how strongly the map contracts, and what to choose if it does not.
# - Use images: `hyperopt.nn.ResNetCell` is a convolutional cell, and `hyperopt.nn.MDEQCell` works at several scales.
# - Keep the map well-behaved by a penalty: `with hyperopt.nn.Stabilise(net, jacobian=1) as extra` adds
#   `extra.jacobian` to the loss.
# - Loosen the tolerance of the backward pass to 0.1. Does training become worse, and how much faster?

# %% [markdown]
# # A self-tuning network
#
# Usually a network is trained again for each value of a hyperparameter, or at least trained for a while before the
# hyperparameter moves. A *self-tuning network* (MacKay et al., ICLR 2019,
# [arXiv 1903.03088](https://arxiv.org/abs/1903.03088)) learns *how its best weights depend on the hyperparameters*
# while it is trained. Each row of a batch gets slightly perturbed hyperparameters, and the weights respond to them. The
# validation loss then moves the hyperparameters through that response, and all of it happens in one run.
#
# The example is ridge regression on scikit-learn's diabetes data. It is small, and the best weights have a formula, so
# we can see whether the network has learned the right response. The calls are the same for a convolutional network.

# %%
"""A tutorial: a self-tuning network on ridge regression, whose response is compared with the closed form."""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_diabetes
from torch import nn

from hyperopt import stn

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

x, y = (torch.as_tensor(part) for part in load_diabetes(return_X_y=True))
x, y = x / x.std(0), (y - y.mean()) / y.std()
train, val = (x[:60], y[:60]), (x[60:260], y[60:260])

# %% [markdown]
# ## Declare, convert, write two losses
#
# `HyperSpace` declares what is tuned, with its initial value. `convert` copies a network and gives each weight a
# response. The training loss gets a *draw*: the perturbed hyperparameters of each row of the batch, which
# `draw.h["decay"]` holds in their own units. `net.squared_norm(draw)` is the squared norm of the weights for each row.

# %%
space = stn.HyperSpace({"decay": stn.Positive(3.0)})
net = stn.convert(nn.Linear(10, 1, bias=False), space)


def train_loss(net, batch, draw):
    """Return the squared error and the penalty, a mean over rows with a decay of their own."""
    errors = (net(batch[0], draw).squeeze(1) - batch[1]).square()
    return (errors + draw.h["decay"] * net.squared_norm(draw)).mean() / 2


def val_loss(net, batch, draw):
    """Return the squared error. It sees the hyperparameters only through the weights."""
    return (net(batch[0]).squeeze(1) - batch[1]).square().mean() / 2


# %% [markdown]
# ## One run
#
# Each round trains weights and response for two steps, and then moves the hyperparameters and the size of their
# perturbation once. No learning rate has to be chosen: steps are measured in the scales that training shows, and with
# `rounds=` they fall to zero towards the end.

# %%
ROUNDS = 400
tuner = stn.SelfTuning(net, train_loss, val_loss, stn.SelfTuningSettings(rounds=ROUNDS))
path = []
for _ in range(ROUNDS):
    record = tuner.step(train, val)
    path.append(record.hyper["hyper/decay"])
print(record)

# %% [markdown]
# ## Is it the best decay?
#
# The weights of ridge regression have the formula $w(h) = (X^T X / n + h I)^{-1} X^T y / n$. We compute the validation
# loss for 200 decays by it, and compare the best with what the network has found.


# %%
def trained(decay):
    """Return the weights of ridge regression by their formula."""
    hessian = train[0].T @ train[0] / 60 + decay * torch.eye(10)
    return torch.linalg.solve(hessian, train[0].T @ train[1] / 60)


def validation(weights):
    """Return the validation loss of a linear model."""
    return float((val[0] @ weights - val[1]).square().mean() / 2)


grid = torch.logspace(-3, 1, 200)
losses = torch.tensor([validation(trained(decay)) for decay in grid])
found = space.values()["decay"]
plain = net.collapse()  # an ordinary nn.Linear, with the weights at the decay that was found
ours = validation(plain.weight.detach()[0])
print(f"found decay {found:.3f}, validation loss {ours:.4f}; best of 200: {float(grid[losses.argmin()]):.3f}, ", end="")
print(f"{losses.min():.4f}; at the start: {validation(trained(3.0)):.4f}")
assert ours < float(losses.min()) + 0.01 < validation(trained(3.0))

# %% [markdown]
# ## Has it learned the response?
#
# We draw perturbed decays once more, a row for each, and compare the network's predictions with those of ridge
# regression trained for exactly that decay. A network that ignored the perturbation would make the error of the last
# column.

# %%
with torch.no_grad():
    draw = space.draw(rows=60)
    decays = draw.h["decay"]
    predicted = net(train[0], draw).squeeze(1)
    exact = torch.stack([row @ trained(decay) for row, decay in zip(train[0], decays, strict=True)])
    still = train[0] @ trained(torch.tensor(found))
responding, ignoring = float((predicted - exact).norm()), float((still - exact).norm())
print(f"error of the response {responding:.4f}; without a response it would be {ignoring:.4f}")
assert responding < 0.5 * ignoring

figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.semilogx(grid, losses, label="validation loss")
left.plot(found, ours, "ko", label="found in one run")
left.set(xlabel="decay", ylabel="validation loss", ylim=(float(losses.min()) - 0.01, float(losses.min()) + 0.1))
left.legend()
right.semilogy(path)
right.axhline(float(grid[losses.argmin()]), color="gray", linestyle="--", label="best of 200")
right.set(xlabel="round", ylabel="decay")
right.legend()
figure.savefig("self_tuning_network.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Tune dropout: put `stn.Dropout("rate")` into a network and declare `"rate": stn.Bounded(0.5, 0.0, 0.9)`. Its rate has
#   no gradient of its own, and only the response can tune it.
# - Start from a decay of 0.01. While the weights are not trained, any smaller decay lowers the validation loss, so it
#   falls to where it hardly matters, and the record says that the response is off. Train the weights first: make a
#   hundred steps of `tuner.loss(batch).backward()` and `tuner.optimizers["weights"]`.
# - Print a record every 100 rounds: `stn/response_error` says how well the response predicts the weights.
# - Convert a network of convolutions, and read `hyperopt.stn` for the kinds of layers that respond.

# %% [markdown]
# # Choosing layers by gradients: an architecture mixture
#
# Which operation should a layer be: a convolution, a pooling, or nothing at all? DARTS ([arXiv
# 1806.09055](https://arxiv.org/abs/1806.09055)) makes that question continuous. Each edge of a small network computes
# *all* candidates and adds them up with softmax weights. The logits of these weights are hyperparameters: they are
# tuned on a validation set, while the network is trained on the training set. In the end each edge keeps the
# operation with the largest weight.
#
# In this tutorial the images are the digits that come with scikit-learn (8 x 8 pixels, no download), the training
# loop is an ordinary one, and a `hyperopt.Tuner` moves the logits beside it.

# %%
"""A tutorial: the operations of a small network are chosen by hypergradients, in the manner of DARTS."""

import argparse
import functools
import random
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hyperopt

torch.set_default_dtype(torch.float32)
torch.manual_seed(0)

images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16).float().view(-1, 1, 8, 8)
train, val, test = (
    TensorDataset(images[rows], labels[rows]) for rows in torch.randperm(len(images)).split([300, 300, 1197])
)  # few images to train on, since with many of them every architecture is good

# %% [markdown]
# ## The network
#
# There are three points and three edges: `a -> b`, `a -> c` and `b -> c`. Point `a` is a small convolution of the
# image, and point `c` goes to a linear classifier. Each edge has five candidates. As in DARTS the convolutions have a
# ReLU before and a batch normalisation after them, so that all candidates have outputs of a similar size.

# %%
WIDTH, EDGES = 8, ("a to b", "a to c", "b to c")


class Zero(nn.Module):
    """No connection."""

    def forward(self, x):
        """Return zeros."""
        return torch.zeros_like(x)


def convolution(size):
    """Return ReLU, convolution and batch normalisation."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, bias=False), nn.BatchNorm2d(WIDTH))


OPERATIONS = {
    "conv 3x3": lambda: convolution(3),
    "conv 1x1": lambda: convolution(1),
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "skip": nn.Identity,
    "none": Zero,
}


class Network(nn.Module):
    """A network whose edges are mixtures of operations; with one operation for each edge it is an ordinary network."""

    def __init__(self, choices):
        """Make the operations that `choices` names for each edge."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))
        self.edges = nn.ModuleList(nn.ModuleList(OPERATIONS[name]() for name in names) for names in choices)
        self.head = nn.Linear(4 * WIDTH, 10)

    def edge(self, i, x, weights):
        """Return the mixture on edge `i`."""
        terms = (weight * operation(x) for weight, operation in zip(weights[i], self.edges[i].children(), strict=True))
        return sum(terms, start=torch.zeros(()))

    def forward(self, x, weights):
        """Return the logits of the classes; `weights` has shape (edges, operations)."""
        a = self.stem(x)
        b = self.edge(0, a, weights)
        c = self.edge(1, a, weights) + self.edge(2, b, weights)
        return self.head(adaptive_avg_pool2d(c.relu(), 2).flatten(1))


# %% [markdown]
# ## The search, first and second order
#
# The hypergradient has two parts:
#
# $$\frac{dE}{d\lambda} = \partial_\lambda E - (\partial_\lambda \nabla_w L)^T\, u, \qquad H u = \partial_w E.$$
#
# The first part says how the validation loss changes with the mixture if the weights `w` stay. The second part says
# what it does through the weights, which will be trained for another mixture.
#
# - **First order** is the first part alone. That needs no library, and the library has no adjoint for it: it is an
#   ordinary gradient of the validation loss. (It works here because the validation loss contains the mixture. For a
#   weight decay the first part is 0.)
# - **Second order** is `Tuner`. With `adjoint=hyperopt.FiniteDifference()` it uses the formula of DARTS: `u` is one
#   step along the gradient, and the mixed derivative is a difference of two gradients. The step is `1 / L`, where `L`
#   is the largest curvature of the training loss, and not the learning rate as in DARTS. It finds `L` by power
#   iteration, and a step takes about 12 gradients in all. `adjoint="auto"` would solve for `u` much better, with 30
#   to 120 gradients.


# %%
def loss_of(model, batch, lam):
    """Return the cross-entropy of a mixture; the training loss and the validation loss are the same function."""
    return cross_entropy(model(batch[0], lam["logits"].softmax(1)), batch[1])


def start(seed):
    """Return a new network of mixtures, its hyperparameters, and both optimizers."""
    torch.manual_seed(seed)
    model = Network([OPERATIONS] * len(EDGES))
    hyper = hyperopt.Hyperparameters({"logits": hyperopt.Real(0.0, per="element")}, shapes={"logits": (3, 5)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4)
    return model, hyper, optimizer, torch.optim.Adam(hyper.parameters(), lr=0.05)


def validation_loss(model, hyper):
    """Return the loss on all validation images, in `eval` mode."""
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, val.tensors, hyper.read())
    model.train()
    return float(loss)


def search(order, seed=0, epochs=20):
    """Train and tune; return the validation losses, and the mixture after each epoch."""
    model, hyper, optimizer, outer = start(seed)
    tuner = hyperopt.Tuner(
        model, hyper, train_loss=loss_of, val_loss=loss_of, optimizer=outer, adjoint=hyperopt.FiniteDifference()
    )
    train_loader, val_loader = DataLoader(train, 50, shuffle=True), DataLoader(val, 100, shuffle=True)
    losses, mixtures = [validation_loss(model, hyper)], [hyper.read()["logits"].softmax(1)]
    for _ in range(epochs):
        for batch in train_loader:
            optimizer.zero_grad()
            tuner.loss(batch).backward()
            optimizer.step()
        for val_batch in val_loader:  # three steps of the mixture after each epoch of the weights
            if order == "second":
                tuner.step(train_loader, [val_batch], batches=1)
            else:
                outer.zero_grad()
                loss_of(model, val_batch, hyper.values()).backward()
                outer.step()
        losses.append(validation_loss(model, hyper))
        mixtures.append(hyper.read()["logits"].softmax(1))
    return losses, torch.stack(mixtures)


found = {order: search(order) for order in ("first", "second")}
for order, (losses, mixtures) in found.items():
    print(f"{order} order: validation loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end; mixture:")
    for name, row in zip(EDGES, mixtures[-1], strict=True):
        print(f"  {name}: " + ", ".join(f"{each} {weight:.2f}" for each, weight in zip(OPERATIONS, row, strict=True)))
losses = found["second"][0]
if losses[-1] >= losses[0]:
    print("The second-order search did not lower the validation loss. Lower its learning rate.")

# %% [markdown]
# How different are the gradients? At a network trained for 30 epochs, with equal weights for all operations, we ask
# each method once, on all images. We compare with `"auto"`, which looks at the curvature and then decides how, and
# how far, to solve for `u`. `T1T2` takes `u` to be the outer gradient itself, as if every curvature were 1, and is
# farthest off.

# %%
model, hyper, optimizer, outer = start(seed=0)
for _ in range(30):
    for batch in DataLoader(train, 50, shuffle=True):
        optimizer.zero_grad()
        loss_of(model, batch, hyper.read()).backward()
        optimizer.step()
values = hyper.values()
gradients = {"first part alone": torch.autograd.grad(loss_of(model, val.tensors, values), values["logits"])[0]}
for adjoint in (hyperopt.T1T2(), hyperopt.FiniteDifference(), "auto"):
    _, hyper, _, outer = start(seed=0)
    tuner = hyperopt.Tuner(
        model, hyper, train_loss=loss_of, val_loss=loss_of, optimizer=outer, adjoint=adjoint, trained_by=optimizer
    )
    name = adjoint if isinstance(adjoint, str) else type(adjoint).__name__
    gradients[name] = tuner.step(train.tensors, val.tensors).grad["logits"]
for name, each in gradients.items():
    cosine = torch.cosine_similarity(each.flatten(), gradients["auto"].flatten(), dim=0)
    print(f'{name}: norm {each.norm():.3f}, cosine with "auto" {cosine:.3f}')

# %% [markdown]
# ## Is what was found any good?
#
# Each edge keeps its strongest operation other than `none`, as in DARTS, and the ordinary network that results is
# trained from scratch. Its test loss is compared with architectures drawn at random from the same 64, and with 3x3
# convolutions everywhere, which is what one would have taken without any search.


# %%
def chosen(mixture):
    """Return the strongest operation of each edge."""
    names = [name for name in OPERATIONS if name != "none"]
    return tuple(names[int(row[: len(names)].argmax())] for row in mixture)


@functools.cache
def retrained(architecture, seed, epochs=33):
    """Train an ordinary network from scratch; return its test loss and accuracy."""
    torch.manual_seed(seed)
    model, ones = Network([[name] for name in architecture]), torch.ones(len(EDGES), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in DataLoader(train, 50, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(batch[0], ones), batch[1]).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model(test.tensors[0], ones)
    return float(cross_entropy(logits, test.tensors[1])), float((logits.argmax(1) == test.tensors[1]).float().mean())


draw = random.Random(0)
candidates = {f"{order} order": [chosen(mixtures[-1])] * 3 for order, (_, mixtures) in found.items()}
candidates["random"] = [tuple(draw.choice(list(OPERATIONS)[:-1]) for _ in EDGES) for _ in range(6)]
candidates["conv 3x3 everywhere"] = [("conv 3x3",) * 3] * 3
results = {name: [retrained(each, seed) for seed, each in enumerate(group)] for name, group in candidates.items()}
for name, rows in results.items():
    losses, accuracies = zip(*rows, strict=True)
    print(f"{name}: test loss {', '.join(f'{x:.3f}' for x in losses)}; mean accuracy {sum(accuracies) / len(rows):.3f}")
print("\n".join(f"{order} order chose {chosen(mixtures[-1])}" for order, (_, mixtures) in found.items()))

# %% [markdown]
# ## What was learned
#
# - **The search finds good architectures.** What both orders chose is better than what was drawn at random. `none`
#   has next to no weight on any edge, and the last edge is a 3x3 convolution beyond doubt.
# - **There is no gain over 3x3 convolutions everywhere**, which need no search. That is what the second order chose
#   itself, and what both orders chose from two other seeds. The mixture knows of no cost: if small networks matter to
#   you, the loss has to say so.
# - **Second order was not better than first order**, although its hypergradient is nearer to that of `"auto"` here.
#   The two networks that they chose differ by no more than one network does from seed to seed.
# - **Give it time.** Half-way, `skip` and `average` had the largest weights on the middle edge. They have nothing to
#   learn and are useful at once. Convolutions came from behind, so a search that is stopped early takes the wrong
#   ones.
#
# The mixtures over time, for both orders:

# %%
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--out", type=Path, help="folder for the picture (in a notebook it is shown)")
out = parser.parse_known_args()[0].out
notebook = "ipykernel" in sys.modules
if out is not None or notebook:
    import matplotlib

    if not notebook:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(EDGES), figsize=(9, 3), sharey=True, layout="constrained")
    for i, (panel, edge) in enumerate(zip(panels, EDGES, strict=True)):
        for j, name in enumerate(OPERATIONS):
            for order, style in (("second", "-"), ("first", "--")):
                label = name if order == "second" else None
                panel.plot(found[order][1][:, i, j], style, color=f"C{j}", label=label)
        panel.set(title=edge, xlabel="epoch")
    panels[0].set(ylabel="weight in the mixture")
    panels[-1].legend(title="solid: second order\ndashed: first", fontsize=8, title_fontsize=8, loc="center right")
    if out is not None:
        figure.savefig(out / "architecture_mixture.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Search with `adjoint="auto"`, or with `hyperopt.Implicit(hyperopt.Neumann(rtol=0, max_steps=5), policy="ignore")`,
#   and print the records of `tuner.step`: they say what was chosen, and what it cost.
# - Leave the batch normalisation away. Are the weights of the mixture still comparable?
# - Use `hyperopt.Simplex(by="projection")` for the mixture itself instead of a softmax of logits. Weights can then
#   become exactly 0.
# - Search from other seeds. How often is the same architecture found?
# - Make training harder, with 150 images, or let the edges choose among 5x5 and dilated convolutions too.

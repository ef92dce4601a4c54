# %% [markdown]
# # Finding wrong labels
#
# Some of your training labels are wrong, and you do not know which. You also have a small set of rows whose labels
# somebody has checked. The idea: give *each training row* a weight, a hyperparameter between 0 and 1, and tune all of
# them so that the trained model is good on the checked rows. Rows with wrong labels should lose their weight.
#
# That makes 500 hyperparameters here. A grid is out of the question, but one hypergradient gives the derivative of the
# loss on the checked rows in all of them, at the cost of a few dozen gradients.

# %%
"""A tutorial: wrong labels among digits are found by tuning one weight for each training image."""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hyperopt

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = torch.cat([images / 16, torch.ones(len(images), 1)], 1)  # a column of ones for the bias
train, val, test = torch.randperm(len(images)).split([500, 300, 997])
wrong = torch.rand(500) < 0.3
noisy = torch.where(wrong, (labels[train] + torch.randint(1, 10, (500,))) % 10, labels[train])
print(f"{int(wrong.sum())} of 500 labels are wrong")

# %% [markdown]
# ## The two losses
#
# The model is logistic regression, the matrix `w` of 65 x 10 numbers. The training loss is a weighted mean over rows
# with some wrong labels. The loss on the 300 checked rows has no weights.


# %%
def inner_loss(w, lam, batch):
    """Return the weighted training loss with a small penalty, which makes the minimum unique."""
    losses = cross_entropy(images[train] @ w, noisy, reduction="none")
    return (lam["weight"] * losses).mean() + 1e-3 * w.square().sum()


def outer_loss(w, lam, batch):
    """Return the loss on the checked rows."""
    return cross_entropy(images[val] @ w, labels[val])


problem = hyperopt.BilevelProblem(inner_loss, outer_loss)
hyper = hyperopt.Hyperparameters({"weight": hyperopt.Bounded(0.5, per="element")}, shapes={"weight": (500,)})

# %% [markdown]
# ## A first look, and a check
#
# Already the first hypergradient tells a lot. Where it is positive, less weight on the row would help. We also check it
# for two rows by a finite difference: train with a slightly larger and with a slightly smaller weight.

# %%
lam = hyper.read()
solver = hyperopt.InnerLBFGS(rtol=1e-9, max_steps=1000)
estimate = hyperopt.hypergradient(problem, torch.zeros(65, 10), lam, inner=solver)
gradient = estimate.grad["weight"]
print(estimate.choice)
print(f"the hypergradient is positive for {(gradient[wrong] > 0).double().mean():.0%} of the wrong labels", end="")
print(f" and for {(gradient[~wrong] > 0).double().mean():.0%} of the right ones")
for row in gradient.abs().argsort(descending=True)[:2].tolist():
    ends = []
    for change in (1e-3, -1e-3):
        changed = lam["weight"].clone()
        changed[row] += change
        found = hyperopt.hypergradient(problem, estimate.w.clone(), {"weight": changed}, inner=solver, adjoint=hyperopt.T1T2())
        ends.append(found.loss)
    difference = (ends[0] - ends[1]) / 2e-3
    print(f"row {row}: hypergradient {gradient[row]:.3e}, finite difference {difference:.3e}")
    assert abs(gradient[row] - difference) < 0.01 * abs(difference)

# %% [markdown]
# ## Tuning the weights
#
# `Bilevel` keeps the trained matrix from step to step, so each training is short.

# %%
bilevel = hyperopt.Bilevel(problem, torch.zeros(65, 10), inner=hyperopt.InnerLBFGS(rtol=1e-4))
optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
history = []
for _ in range(20):
    lam = hyper.values()
    estimate = bilevel.step(lam)
    history.append(estimate.loss)
    optimizer.zero_grad()
    estimate.backward(lam)
    optimizer.step()

weights = hyper.read()["weight"]
dropped = weights < 0.5
recall = float((dropped & wrong).sum() / wrong.sum())
precision = float((dropped & wrong).sum() / dropped.sum())
print(f"loss on the checked rows {history[0]:.3f} before and {history[-1]:.3f} after")
print(f"{recall:.0%} of the wrong labels lost weight; {precision:.0%} of the rows that lost weight have a wrong label")
assert history[-1] < history[0] and recall > 0.8 and precision > 0.6

# %% [markdown]
# Is the model better on images that played no part in all this? We train with all weights equal and with those that
# were found, and count hits on the 997 test images.


# %%
def accuracy(weight):
    """Return the accuracy on the test images of a model that is trained with these weights."""
    found = hyperopt.hypergradient(problem, torch.zeros(65, 10), {"weight": weight}, inner=solver)
    return float(((images[test] @ found.w).argmax(1) == labels[test]).double().mean())


before, after = accuracy(torch.full((500,), 0.5)), accuracy(weights)
print(f"test accuracy {before:.3f} with equal weights, {after:.3f} with tuned weights")
assert after > before

figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
axes.hist([weights[~wrong], weights[wrong]], bins=20, range=(0, 1), stacked=True, label=["right label", "wrong label"])
axes.set(xlabel="weight of a training image", ylabel="images")
axes.legend()
figure.savefig("wrong_labels.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Show the images with the smallest weights and *right* labels. Are they hard to read?
# - Use fewer checked rows. With how few does it still work?
# - Half of the labels wrong: does recall or precision suffer first?
# - Large data need batches: `adjoint=hyperopt.SOBA(...)` moves weights and model in one loop. The study
#   `experiments/cleaning` does this on MNIST, by `hyperopt experiment=data_cleaning_mnist`.

# %% [markdown]
# # Your own training loop, with a tuner beside it
#
# You have a model, a data loader, an optimizer, and a loop that you do not want to give away. `hyperopt.Tuner` stands
# beside such a loop. Every now and then it looks at the weights as they are, computes how the validation loss would
# change with your hyperparameters (a *hypergradient*), and moves the hyperparameters by one step of an optimizer.
#
# Here the data are scikit-learn's handwritten digits, with only 200 images to train on. Two kinds of hyperparameters
# are tuned: one weight decay for each layer, and the label smoothing of the loss.

# %%
"""A tutorial: weight decays and label smoothing are tuned while an ordinary loop trains a network."""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hyperopt

torch.set_default_dtype(torch.float32)
torch.manual_seed(0)

images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16).float()
train, val, test = (TensorDataset(images[rows], labels[rows]) for rows in torch.randperm(len(images)).split([200, 600, 997]))

# %% [markdown]
# ## The losses
#
# The training loss takes the model, a batch, and the hyperparameters by name. It is an ordinary function. What depends
# on `lam` is what will be tuned. The validation loss has no penalty and no smoothing, because it measures what we want.


# %%
def train_loss(model, batch, lam):
    """Return the smoothed cross-entropy and a penalty for each layer."""
    logits = model(batch[0]).log_softmax(1)
    fit = -logits.gather(1, batch[1][:, None]).mean()
    smoothed = (1 - lam["smoothing"]) * fit - lam["smoothing"] * logits.mean()
    layers = [module.weight.square().sum() for module in model if isinstance(module, nn.Linear)]
    return smoothed + (lam["decay"] * torch.stack(layers)).sum()


def val_loss(model, batch, lam):
    """Return the plain cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


# %% [markdown]
# ## The loop
#
# Without the three lines that mention the tuner this is the loop that you know. `tuner.loss(batch)` is `train_loss`
# with the present hyperparameters. `tuner.step` takes one hypergradient and changes nothing else: weights, gradients,
# running statistics and the place in your data loader stay as they were.


# %%
def run(tuned, epochs=40):
    """Train with or without tuning; return the validation losses, the decays and the model."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    hyper = hyperopt.Hyperparameters(
        {"decay": hyperopt.Positive(1e-4, per="element"), "smoothing": hyperopt.Bounded(0.02, low=0.0, high=0.5)},
        shapes={"decay": (2,)},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.Adam(hyper.parameters(), lr=0.15)
    tuner = hyperopt.Tuner(model, hyper, train_loss=train_loss, val_loss=val_loss, optimizer=outer)
    loader = DataLoader(train, batch_size=50, shuffle=True)
    losses, decays, record = [], [], None
    for epoch in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            tuner.loss(batch).backward()
            optimizer.step()
        if tuned and epoch >= 5:
            record = tuner.step(train.tensors, val.tensors)
        with torch.no_grad():
            losses.append(float(val_loss(model, val.tensors, None)))
        decays.append(hyper.read()["decay"].tolist())
    return {"losses": losses, "decays": decays, "model": model, "record": record, "hyper": hyper}


plain, tuned = run(tuned=False), run(tuned=True)

# %% [markdown]
# A record of a step prints as one line: the validation loss before the step, the hyperparameters after it, which
# method solved the linear system of the hypergradient and why, an estimate of the error, and the cost. The weights are
# still being trained, so a truncated Neumann series is used, which follows the last hundred steps of training. For such
# a series there is no estimate of the error.

# %%
print(tuned["record"])
print(tuned["hyper"])


def test_scores(model):
    """Return loss and accuracy on images that neither training nor tuning has seen."""
    with torch.no_grad():
        logits = model(test.tensors[0])
    hits = (logits.argmax(1) == test.tensors[1]).float().mean()
    return float(cross_entropy(logits, test.tensors[1])), float(hits)


for name, found in (("without tuning", plain), ("with a tuner", tuned)):
    loss, accuracy = test_scores(found["model"])
    print(f"{name}: validation loss {found['losses'][-1]:.4f}, test loss {loss:.4f}, test accuracy {accuracy:.3f}")
assert tuned["losses"][-1] < plain["losses"][-1]
assert test_scores(tuned["model"])[0] < test_scores(plain["model"])[0]

# %% [markdown]
# The test images were not used to tune, so the gain on them is a real one. It is a lesson too: after so few epochs less
# decay and less smoothing are better, and the tuner lowers both. The picture shows the validation loss of both runs,
# and how the two decays moved.

# %%
figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(plain["losses"], label="without tuning")
left.plot(tuned["losses"], label="with a tuner")
left.set(xlabel="epoch", ylabel="validation loss")
left.legend()
right.semilogy(tuned["decays"], label=["first layer", "second layer"])
right.set(xlabel="epoch", ylabel="weight decay")
right.legend()
figure.savefig("your_own_loop.png", dpi=80)

# %% [markdown]
# ## What to try next
#
# - Call `tuner.step(loader, val_loader, batches=3)`. Large data sets do not need all rows for one hypergradient.
# - Use `adjoint=hyperopt.FiniteDifference()`, which is much cheaper and less accurate. Do the decays end elsewhere?
# - Give each *weight* a decay of its own. The cost of a step does not grow with the number of hyperparameters.
# - Save `tuner.state_dict()` beside your model's, and continue exactly where you stopped.
# - In Lightning and in Hugging Face's trainer a callback makes these calls: see `hyperopt.integrations`.

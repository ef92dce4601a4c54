"""The four problems of compare.py: ridge regression, a perceptron, a convolutional network and an LSTM, with what is tuned.

Every way trains the network that ``module`` makes, by ``train_loss`` on batches of ``train``. ``val`` and ``test`` judge it.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt.bilevel.batches import Minibatches
from hyperopt.data.mnist import MNIST, FashionMNIST
from hyperopt.nn.regularise.sequences import activation, temporal_activation
from hyperopt.stn import STN, Bounded, Discrete, Draw, DropConnect, EmbeddingDropout, Positive, Tuned, VariationalDropout
from hyperopt.stn.classifiers import Classifier
from hyperopt.tasks.scores import scores
from hyperopt.tasks.stn_problem import ImageProblem
from hyperopt.tasks.stn_ridge import Ridge

TEST = 2000  # test rows, the first ones
Batch = Any


@dataclass(frozen=True)
class Problem:
    """What is trained and tuned.

    Attributes:
        declared: the hyperparameters, at their start.
        module: makes the plain network, with weights from torch's own generator.
        train: the next training batch, for one draw.
        tuned_train: the next training batch of a self-tuning network.
        valid: the next validation batch.
        train_loss: at a draw; see ``hyperopt.stn.step``.
        valid_loss: of the weights alone.
        val: the loss on all validation rows.
        test: losses and accuracies on the test rows.
        smooth: the hyperparameters in which the training loss has a derivative.
        seconds: CPU seconds of every way.
        look: updates of the weights from one look at the validation rows to the next.
        positive: where a positive hyperparameter is searched, log-uniformly.
        best: the least validation loss of all hyperparameters, where it is known.
    """

    declared: Mapping[str, Tuned]
    module: Callable[[], nn.Module]
    train: Callable[[], Batch]
    tuned_train: Callable[[], Batch]
    valid: Callable[[], Batch]
    train_loss: Callable[[STN, Batch, Draw], Tensor]
    valid_loss: Callable[[STN, Batch, Draw | None], Tensor]
    val: Callable[[nn.Module], float]
    test: Callable[[nn.Module], dict[str, float]]
    smooth: tuple[str, ...]
    seconds: float
    look: int
    positive: tuple[float, float] = (1e-6, 1e-2)
    best: float | None = None


def ridge(seed: int) -> Problem:
    """20 features, 40 rows and much noise; the strength starts at 3, far too large. A row of a self-tuning batch is a draw."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(20, generator=generator) / 5
    sets = []
    for rows in (40, 40, 1000):
        x = torch.randn(rows, 20, generator=generator)
        sets.append((x, x @ true + 0.6 * torch.randn(rows, generator=generator)))
    (x, y), (x_val, y_val), (x_test, y_test) = sets
    exact = Ridge(*(each.double() for each in (x, y, x_val, y_val)))

    def half_square(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (model(inputs)[..., 0] - targets).square().mean() / 2

    def train_loss(model: STN, batch: Tensor, draw: Draw) -> Tensor:
        return half_square(model, batch, y) + (draw.h["decay"] * model.squared_norm(draw)).mean() / 2

    return Problem(
        declared={"decay": Positive(3.0)},
        module=lambda: nn.Linear(20, 1, bias=False),
        train=lambda: x[None],
        tuned_train=lambda: x.expand(50, -1, -1),
        valid=lambda: x_val.expand(50, -1, -1),
        train_loss=train_loss,
        valid_loss=lambda model, batch, draw: half_square(model, batch, y_val),
        val=lambda model: float(half_square(model, x_val[None], y_val)),
        test=lambda model: {"test/loss": float(half_square(model, x_test[None], y_test))},
        smooth=("decay",),
        seconds=2.0,
        look=20,
        positive=(1e-3, 1e2),
        best=float(exact.loss(exact.weights(exact.best()))),
    )


def _images(data: MNIST, classifier: Classifier, declared: Mapping[str, Tuned], seed: int, seconds: float) -> Problem:
    """A classifier on few images, with the regularisers of ``hyperopt.tasks.stn_problem``."""
    splits = data.load()
    problem = ImageProblem(splits, declared, classifier.dropouts, 100, 200, seed)
    test = splits.test.take(slice(TEST))

    def measured(model: nn.Module, **rows: Any) -> dict[str, float]:
        return scores(rows, lambda x: problem.logits(model, x), 1000)

    return Problem(
        declared=declared,
        module=lambda: classifier.build(splits.shape, splits.num_classes, declared),
        train=problem.train.draw,
        tuned_train=problem.train.draw,
        valid=problem.valid.draw,
        train_loss=problem.train_loss,
        valid_loss=problem.valid_loss,
        val=lambda model: measured(model, val=splits.val)["val/loss"],
        test=lambda model: measured(model, test=test),
        smooth=("input_noise", "weight_decay"),
        seconds=seconds,
        look=20,
    )


def _regularisers(dropouts: int) -> dict[str, Tuned]:
    return {
        **{f"dropout{k}": Bounded(0.05, 0.0, 0.9) for k in range(dropouts)},
        "input_noise": Bounded(0.05, 0.0, 2.0),
        "weight_decay": Positive(1e-5, per="batch"),
        "cut_holes": Discrete(1, 0, 3),
        "cut_length": Discrete(4, 0, 16),
    }


def mlp(seed: int) -> Problem:
    """Two dense layers of 100 on 2,000 images of MNIST; six regularisers."""
    data = MNIST(train=2000, val=2000, seed=seed, normalize="unit")
    return _images(data, Classifier(dense=(100, 100)), _regularisers(2), seed, 8.0)


def cnn(seed: int) -> Problem:
    """Convolutions of 8 and 16 channels and a dense layer of 64 on 1,500 images of Fashion-MNIST; seven regularisers."""
    data = FashionMNIST(train=1500, val=1500, seed=seed, normalize="unit")
    classifier = Classifier(channels=(8, 16), strides=(2, 2), dense=(64,))
    return _images(data, classifier, _regularisers(3), seed, 12.0)


class Characters(nn.Module):
    """A language model of characters: embedding, LSTM, linear layer, with the dropout of both papers.

    Args:
        count: number of characters.
    """

    def __init__(self, count: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.embedding = EmbeddingDropout("embedding_dropout", nn.Embedding(count, 24))
        self.input = VariationalDropout("input_dropout")
        self.lstm = DropConnect("drop_connect", nn.LSTM(24, 64, batch_first=True))
        self.output = VariationalDropout("output_dropout")
        self.head = nn.Linear(64, count)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, and the states with and without dropout. shapes: (rows, time, ...)."""
        states = self.lstm(self.input(self.embedding(tokens)))[0]
        dropped = self.output(states)
        return self.head(dropped), dropped, states


def text() -> tuple[Tensor, int]:
    """The language reference that every Python has, ``pydoc_data.topics``, in lower case; rare characters are one."""
    whole = "\n".join(value for _, value in sorted(pydoc_data.topics.topics.items())).lower()
    letters = "\0 \nabcdefghijklmnopqrstuvwxyz0123456789.,;:'\"`()[]{}=+-*/_|<>"
    places = {letter: place for place, letter in enumerate(letters)}
    return torch.tensor([places.get(letter, 0) for letter in whole]), len(letters)


def lstm(seed: int) -> Problem:
    """An LSTM of 64 units on windows of 32 characters, 800 of them; six regularisers, those of the papers' LSTM."""
    tokens, count = text()
    windows = tokens[: len(tokens) // 33 * 33].view(-1, 33)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    train, val, test = (windows[a:b] for a, b in ((0, 800), (800, 1600), (1600, 1600 + TEST)))
    sources = Minibatches((train,), 100, seed=seed), Minibatches((val,), 100, seed=seed + 1)

    def entropy(logits: Tensor, batch: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def train_loss(model: STN, batch: tuple[Tensor], draw: Draw) -> Tensor:
        logits, dropped, states = model(batch[0][:, :-1], draw)
        penalty = activation(dropped, draw.h["activation"]) + temporal_activation(states, draw.h["temporal_activation"])
        return entropy(logits, batch[0]) + penalty.mean()

    @torch.no_grad()
    def loss(model: nn.Module, rows: Tensor) -> float:
        return float(entropy(model(rows[:, :-1])[0], rows))

    rate = Bounded(0.05, 0.0, 0.9)
    return Problem(
        declared={
            **dict.fromkeys(("embedding_dropout", "input_dropout", "output_dropout"), rate),
            "drop_connect": Bounded(0.05, 0.0, 0.9, per="batch"),
            "activation": Positive(1e-3),
            "temporal_activation": Positive(1e-3),
        },
        module=lambda: Characters(count),
        train=sources[0].draw,
        tuned_train=sources[0].draw,
        valid=sources[1].draw,
        train_loss=train_loss,
        valid_loss=lambda model, batch, draw: entropy(model(batch[0][:, :-1])[0], batch[0]),
        val=lambda model: loss(model, val),
        test=lambda model: {"test/loss": loss(model, test)},
        smooth=("activation", "temporal_activation"),
        seconds=14.0,
        look=10,
    )


PROBLEMS = {"ridge": ridge, "mlp": mlp, "cnn": cnn, "lstm": lstm}

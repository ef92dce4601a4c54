"""The named hyperparameters of both papers: each moves the response as finite differences of plain networks say.

At gates of 0 the network at any draw is the plain one, so the gradient for a gate at a draw ``u + sigma eps`` is ``sigma eps``
times the gradient for the plain network's weight, times the direction. Over the draws ``eps = 1`` and ``-1`` this sums up to

    dL/dV  =  sigma sum_unit H (g(u + sigma) - g(u - sigma)),      g = dL_train / dw of the plain network at fixed rates

a finite difference of what the response is to learn: the change of the training gradient with the hyperparameter. The plain
network has plain modules at fixed rates and penalties by hand, and draws the same random numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt import stn
from hyperopt.core.random import Keys, keyed
from hyperopt.nn.regularise import sequences
from hyperopt.nn.regularise.pipeline import Pipeline
from hyperopt.nn.regularise.sequences import activation, temporal_activation
from hyperopt.stn import STN, Bounded, Discrete, Draw, DropConnect, EmbeddingDropout, HyperSpace, Positive, VariationalDropout

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level
DOUBLE = torch.float64
ROWS, WORDS = 6, 7
KEYS = Keys(torch.arange(ROWS) * 17, seed=1, epoch=2)
rate = Bounded(0.4, 0.0, 0.9, scale=0.8)
NAMED: dict[str, stn.Tuned] = {
    "embedding_dropout": rate,
    "input_dropout": rate,
    "output_dropout": rate,
    "hidden_dropout": rate,
    "drop_connect": Bounded(0.4, 0.0, 0.9, scale=0.8, per="batch"),
    "activation": Positive(0.5),
    "temporal_activation": Positive(0.5),
    "decay": Positive(0.5),
}
PIXELS: dict[str, stn.Tuned] = {
    "cut_length": Discrete(3, 0, 6, scale=1.5),
    "cut_holes": Discrete(1, 0, 3, scale=1.5),
    "input_noise": Bounded(0.3, 0.0, 1.0),
    "input_scale": Bounded(0.3, 0.0, 1.0),
    **{name: Bounded(0.2, 0.0, 0.5, scale=0.8) for name in ("brightness", "contrast", "saturation", "hue")},
}


class Language(nn.Module):
    """An LSTM with every kind of dropout, at tuned or at fixed rates."""

    def __init__(self, rates: dict[str, float] | None = None) -> None:
        super().__init__()
        embedding, lstm = nn.Embedding(WORDS, 3), nn.LSTM(3, 4, batch_first=True)
        if rates is None:
            self.embedding: nn.Module = EmbeddingDropout("embedding_dropout", embedding)
            self.input: nn.Module = VariationalDropout("input_dropout")
            self.lstm: nn.Module = DropConnect("drop_connect", lstm)
            self.output: nn.Module = VariationalDropout("output_dropout")
            self.dropout: nn.Module = stn.Dropout("hidden_dropout")
        else:
            self.embedding = sequences.EmbeddingDropout(embedding, rates["embedding_dropout"])
            self.input = sequences.VariationalDropout(rates["input_dropout"])
            self.lstm = sequences.DropConnect(lstm, (), rates["drop_connect"])
            self.output = sequences.VariationalDropout(rates["output_dropout"])
            self.dropout = nn.Dropout(0.0)
            self.rate = rates["hidden_dropout"]
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, WORDS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.lstm(self.input(self.embedding(tokens)))[0]
        dropped = self.output(states)
        hidden = torch.tanh(self.hidden(dropped))
        if hasattr(self, "rate"):  # by hand, since torch's own dropout draws other numbers
            hidden = hidden * (torch.rand_like(hidden) < 1 - self.rate) / (1 - self.rate)
        return self.head(self.dropout(hidden)), dropped, states


TOKENS = torch.randint(0, WORDS, (ROWS, 6), generator=torch.Generator().manual_seed(0))


def entropy(logits: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def tuned_loss(model: STN, draw: Draw) -> Tensor:
    logits, dropped, states = model(TOKENS[:, :-1], draw)
    penalty = activation(dropped, draw.h["activation"]) + temporal_activation(states, draw.h["temporal_activation"])
    return entropy(logits) + (penalty + draw.h["decay"] * model.squared_norms(draw)["head.weight"] / 2).mean()


def plain_loss(model: Language, at: dict[str, float]) -> Tensor:
    logits, dropped, states = model(TOKENS[:, :-1])
    steps = [(states[:, t + 1] - states[:, t]).square().mean() for t in range(states.shape[1] - 1)]
    penalty = at["activation"] * dropped.square().mean() + at["temporal_activation"] * sum(steps) / len(steps)
    return entropy(logits) + penalty + at["decay"] * model.head.weight.square().sum() / 2


def check(found: dict[str, Tensor], ends: list[dict[str, Tensor]], model: STN, sigma: float, column: int) -> None:
    """Compare the summed gradients of the gates with the finite difference, for every weight."""
    differences = 0.0
    for place, (_, _, response) in model.weights().items():
        slope = (response.direction * (ends[0][place] - ends[1][place])).detach()
        want = sigma * slope.movedim(response.axis, 0).flatten(1).sum(1) if slope.dim() > 1 else sigma * slope
        torch.testing.assert_close(found[place][:, column], want, rtol=1e-9, atol=1e-11)
        differences += float(want.abs().sum())
    assert differences > 1e-4


@pytest.mark.cases(among={"mode": ["centred"]})
@pytest.mark.parametrize("mode", ["centred", "delta_linear"])
@pytest.mark.parametrize("name", NAMED)
def test_the_response_of_a_language_model_learns_a_finite_difference(name: str, mode: str) -> None:
    torch.manual_seed(0)
    space = HyperSpace(NAMED, dtype=DOUBLE)
    model = stn.convert(Language().double(), space)
    model.linear = mode == "delta_linear"
    column, sigma = space.names.index(name), space.scales()[name]
    found, ends = {}, []
    for side in (1.0, -1.0):
        eps = torch.zeros(ROWS, len(NAMED), dtype=DOUBLE)
        eps[:, column] = side
        draw = space.at(eps)
        torch.manual_seed(7)
        weights = model.weights()
        gates = [response.gate for _, _, response in weights.values()]
        for place, slope in zip(weights, torch.autograd.grad(tuned_loss(model, draw), gates), strict=True):
            found[place] = found.get(place, 0) + slope
        values = {key: float(draw.h[key][0].detach()) for key in NAMED}
        plain = Language(values).double()
        plain.load_state_dict(model.collapse().state_dict())
        torch.manual_seed(7)
        slopes = torch.autograd.grad(plain_loss(plain, values), list(plain.parameters()))
        ends.append({key: slope for (key, _), slope in zip(plain.named_parameters(), slopes, strict=True)})
    check(found, ends, model, sigma, column)


@pytest.mark.parametrize("name", PIXELS)
def test_the_response_of_a_classifier_learns_a_finite_difference(name: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    labels, names = torch.arange(ROWS) % 3, ("cut_length", name) if name == "cut_holes" else (name,)
    space = HyperSpace({each: PIXELS[each] for each in names}, dtype=DOUBLE)
    pipeline = Pipeline.of(images, names, most=3)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()
    model = stn.convert(plain, space)
    column, sigma = space.names.index(name), space.scales()[name]
    found, ends = {}, []
    for side in (1.0, -1.0):
        eps = torch.zeros(ROWS, len(names), dtype=DOUBLE)
        eps[:, column] = side
        draw = space.at(eps)
        with keyed(KEYS):
            loss = cross_entropy(model(pipeline(images, draw.h, KEYS), draw), labels)
        weights = model.weights()
        gates = [response.gate for _, _, response in weights.values()]
        for place, slope in zip(weights, torch.autograd.grad(loss, gates), strict=True):
            found[place] = found.get(place, 0) + slope
        fixed: dict[str, Any] = {key: draw.h[key].detach() for key in names}
        slopes = torch.autograd.grad(cross_entropy(plain(pipeline(images, fixed, KEYS)), labels), list(plain.parameters()))
        ends.append({key: slope for (key, _), slope in zip(plain.named_parameters(), slopes, strict=True)})
    check(found, ends, model, sigma, column)


def test_a_row_of_a_draw_is_the_plain_network_at_its_rates_and_weights() -> None:
    torch.manual_seed(0)
    space = HyperSpace(NAMED, dtype=DOUBLE)
    model = stn.convert(Language().double(), space, std=0.5)
    draw = space.draw(ROWS, torch.Generator().manual_seed(2))
    for training in (True, False):
        model.train(training)
        torch.manual_seed(5)
        found = model(TOKENS, draw)[2]  # states, behind the dropout of words, inputs and weights
        for row in range(ROWS):
            plain = model.collapse(draw.part(slice(row, row + 1))).train(training)
            assert type(plain.lstm) is sequences.DropConnect
            for place, name, each in (("lstm", "drop_connect", 0), ("input", "input_dropout", row)):
                assert plain.get_submodule(place).p == pytest.approx(float(draw.h[name][each].detach()))
            torch.manual_seed(5)
            torch.testing.assert_close(found[row], plain(TOKENS)[2][row], rtol=1e-11, atol=1e-12)


def test_squared_norms_are_those_of_the_weights_of_each_row() -> None:
    torch.manual_seed(0)
    space = HyperSpace(NAMED, dtype=DOUBLE)
    model = stn.convert(Language().double(), space, std=0.5, skip=["hidden"])
    draw = space.draw(ROWS, torch.Generator().manual_seed(2))
    found = model.squared_norms(draw)
    for row in range(ROWS):
        plain = model.collapse(draw.part(slice(row, row + 1)))
        want = {name: float(p.detach().square().sum()) for name, p in plain.named_parameters() if p.dim() > 1}
        assert set(found) == set(want)
        for name, value in want.items():
            assert float(found[name][row].detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(sum(found.values()), model.squared_norm(draw))


def test_a_mask_for_all_rows_needs_one_rate() -> None:
    plain = nn.Sequential(DropConnect("rate", nn.LSTM(2, 2)))
    with pytest.raises(ValueError, match=r"DropConnect\('rate'\) at '0' has one mask for all rows, and rate .*per='batch'"):
        stn.convert(plain, HyperSpace({"rate": Bounded(0.2, 0.0, 0.9)}))

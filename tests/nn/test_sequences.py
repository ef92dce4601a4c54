"""Regularisers of recurrent networks against plain references: masks by hand, networks with dropped weights, loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt.nn.regularise.sequences import (
    DropConnect,
    EmbeddingDropout,
    VariationalDropout,
    activation,
    kept,
    temporal_activation,
)

DOUBLE = torch.float64
ROWS, TIMES = 5, 7


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def words(count: int) -> Tensor:
    return torch.randint(0, count, (ROWS, TIMES), generator=torch.Generator().manual_seed(1))


def test_factors_have_the_rate_of_their_row_and_mean_one() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=DOUBLE)
    found = kept(rates[:, None], (4, 100_000), rates)
    torch.testing.assert_close((found == 0).double().mean(1), rates, rtol=0, atol=0.005)
    torch.testing.assert_close(found[:3].mean(1), torch.ones(3, dtype=DOUBLE), rtol=0.03, atol=0)
    assert torch.equal(found[0], torch.ones_like(found[0])) and torch.equal(found[3], torch.zeros_like(found[3]))


def test_variational_dropout_has_one_mask_for_all_times() -> None:
    torch.manual_seed(0)
    x = normal(ROWS, TIMES, 400)
    found = (VariationalDropout(0.4)(x) / x).round(decimals=9)
    assert torch.equal(found[:, :1].expand_as(found), found)  # the same at all times
    torch.testing.assert_close(found.unique(), torch.tensor([0, 1 / 0.6], dtype=DOUBLE).round(decimals=9))
    assert float((found == 0).double().mean()) == pytest.approx(0.4, abs=0.04)
    assert not torch.equal(found[0], found[1])  # and not of all examples
    torch.testing.assert_close(VariationalDropout(0.4).eval()(x), x)
    assert VariationalDropout(0.4)(x[:, 0]).shape == (ROWS, 400)


def test_embedding_dropout_drops_a_word_at_all_its_places() -> None:
    torch.manual_seed(0)
    layer, tokens = EmbeddingDropout(nn.Embedding(6, 3, dtype=DOUBLE), 0.5), words(6)
    whole = layer.module(tokens)
    found = layer(tokens)
    for row in range(ROWS):  # the definition: an embedding some of whose vectors are 0
        for word in tokens[row].unique():
            places = tokens[row] == word
            each = found[row][places]
            assert torch.equal(each, 0 * each) or torch.allclose(each, 2 * whole[row][places], rtol=1e-14)
    assert 0 < int((found == 0).all(-1).sum()) < tokens.numel()
    torch.testing.assert_close(layer.eval()(tokens), whole)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropped_weights_are_those_of_a_plain_network(kind: Any) -> None:
    torch.manual_seed(0)
    plain, x = kind(3, 4, 2, batch_first=True).double(), normal(ROWS, TIMES, 3)
    layer = DropConnect(copy.deepcopy(plain), p=0.5)
    assert layer.weights == ("weight_hh_l0", "weight_hh_l1")
    torch.manual_seed(3)
    found = layer(x)[0]
    found.square().sum().backward()
    torch.manual_seed(3)
    want, masks = copy.deepcopy(plain), {}
    with torch.no_grad():
        for name in layer.weights:
            masks[name] = torch.rand_like(getattr(want, name)) < 0.5
            getattr(want, name).mul_(masks[name] / 0.5)
    torch.testing.assert_close(found, want(x)[0], rtol=1e-12, atol=1e-13)
    want(x)[0].square().sum().backward()
    for name, parameter in want.named_parameters():
        scale = masks[name] / 0.5 if name in masks else 1.0
        torch.testing.assert_close(layer.module.get_parameter(name).grad, parameter.grad * scale, rtol=1e-11, atol=1e-12)
    assert not torch.equal(layer(x)[0], found)  # the next call has another mask
    torch.testing.assert_close(layer.eval()(x)[0], plain(x)[0], rtol=1e-12, atol=1e-13)
    copy.deepcopy(layer)  # nothing of a call is kept
    assert all(each.is_leaf for each in layer.module._flat_weights)  # pyright: ignore[reportGeneralTypeIssues]


def test_penalties_of_activations_are_loops_over_times_and_exact_in_their_strength() -> None:
    states, strength = normal(ROWS, TIMES, 3), torch.linspace(0, 2, ROWS, dtype=DOUBLE).requires_grad_()
    for penalty, differences in ((activation, False), (temporal_activation, True)):
        want = []
        for row in range(ROWS):
            each = [states[row, t + 1] - states[row, t] if differences else states[row, t] for t in range(TIMES - differences)]
            want.append(sum(float(v @ v) for v in each) / (len(each) * 3))
        torch.testing.assert_close(penalty(states, strength), strength * torch.tensor(want, dtype=DOUBLE))
        (slope,) = torch.autograd.grad(penalty(states, strength).sum(), strength)
        torch.testing.assert_close(slope, torch.tensor(want, dtype=DOUBLE))
        torch.testing.assert_close(penalty(states, 0.5), 0.5 * torch.tensor(want, dtype=DOUBLE))
        assert penalty(states, strength.detach() - 0.1)[0].isnan()  # a negative strength


def test_what_cannot_be_regularised_is_named() -> None:
    with pytest.raises(ValueError, match=r"VariationalDropout: p=1.5 is not in \[0, 1\]; change p"):
        VariationalDropout(1.5)
    with pytest.raises(ValueError, match=r"Linear has no hidden-to-hidden weight; its weights are \['weight', 'bias'\]"):
        DropConnect(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="DropConnect: LSTM has no weight 'weight_hh_l3'"):
        DropConnect(nn.LSTM(2, 2), ["weight_hh_l3"])
    with pytest.raises(ValueError, match=r"states of shape \(5, 1, 3\), expected \(n, time > 1, features\)"):
        temporal_activation(normal(5, 1, 3), 1.0)

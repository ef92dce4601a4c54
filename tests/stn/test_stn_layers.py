"""Hyper-layers: each row is computed with weights of its own, formed by hand here; zero gates and zero deltas change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils.parametrizations import weight_norm

from hyperopt.stn import STN, Bounded, Draw, Dropout, HyperSpace, Positive, convert

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level

DOUBLE = torch.float64
ROWS = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def space(**how: Any) -> HyperSpace:
    return HyperSpace({"a": Bounded(0.3, 0.0, 1.0, scale=0.7), "b": Positive(0.1, scale=0.4, per="batch")}, dtype=DOUBLE, **how)


class Takes(nn.Module):
    """A module that takes its one input several times, or in another layout; the first output of several."""

    def __init__(self, module: nn.Module, times: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.module, self.times, self.transposed = module, times, transposed

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.transposed else x
        found = first(self.module(*[x] * self.times))
        return found.transpose(0, 1) if self.transposed else found


def attention(**how: Any) -> Callable[[], nn.Module]:
    first = how.get("batch_first", False)
    return lambda: Takes(nn.MultiheadAttention(4, 2, **how), 3, transposed=not first)


def encoder(**how: Any) -> Callable[[], nn.Module]:
    return lambda: Takes(nn.TransformerEncoderLayer(4, 2, 6, 0.0, **how), transposed=not how.get("batch_first", False))


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(4, 2, 6, 0.0)
    return Takes(nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(4)), 2, transposed=True)


class OtherKeys(nn.MultiheadAttention):
    """Keys and values of other sizes, each with a projection of its own."""

    def __init__(self) -> None:
        super().__init__(4, 2, kdim=3, vdim=2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x[..., :3], x[..., 2:])[0]


PLACES = torch.randint(0, 7, (ROWS, 3), generator=generator())
SEQUENCE = normal(ROWS, 6, 4)
SQUARE = normal(ROWS, ROWS, 4)  # as long as there are examples
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(3, 4), normal(ROWS, 3)),
    "linear of sequences": (lambda: nn.Linear(3, 4), normal(ROWS, 6, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), normal(ROWS, 3)),
    "bilinear": (lambda: Takes(nn.Bilinear(3, 3, 4), 2), normal(ROWS, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2), normal(ROWS, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), normal(ROWS, 2, 6, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 4, 3, groups=2, bias=False), normal(ROWS, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), normal(ROWS, 2, 3, 3, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), normal(ROWS, 2, 4)),
    "transposed conv2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), normal(ROWS, 4, 3, 3)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), normal(ROWS, 2, 2, 2, 2)),
    "embedding": (lambda: nn.Embedding(8, 4, padding_idx=7), PLACES),
    "embedding of every row": (lambda: nn.Embedding(3, 4), PLACES % 3),
    "bags": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), PLACES),
    "prelu": (lambda: nn.PReLU(3), normal(ROWS, 3, 2)),
    "prelu of one number": (lambda: nn.PReLU(), normal(ROWS, 3, 2)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(3), normal(ROWS, 3)),
    "batch norm of images": (lambda: nn.BatchNorm2d(3), normal(ROWS, 3, 4, 4)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(2), normal(ROWS, 2, 2, 3, 2)),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), normal(ROWS, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), normal(ROWS, 3, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), normal(ROWS, 4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(4), normal(ROWS, 6, 4)),
    "layer norm of images": (lambda: nn.LayerNorm([3, 4]), normal(ROWS, 2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), normal(ROWS, 6, 4)),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), normal(ROWS, 3)),
    "gru cell": (lambda: nn.GRUCell(3, 4), normal(ROWS, 3)),
    "rnn cell": (lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False), normal(ROWS, 3)),
    "lstm": (lambda: nn.LSTM(4, 3, 2, batch_first=True), SEQUENCE),
    "lstm both ways, projected": (lambda: Takes(nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2), transposed=True), SQUARE),
    "gru both ways": (lambda: nn.GRU(4, 3, 2, bidirectional=True, batch_first=True), SEQUENCE),
    "gru without bias": (lambda: Takes(nn.GRU(4, 3, bias=False), transposed=True), SEQUENCE),
    "rnn": (lambda: nn.RNN(4, 3, 2, batch_first=True), SEQUENCE),
    "rnn with relu": (lambda: nn.RNN(4, 3, nonlinearity="relu", batch_first=True), SEQUENCE),
    "attention": (attention(batch_first=True), SEQUENCE),
    "attention, length first": (attention(), SQUARE),
    "attention with more keys": (attention(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
    "attention of other keys": (lambda: OtherKeys(), SEQUENCE),
    "encoder layer": (encoder(batch_first=True), SEQUENCE),
    "encoder layer, length first": (encoder(norm_first=True, activation="gelu"), SQUARE),
    "decoder, length first": (decoder, SQUARE),
    "weight norm": (lambda: weight_norm(nn.Linear(3, 4)), normal(ROWS, 3)),
    "weight norm of filters": (lambda: weight_norm(nn.Conv1d(2, 4, 3), dim=1), normal(ROWS, 2, 7)),
    "weight norm in an lstm": (lambda: weight_norm(nn.LSTM(4, 3, batch_first=True), "weight_hh_l0"), SEQUENCE),
}
FUSED = ("lstm", "gru", "rnn", "attention", "encoder", "decoder")  # torch has another order of the same sums


def made(name: str, gate: str = "unit", std: float = 0.5, **how: Any) -> tuple[nn.Module, STN, Tensor]:
    make, x = KINDS[name]
    torch.manual_seed(0)
    plain = make().double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    return plain, convert(plain, space(**how), gate=gate, std=std), x


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def at_row(plain: nn.Module, stn: STN, delta: Tensor) -> nn.Module:
    """The plain network with the weights of one delta, written out."""
    with torch.no_grad():
        for each in plain.modules():
            if isinstance(each, nn.LSTM):
                each._init_flat_weights()  # torch does not copy a parametrized one that was called
        row = copy.deepcopy(plain)
        for place, (_, name, response) in stn.weights().items():
            module = row.get_submodule(place.removesuffix(name).rstrip("."))
            weight, gates = getattr(module, name), response.gate @ delta
            slices = [torch.select(response.direction, response.axis, i) for i in range(weight.shape[response.axis])]
            slices = [gates[min(i, len(gates) - 1)] * each for i, each in enumerate(slices)]
            moved = weight + torch.stack(slices, response.axis)
            if isinstance(weight, nn.Parameter):
                weight.copy_(moved)
            else:
                setattr(module, name, moved)
    return row


@pytest.mark.cases(quick=13, slow=100)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("gate", ["unit", "scalar"])
@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_that_of_weights_formed_by_hand(name: str, gate: str, centred: bool) -> None:
    plain, stn, x = made(name, gate, centred=centred)
    trained = {place for place, p in plain.named_parameters() if "bias_k" not in place and "bias_v" not in place}
    assert len(stn.weights()) == len(trained) - sum("original1" in place for place in trained)  # every weight responds
    draw = stn.space.draw(ROWS, generator())
    for training in (True, False):
        stn.train(training)
        plain.train(training)
        found = first(stn(x, draw))
        with torch.no_grad():  # in eval mode torch has fused paths, which it may take without gradients alone
            torch.testing.assert_close(first(copy.deepcopy(stn)(x, draw)), found, rtol=1e-12, atol=1e-12)
        for i in range(ROWS):
            row = at_row(plain, stn, draw.delta[i]).train(training)
            torch.testing.assert_close(found[i], first(row(x))[i], rtol=1e-11, atol=1e-11)
        if any(True for _ in plain.buffers()):  # statistics, which have moved as those of one plain call
            plain(x)
            for key, buffer in plain.named_buffers():
                torch.testing.assert_close(stn.module.state_dict()[key], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_zero_gates_and_zero_deltas_are_the_plain_network_exactly(name: str) -> None:
    plain, stn, x = made(name, std=0.0)
    want = first(plain.eval()(x))
    zero = stn.space.at(torch.zeros(ROWS, 2, dtype=DOUBLE))
    fused = any(each in name for each in FUSED)
    same = torch.equal if not fused else lambda a, b: torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    assert same(first(stn.eval()(x, stn.space.draw(ROWS, generator()))), want)
    plain, stn, x = made(name)
    want = first(plain.eval()(x))
    assert zero.delta.abs().max() == 0
    assert same(first(stn.eval()(x, zero)), want)
    assert same(first(stn(x)), want)  # centred, at the hyperparameters themselves


@pytest.mark.parametrize("name", KINDS)
def test_collapse_is_a_plain_network_with_the_weights_at_lam(name: str) -> None:
    plain, stn, x = made(name, centred=False)
    collapsed = stn.eval().collapse()
    assert [type(each).__name__ for each in collapsed.modules()] == [type(each).__name__ for each in plain.modules()]
    assert list(collapsed.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(first(collapsed.eval()(x)), first(stn(x)), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(first(collapsed(x)), first(plain.eval()(x)))
    assert len(stn.hyper_layers()) >= 1  # and the self-tuning one is what it was
    draw = stn.space.draw(ROWS, generator())
    at_first = stn.collapse(draw.part(slice(2, 3)))
    torch.testing.assert_close(first(at_first(x))[2], first(stn(x, draw))[2], rtol=1e-11, atol=1e-11)


@pytest.mark.cases(quick=3, slow=10, among={"linear": [False]})
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_kind_are_those_of_finite_differences(name: str, linear: bool) -> None:
    _, stn, x = made(name, "unit", 0.3)
    stn.train()
    stn.linear = linear
    draw = stn.space.draw(ROWS, generator())
    parameters = dict(stn.module.named_parameters())
    names = list(parameters)
    inputs = [x.clone().requires_grad_()] if x.is_floating_point() else []

    def outputs(delta: Tensor, *values: Tensor) -> Tensor:
        given = values[0] if inputs else x
        changed = {f"module.{name}": value for name, value in zip(names, values[len(inputs) :], strict=True)}
        at = Draw(stn.space, draw.m.detach(), delta, draw.sigma.detach())
        return first(torch.func.functional_call(stn, changed, (given, at)))

    assert gradcheck(outputs, (draw.delta.detach().requires_grad_(), *inputs, *parameters.values()), fast_mode=True)


@pytest.mark.cases(quick=14)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_linearised_each_kind_is_the_derivative_of_the_other(name: str, training: bool) -> None:
    _, stn, x = made(name, "unit", 0.3)
    stn.train(training)
    draw = stn.space.draw(ROWS, generator())

    def scaled(t: float) -> Tensor:
        return first(copy.deepcopy(stn)(x, Draw(stn.space, draw.m, t * draw.delta, draw.sigma)))

    step = 1e-5
    slope = (scaled(step) - scaled(-step)) / (2 * step)
    base = scaled(0.0)
    stn.linear = True
    torch.testing.assert_close(first(stn(x, draw)), base + slope, rtol=1e-6, atol=1e-7)


class Network(nn.Module):
    """One of every kind, and what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(5, 3)
        self.conv = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.GroupNorm(2, 4))
        self.cell = nn.LSTMCell(4, 4)
        self.out = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        z = self.conv(self.word(tokens).mT)
        state = None
        for t in range(z.shape[-1]):
            state = self.cell(z[..., t], state)
        assert state is not None
        return self.head(self.out(state[0]))


def network(std: float = 0.4) -> tuple[STN, Tensor]:
    torch.manual_seed(1)
    return convert(Network().double(), space(), std=std), torch.randint(0, 5, (ROWS, 4), generator=generator(2))


@pytest.mark.parametrize("training", [True, False])
def test_the_linearised_network_is_the_derivative_of_the_other(training: bool) -> None:
    stn, x = network()
    stn.train(training)
    draw = stn.space.draw(ROWS, generator())

    def scaled(t: float) -> Tensor:
        return stn(x, Draw(stn.space, draw.m, t * draw.delta, draw.sigma))

    base, step = scaled(0.0), 1e-5
    slope = (scaled(step) - scaled(-step)) / (2 * step)
    statistics = {name: buffer.clone() for name, buffer in stn.named_buffers()}
    stn.linear = True
    torch.testing.assert_close(stn(x, draw), base + slope, rtol=1e-7, atol=1e-8)
    if training:
        assert any(not torch.equal(buffer, statistics[name]) for name, buffer in stn.named_buffers() if "running" in name)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("linear", [False, True])
def test_gradients_of_weights_and_response(linear: bool) -> None:
    stn, x = network()
    stn.train()
    stn.linear = linear
    draw = stn.space.draw(ROWS, generator())
    draw = Draw(stn.space, draw.m.detach(), draw.delta.detach(), draw.sigma.detach())
    parameters = dict(stn.module.named_parameters())
    names = list(parameters)

    def outputs(*values: Tensor) -> Tensor:
        changed = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(stn, changed, (x, draw))

    assert gradcheck(outputs, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2, elementwise_affine=False)])
def test_a_normalisation_without_a_response_is_linearised_too(norm: nn.Module) -> None:
    torch.manual_seed(0)
    stn = convert(nn.Sequential(nn.Linear(2, 2), norm, nn.Tanh(), nn.Linear(2, 1)).double(), space(), std=0.3)
    x, draw = normal(ROWS, 2), stn.space.draw(ROWS, generator())
    stn.linear = True
    weight = stn.module[0].responses["weight"].gate  # pyright: ignore[reportIndexIssue]

    def loss() -> Tensor:
        return stn(x, draw).square().sum()

    (found,) = torch.autograd.grad(loss(), weight)
    for i in range(2):
        for k in range(2):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight[i, k] += step
                    ends.append(float(loss()))
                    weight[i, k] -= step
            assert float(found[i, k]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_base_and_response_parameters_are_all_and_apart() -> None:
    stn, _ = network()
    base, response = stn.base_parameters(), stn.response_parameters()
    assert len({map(id, base)} & {map(id, response)}) == 0
    assert {*map(id, base), *map(id, response)} == {id(p) for p in stn.module.parameters()}
    assert len(base) == len(list(Network().parameters()))
    assert not {id(stn.space.u), id(stn.space.s)} & {*map(id, base), *map(id, response)}


@pytest.mark.parametrize("gate", ["unit", "scalar"])
def test_the_squared_norm_of_every_row(gate: str) -> None:
    torch.manual_seed(0)
    stn = convert(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 4)).double(), space(), gate=gate, std=0.5)
    draw = stn.space.draw(ROWS, generator())
    for i in range(ROWS):
        want = 0.0
        for layer in (stn.module[0], stn.module[2]):  # pyright: ignore[reportIndexIssue]
            response = layer.responses["weight"]
            gates = (response.gate @ draw.delta[i]).view(-1, *[1] * (layer.weight.dim() - 1))
            want += (layer.weight + gates * response.direction).square().sum().item()
        assert stn.squared_norm(draw)[i].item() == pytest.approx(want, rel=1e-12)
    plain = sum(p.square().sum().item() for p in stn.base_parameters() if p.dim() > 1)
    assert stn.squared_norm().item() == pytest.approx(plain, rel=1e-12)
    assert convert(stn.collapse(), stn.space, respond=False).squared_norm().item() == pytest.approx(plain, rel=1e-12)


def test_the_norm_of_the_response_is_that_of_its_jacobian() -> None:
    stn, _ = network()
    plain = dict(stn.collapse().named_parameters())
    total = 0.0
    for k in range(2):
        draw = Draw(stn.space, stn.space.u[None], torch.eye(2, dtype=DOUBLE)[k][None], stn.space.sigma)
        total += sum((p - plain[name]).square().sum().item() for name, p in stn.collapse(draw).named_parameters())
    assert stn.response_norm() == pytest.approx(total**0.5, rel=1e-10)


def test_the_users_network_is_left_alone() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), Dropout("a")).double()
    before = copy.deepcopy(plain.state_dict())
    stn = convert(plain, space())
    assert type(plain[0]) is nn.Linear and list(plain.state_dict()) == list(before)
    assert stn.module is not plain


def test_nothing_is_kept_after_a_call_whatever_happens() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("no")

    stn = convert(nn.Sequential(nn.Linear(3, 3), Fails()).double(), space())
    draw = stn.space.draw(2, generator())
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no"):
            stn(normal(2, 3), draw)
        with pytest.raises(RuntimeError, match=r"HyperLinear '0' was called without a draw"):
            stn.module[0](normal(2, 3))  # pyright: ignore[reportIndexIssue]
    stn = convert(nn.Linear(3, 2).double(), space(), std=0.5)
    for rows in (4, 7, 1):  # no size of a batch is baked in
        assert stn(normal(rows, 3), stn.space.draw(rows, generator())).shape == (rows, 2)
    with stn.at(stn.space.draw(4, generator(1))):
        inside = stn(normal(4, 3))
    assert not torch.equal(inside, stn(normal(4, 3)))


def test_one_drawn_row_is_for_all() -> None:
    stn = convert(nn.Conv2d(1, 2, 2).double(), space(), std=0.5)
    x, draw = normal(3, 1, 4, 4), stn.space.draw(1, generator())
    many = Draw(stn.space, draw.m.expand(3, -1), draw.delta.expand(3, -1), draw.sigma)
    torch.testing.assert_close(stn(x, draw), stn(x, many), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="got 3 rows, and the draw has 2"):
        stn(x, stn.space.draw(2, generator()))


def test_dropout_drops_at_the_rate_of_each_row() -> None:
    hyper = HyperSpace({"rate": Bounded(0.5, 0.0, 1.0, scale=2.0)}, dtype=DOUBLE)
    stn = convert(nn.Sequential(Dropout("rate"), nn.Linear(3, 1)).double(), hyper)
    torch.manual_seed(0)
    draw = hyper.draw(4, generator(3))
    drop: Any = stn.module[0]  # pyright: ignore[reportIndexIssue]
    with stn.at(draw):
        out = drop(torch.ones(4, 200_000, dtype=DOUBLE))
        torch.testing.assert_close((out == 0).double().mean(1), draw.h["rate"].detach(), rtol=0, atol=0.005)
        torch.testing.assert_close(out.mean(1), torch.ones(4, dtype=DOUBLE), rtol=0.03, atol=0)
        assert not out.requires_grad
        assert torch.equal(drop.eval()(out), out)
    plain: Any = stn.collapse()
    assert type(plain[0]) is nn.Dropout and plain[0].p == pytest.approx(0.5)


BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "own": (lambda: nn.ParameterList([torch.ones(2)]), {}, r"ParameterList with parameters of its own \(0\).*skip=\[''\]"),
    "nothing": (lambda: nn.ReLU(), {}, "no layer of ReLU has weights that could respond"),
    "all skipped": (lambda: nn.Sequential(nn.Linear(2, 2)), {"skip": ["0"]}, "no layer of Sequential"),
    "skip of nothing": (lambda: nn.Sequential(nn.Linear(2, 2)), {"skip": ["one"]}, "skip names 'one', which is not a module"),
    "dropout of nothing": (
        lambda: nn.Sequential(nn.Linear(2, 2), Dropout("c")),
        {},
        r"Dropout\('c'\) at '1': the space has a, b",
    ),
    "gate": (lambda: nn.Linear(2, 2), {"gate": "each"}, "gate='each' is not one of unit, scalar"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_refused_by_name(name: str) -> None:
    make, how, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        convert(make().double(), space(), **how)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the space is torch.float64 on cpu, and the network torch.float32 on cpu"):
        convert(nn.Linear(2, 2), space())


def test_a_converted_network_is_not_converted_again() -> None:
    stn = convert(nn.Sequential(nn.Linear(2, 2)).double(), space())
    with pytest.raises(ValueError, match="hyper-layer already"):
        convert(stn.module, space())


def test_what_is_skipped_has_no_response() -> None:
    stn = convert(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)).double(), space(), skip=["1"])
    assert type(stn.module[1]) is nn.LSTM  # pyright: ignore[reportIndexIssue]
    assert len(stn.hyper_layers()) == 1

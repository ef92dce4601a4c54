"""Networks of users that become self-tuning: weights that are shared, frozen, or read by other code than their layer's.

The reference is the definition: the plain network with the weights of a row, which ``collapse`` gives for any row of a draw, and
which ``test_stn_layers`` compares with weights formed by hand.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hyperopt import stn
from hyperopt.core.policy import reset_warnings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:FutureWarning",  # torch's own, at its first dual level
    "ignore:.*nested tensor.*:UserWarning",  # torch's own, of the fused path of its transformers
    "ignore:.*enable_nested_tensor.*:UserWarning",
)
DOUBLE = torch.float64
ROWS = 5
MODES = ("classic", "centred", "delta", "delta_linear")


def space(**how: Any) -> stn.HyperSpace:
    declared = {"rate": stn.Bounded(0.2, 0.0, 0.9, scale=0.7), "decay": stn.Positive(0.01)}
    return stn.HyperSpace(declared, dtype=DOUBLE, **how)


def converted(network: nn.Module, **how: Any) -> stn.STN:
    centred = how.pop("centred", True)
    return stn.convert(network.double(), space(centred=centred), **{"std": 0.5, **how})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def words(count: int, length: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, count, (ROWS, length), generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    """The output's matrix is that of the embedding."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(7, 8), nn.Linear(8, 7, bias=bias)
        self.o.weight = self.e.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(t)))


class Functional(nn.Module):
    """Weights that are read by torch.nn.functional and by operators, and not by their layer."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(7, 8), nn.Linear(8, 8)

    def forward(self, t: Tensor) -> Tensor:
        x = functional.linear(functional.embedding(t, self.e.weight), self.l.weight.T, self.l.bias)
        y = torch.tanh(self.e.weight[t] @ self.l.weight.t() + self.l.bias)
        return torch.tanh(x) @ self.e.weight.transpose(0, 1) + functional.linear(y, self.e.weight)


class Autoencoder(nn.Module):
    """The decoder's filters are those of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(x)))


class Decoder(nn.Module):
    """The decoder reads the encoder's matrix the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bias = nn.Linear(3, 4), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.l(x)), self.l.weight.mT, self.bias.bias)


class Sentences(nn.Module):
    """A transformer of padded sentences, which torch evaluates by a fused path if it may."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.e, self.t = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=fused)

    def forward(self, t: Tensor) -> Tensor:
        padding = (t == 0) & (torch.arange(t.shape[1]) > 0)
        return self.t(self.e(t), src_key_padding_mask=padding)[:, 0]


class Causal(nn.Module):
    """A transformer with the length first, and a mask; the sentences are as many as they are long."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2, norm=nn.LayerNorm(8), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.t(x.transpose(0, 1), mask=mask, is_causal=True).transpose(0, 1)


class Language(nn.Module):
    """A recurrent language model with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.r, self.o = nn.Embedding(6, 4), nn.LSTM(4, 4, 2, batch_first=True), nn.Linear(4, 6)
        self.o.weight = self.e.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.o(self.r(self.e(t))[0])


class Halved(nn.Linear):
    """A layer of one's own, derived from a known one."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight * 0.5, self.bias)


class Again(nn.Module):
    """One layer under three names, called four times."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.k, self.n = self.l, nn.Sequential(self.l, nn.Tanh(), self.l)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.k(torch.tanh(self.l(x))))


class Packed(nn.Module):
    """The three projections in one matrix, cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (functional.linear(x, w, b) for w, b in zip(self.l.weight.chunk(3), self.l.bias.split(4), strict=True))
        return functional.scaled_dot_product_attention(q, k, v) + functional.linear(x, self.l.weight[:4])


def half_frozen() -> nn.Module:
    network = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    network.self_attn.requires_grad_(False)
    network.linear1.bias.requires_grad_(False)
    return network


class Careful(nn.Module):
    """Takes shape, type and device from its weight, and reads it as a constant as well."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.l.weight.dtype).type_as(self.l.weight) + self.l.weight.new_ones(4)
        x = torch.cat([x, torch.zeros_like(self.l.weight)[:1].expand_as(x[:, :1])], 1) if x.dim() == 3 else x
        assert self.l.weight.shape == (4, 4) and self.l.bias.requires_grad and self.l.weight.device == x.device
        y = functional.linear(x, self.l.weight.contiguous(), None if self.l.bias is None else self.l.bias / 2)
        return y + torch.addmm(self.l.bias, x[:, 0], self.l.weight.t())[:, None] * self.l.bias


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "tied": (Tied, words(7), {}),
    "tied, a gate for each word": (lambda: nn.Sequential(nn.Embedding(7, 8), nn.Tanh(), Decoder8()), words(7), {}),
    "tied, one gate": (lambda: Tied(bias=True), words(7), {"gate": "scalar"}),
    "functional": (Functional, words(7), {}),
    "tied filters": (Autoencoder, normal(ROWS, 4, 6, 6), {}),
    "a matrix both ways": (Decoder, normal(ROWS, 3), {}),
    "sentences, fused by torch": (Sentences, words(7), {}),
    "causal, as many as long": (Causal, normal(ROWS, ROWS, 8), {}),
    "language model": (Language, words(6), {}),
    "a layer of one's own": (lambda: nn.Sequential(Halved(4, 4), nn.Tanh(), Halved(4, 2)), normal(ROWS, 4), {}),
    "called again": (Again, normal(ROWS, 3, 4), {}),
    "packed projections": (Packed, normal(ROWS, 3, 4), {}),
    "careful": (Careful, normal(ROWS, 3, 4), {}),
    "half frozen encoder": (half_frozen, normal(ROWS, 3, 8), {}),
    "attention without response": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        normal(ROWS, 3, 8),
        {"skip": ["self_attn"]},
    ),
    "frozen norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4).requires_grad_(False), nn.Conv1d(4, 2, 2)),
        normal(ROWS, 2, 6),
        {},
    ),
}


class Decoder8(nn.Module):
    """A matrix by which an embedding of its own is read: the first reader is linear, so that its words are the units."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.e = nn.Linear(8, 7), nn.Embedding(7, 8)
        self.e.weight = self.o.weight

    def forward(self, x: Tensor) -> Tensor:
        words = torch.arange(7).expand(len(x), -1)
        return self.o(x) + self.o(self.e(words)).mean(1, keepdim=True)


@pytest.mark.cases(quick=3, slow=38, among={"training": [True]})
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_example_has_the_network_of_its_own_weights(name: str, training: bool, linear: bool) -> None:
    make, x, how = NETWORKS[name]
    torch.manual_seed(0)
    model = converted(make(), **how)
    model.train(training)
    draw = model.space.draw(ROWS)
    if linear:  # then the tangent is the derivative along the draw

        def along(t: float) -> Tensor:
            moved = stn.Draw(model.space, draw.m, t * draw.delta, draw.sigma)
            rows = [copy.deepcopy(model).collapse(moved.part(slice(i, i + 1))).train(training) for i in range(ROWS)]
            return torch.stack([row(x)[i] for i, row in enumerate(rows)])

        want = along(0.0) + (along(1e-5) - along(-1e-5)) / 2e-5
        model.linear = True
        torch.testing.assert_close(model(x, draw), want, rtol=1e-6, atol=1e-7)
        return
    for gradients in (True, False):
        rows = [model.collapse(draw.part(slice(i, i + 1))).train(training) for i in range(ROWS)]
        with torch.set_grad_enabled(gradients):
            found = copy.deepcopy(model)(x, draw)
            for i, row in enumerate(rows):
                torch.testing.assert_close(found[i], row(x)[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    make, x, how = NETWORKS[name]
    torch.manual_seed(0)
    model = converted(make(), **how).train()
    eps = model.space.noise(ROWS)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        draw = model.space.at(eps)
        delta = draw.m - u  # the centre stands still
        draw = stn.Draw(model.space, draw.m, delta, draw.sigma)
        return model(x, draw).square().mean() + 0.1 * (model.squared_norm(draw) * draw.h["rate"]).mean()

    u = model.space.u.detach().clone()
    gradients = torch.autograd.grad(loss(), parameters)
    direction = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += step * way
            ends.append(float(loss()))
            for parameter, way in zip(parameters, direction, strict=True):
                parameter -= step * way
    found = sum(float((g * way).sum()) for g, way in zip(gradients, direction, strict=True))
    assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("make", [Tied, Autoencoder, Language])
def test_tied_weights_count_once_and_stay_tied(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    model = converted(network, centred=False)
    shared = sum(p.square().sum() for p in model.base_parameters() if p.dim() > 1)
    still = model.space.at(torch.zeros(1, 2, dtype=DOUBLE))
    zero = stn.Draw(model.space, still.m, torch.zeros_like(still.delta), still.sigma)
    torch.testing.assert_close(model.squared_norm(zero)[0], shared)
    plain = model.collapse()
    assert len(list(plain.parameters())) == len(list(network.parameters())) == len(model.base_parameters())
    squares = sum(p.square().sum() for p in plain.parameters() if p.dim() > 1)
    torch.testing.assert_close(model.squared_norm()[0], torch.as_tensor(squares))
    assert len(model.response_parameters()) == 2 * len(model.weights()) == 2 * len(list(network.parameters()))


def test_the_case_of_tied_weights() -> None:
    torch.manual_seed(0)
    network = Tied()
    model = stn.convert(network, stn.HyperSpace({"decay": stn.Positive(0.1)}), std=0.5)
    plain: Any = model.collapse()
    assert float(model.squared_norm().detach()) == pytest.approx(float(network.e.weight.detach().square().sum()), rel=1e-5)
    assert plain.e.weight is plain.o.weight


def train_loss(model: stn.STN, batch: Any, draw: stn.Draw) -> Tensor:
    error = (model(batch[0], draw) - batch[1]).square().flatten(1).mean(1)
    return ((1 + draw.h["rate"]) * error).mean() + (draw.h["decay"] * model.squared_norm(draw)).mean()


def valid_loss(model: stn.STN, batch: Any, draw: stn.Draw | None) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", [[], ["0"]])
def test_frozen_layers_stay_and_the_rest_learns(skip: list[str], mode: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    network[0].requires_grad_(False)
    network[1].bias.requires_grad_(False)
    model = converted(network, skip=skip)
    assert set(model.weights()) == {"1.weight", "3.weight", "3.bias"}
    tuning = stn.SelfTuning(model, train_loss, valid_loss, stn.SelfTuningSettings(mode=mode))
    batch = normal(6, 8), normal(6, 1)
    for _ in range(2):
        tuning.round(lambda: batch, lambda: batch)
    plain: Any = model.collapse()
    for place, parameter in network.named_parameters():
        assert torch.equal(plain.get_parameter(place), parameter) == (not parameter.requires_grad), place
        assert plain.get_parameter(place).requires_grad == parameter.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_layers_frozen_under_way_stay(mode: str) -> None:
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)))
    tuning = stn.SelfTuning(model, train_loss, valid_loss, stn.SelfTuningSettings(mode=mode))
    batch = normal(6, 3), normal(6, 1)
    tuning.round(lambda: batch, lambda: batch)
    model.module[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    before = copy.deepcopy(model.module[0].state_dict())  # pyright: ignore[reportIndexIssue]
    tuning.round(lambda: batch, lambda: batch)
    for name, value in model.module[0].state_dict().items():  # pyright: ignore[reportIndexIssue]
        assert torch.equal(value, before[name])


@pytest.mark.cases(quick=2, slow=8, among={"make": [Tied, Sentences]})
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [Tied, Functional, Sentences, Language])
def test_rounds_resume_bit_for_bit(make: Callable[[], nn.Module], mode: str) -> None:
    def fresh() -> stn.SelfTuning:
        torch.manual_seed(0)
        return stn.SelfTuning(converted(make()), train_loss, valid_loss, stn.SelfTuningSettings(mode=mode))

    x = words(6)
    batch = x, torch.zeros_like(converted(make())(x)) + 0.3
    whole, first = fresh(), fresh()
    for _ in range(4):
        whole.round(lambda: batch, lambda: batch)
    for _ in range(2):
        first.round(lambda: batch, lambda: batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = fresh()
    second.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        second.round(lambda: batch, lambda: batch)
    for (name, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.history[0].valid_loss > whole.history[-1].valid_loss


def test_a_skipped_weight_responds_nowhere() -> None:
    model = converted(Language(), skip=["o"])
    assert set(model.weights()) == {place for place, _ in Language().named_parameters() if place.startswith("r.")}
    torch.testing.assert_close(model.squared_norm()[0], sum(p.square().sum() for p in model.base_parameters() if p.dim() > 1))


def test_parts_of_the_network_that_are_called_on_their_own() -> None:
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x, draw, parts = normal(ROWS, 3), model.space.draw(ROWS), list(model.module.children())
    with model.at(draw):
        by_parts = parts[2](parts[1](parts[0](x)))
    torch.testing.assert_close(by_parts, model(x, draw), rtol=0, atol=0)


def test_activations_that_are_computed_again() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.k, self.saving = nn.Linear(3, 3), nn.Linear(3, 1), True

        def inside(self, x: Tensor) -> Tensor:
            return self.k(torch.tanh(self.l(x)))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inside, x, use_reentrant=False) if self.saving else self.inside(x)

    found = []
    for saving in (True, False):
        torch.manual_seed(0)
        network = Saving()
        network.saving = saving
        model = converted(network)
        tuning = stn.SelfTuning(model, train_loss, valid_loss)
        batch = normal(6, 3), normal(6, 1)
        for _ in range(3):
            tuning.round(lambda batch=batch: batch, lambda batch=batch: batch)
        found.append(model.state_dict())
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match=r"torch.utils.checkpoint calls it again, take the gradient within"):
        converted(Saving())(batch[0], model.space.draw(6)).sum().backward()


@pytest.mark.cases(quick=0, slow=1)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("make", [Tied, Sentences, Functional])
def test_compiled_it_gives_the_same_numbers(make: Callable[[], nn.Module], linear: bool) -> None:
    torch.manual_seed(0)
    model = converted(make())
    model.linear = linear
    x = words(7)
    torch._dynamo.reset()
    quick = torch.compile(model, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            draw = model.space.draw(ROWS)
        found, want = (each(x, draw).square().mean() for each in (quick, model))
        assert torch.equal(found, want)
        parameters = list(model.module.parameters())
        for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(want, parameters), strict=True):
            assert torch.equal(one, other)

    def penalised(x: Tensor) -> Tensor:
        with model.at(draw):
            return model(x).mean() + model.squared_norm().mean()

    torch.testing.assert_close(torch.compile(penalised, backend="eager")(x), penalised(x), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"is a OptimizedModule: convert the plain network .*compile what convert gives back"):
        stn.convert(torch.compile(nn.Linear(2, 2).double(), backend="eager"), space())  # pyright: ignore[reportArgumentType]


def test_in_data_parallel_it_has_the_gradient_of_the_whole(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = converted(Tied())
    x, eps = words(7), model.space.noise(ROWS)

    def loss(network: nn.Module) -> Tensor:
        draw = model.space.at(eps)
        return network(x, draw).square().mean() + model.squared_norm(draw).mean()

    want = torch.autograd.grad(loss(model), list(model.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss(wrapped).backward()
        for parameter, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
        with pytest.raises(TypeError, match="model is a DistributedDataParallel; give the network that convert gave back"):
            stn.SelfTuning(wrapped, train_loss, valid_loss)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"'the network' is a DistributedDataParallel: convert the network inside"):
            stn.convert(nn.parallel.DistributedDataParallel(nn.Linear(2, 2).double()), space())
    finally:
        torch.distributed.destroy_process_group()


def test_transforms_of_torch_func() -> None:
    torch.manual_seed(0)
    model = converted(Decoder())
    x = normal(ROWS, 3)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        draw = model.space.draw(ROWS)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x, draw))

    found = torch.func.grad(lambda values: outputs(values).square().sum())(parameters)
    want = torch.autograd.grad(outputs(parameters).square().sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(found[name], torch.zeros_like(parameters[name]) if gradient is None else gradient)
    many = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in parameters.items()}
    for i, each in enumerate(torch.vmap(outputs)(many)):
        torch.testing.assert_close(each, outputs({name: p[i] for name, p in many.items()}), rtol=1e-12, atol=1e-12)


def test_it_is_copied_and_saved_whole() -> None:
    torch.manual_seed(0)
    model = converted(Language())
    x, draw = words(6), model.space.draw(ROWS)
    want = model(x, draw)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: Any
    for again in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(again(x, draw), want)
        assert len(again.weights()) == len(model.weights()) and again.weights().keys() == model.weights().keys()
        assert again.module.o.weight is again.module.e.weight


def read(function: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A network that reads the weight of its layer by a function."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, function(self.l.weight))

    return Reads


class Sorted(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 1, 2, 3, 2], batch_first=True, enforce_sorted=False)
        return self.r(packed)[1][0]


class Flat(nn.Module):
    """Examples and times in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x.flatten(0, 1))


class Turned(nn.Module):
    """The length first inside, or only seemingly: as many words as sentences."""

    def __init__(self, turned: bool = True) -> None:
        super().__init__()
        self.l, self.k, self.turned, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), turned, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.l(x))
        return self.k(h.transpose(0, 1)).transpose(0, 1) if self.turned else self.k(h)


@pytest.mark.parametrize("linear", [False, True])
def test_another_dimension_that_is_as_long_is_not_taken_for_the_examples(linear: bool) -> None:
    torch.manual_seed(0)
    x = normal(ROWS, ROWS, 4)
    model = converted(Turned())
    model.linear = linear
    with pytest.raises(ValueError, match=r"HyperLinear 'k.bias' got 5 rows, and the draw has 6: the first dimension must be"):
        model(x, model.space.draw(ROWS))
    model = converted(Turned(turned=False))
    model.linear = linear
    state = torch.get_rng_state()
    noise = model.space.draw(ROWS)
    torch.set_rng_state(state)
    model.space.draw(ROWS)
    after = torch.get_rng_state()
    for _ in range(3):
        model(x, noise)
    assert model.module.calls == 3 and torch.equal(torch.get_rng_state(), after)  # the one call more was of a copy
    assert model._context.sure == {"l.weight", "l.bias", "k.weight", "k.bias"}


def test_where_it_cannot_be_told_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(x + torch.zeros(ROWS, 1, 4, dtype=x.dtype))

    reset_warnings()
    model = converted(Fixed())
    for _ in range(2):
        assert model(normal(ROWS, ROWS, 4), model.space.draw(ROWS)).shape == (ROWS, ROWS, 4)
    said = [text for text in caplog.messages if "l.bias, l.weight got inputs" in text]
    assert len(said) == 1 and "the first was taken for the examples" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [Tied, Sentences, Language, Functional, Autoencoder])
def test_under_autocast_it_is_near_to_the_definition(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    declared = {"rate": stn.Bounded(0.2, 0.0, 0.9, scale=0.7)}
    model = stn.convert(make(), stn.HyperSpace(declared), std=0.3).eval()
    x = words(6) if make is not Autoencoder else normal(ROWS, 4, 6, 6).float()
    draw = model.space.draw(ROWS)
    want = torch.stack([model.collapse(draw.part(slice(i, i + 1)))(x)[i] for i in range(ROWS)])
    with torch.autocast("cpu", dtype=dtype):
        found = model(x, draw)
    assert found.dtype == dtype or make in (Sentences,)
    assert (found.float() - want).norm() < 0.05 * want.norm()
    gradients = torch.autograd.grad(found.float().square().mean(), model.response_parameters())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def hooked() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "normalised by hand": (read(functional.normalize), r"'l.weight' of a HyperLinear responds .*torch\.\w+ has no rule"),
    "masked": (read(lambda w: w * torch.ones(4, 4, dtype=DOUBLE)), r"'l.weight' .*torch.mul has no rule.*skip=\['l'\]"),
    "a number of it": (read(lambda w: w * w.mean().item()), r"'l.weight' .*torch.mean has no rule"),
    "einsum": (read(lambda w: torch.einsum("ij,jk->ik", w, torch.eye(4, dtype=DOUBLE))), r"torch.einsum has no rule"),
    "its inverse": (read(torch.linalg.inv), r"torch.linalg_inv has no rule"),
    "packed": (Sorted, r"'r.weight_ih_l0' of a HyperGRU .*packed sequence.*pad them instead"),
    "flat": (Flat, r"HyperLinear 'l.bias' got 15 rows, and the draw has 5"),
    "max_norm": (
        lambda: nn.Sequential(Looks(), nn.Embedding(7, 4, max_norm=1.0)),
        r"'1.weight' .*max_norm=1.0 changes the weight",
    ),
    "largest of a bag": (
        lambda: nn.Sequential(Looks(), nn.EmbeddingBag(7, 4, mode="max")),
        r"embedding_bag has no rule for mode='max'",
    ),
}


def in_one_memory() -> nn.Module:
    one, other = nn.Linear(4, 4, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)
    other.weight.data = one.weight.data
    return nn.Sequential(one, other)


def halfway_tied() -> nn.Module:
    one, other = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    one.weight = other.get_parameter("parametrizations.weight.original1")
    return nn.Sequential(one, other)


REFUSED_BEFORE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        r"'weight' of '0' has a parametrization \(_SpectralNorm\) that cannot take any weight.*skip=\['0'\]",
    ),
    "orthogonal": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))),
        r"\(_Orthogonal\) that cannot take any weight",
    ),
    "weight norm by a hook": (hooked, r"'0' is a Linear whose weight a hook computes .*parametrizations.weight_norm"),
    "one memory": (in_one_memory, r"'0.weight' and '1.weight' share their memory.*network.1.weight = network.0.weight"),
    "halfway tied": (halfway_tied, r"'1.weight' and '0.weight' are two weights, made of a parameter that they share"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy layer without weights as yet; call the network once"),
    "all frozen": (lambda: nn.Linear(4, 4).requires_grad_(False), r"could respond: those that are frozen"),
    "its own parameter": (
        lambda: nn.Sequential(nn.ParameterDict({"scale": torch.ones(3)}), nn.Linear(3, 3)),
        r"'0' is a ParameterDict with parameters of its own \(scale\).*skip=\['0'\]",
    ),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(4, 4)), r"'the network' is a DataParallel: convert the network inside"),
}


class Looks(nn.Module):
    """Makes words of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., 0].abs() * 3).long().clamp(max=6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name_at_the_first_call(name: str) -> None:
    make, message = REFUSED[name]
    model = converted(make())
    with pytest.raises(ValueError, match=message):
        model(normal(ROWS, 3, 4), model.space.draw(ROWS))


@pytest.mark.parametrize("name", REFUSED_BEFORE)
def test_what_cannot_work_is_refused_by_convert(name: str) -> None:
    make, message = REFUSED_BEFORE[name]
    with pytest.raises(ValueError, match=message):
        converted(make())


def test_a_penalty_of_a_weight_that_responds_is_refused() -> None:
    model = converted(nn.Sequential(nn.Linear(3, 3)))
    layer: Any = model.module[0]  # pyright: ignore[reportIndexIssue]
    assert layer.weight is next(model.module.parameters())  # outside of a call it is the parameter
    with model.at(model.space.draw(2)), pytest.raises(ValueError, match=r"torch.abs has no rule.*model.squared_norm\(draw\)"):
        layer.weight.abs().sum()

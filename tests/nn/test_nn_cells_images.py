"""The ResNet and multiscale cells, weight norms, and the networks around them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hyperopt import GMRES, Anderson, Broyden, Implicit, NewtonKrylov, Picard, Unrolled, fixed_point
from hyperopt.nn import DEQ, MDEQCell, ResNetCell, TanhFixedPoint, mdeq_network, resnet_network, tanh_network
from hyperopt.nn.contractive import normalise
from hyperopt.nn.networks import ImageNetwork

pytestmark = pytest.mark.usefixtures("float64")


TIGHT = Implicit(GMRES(1e-11, max_steps=400), policy="raise")


class Mild(MDEQCell):
    """A multiscale cell that contracts: its blocks see a fixed state of unit size, and the state itself a tenth as large."""

    def forward(self, z, x):
        fixed = [torch.randn(leaf.shape[1:], generator=torch.Generator().manual_seed(i)) for i, leaf in enumerate(z)]
        return super().forward([a + 0.1 * b for a, b in zip(fixed, z, strict=True)], x)


def small_mdeq(norm: str | None = None, channels: tuple[int, ...] = (4, 4, 8)) -> MDEQCell:
    return Mild(channels, expansion=1, groups=4, dropout=0.0, norm=norm)


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_numbers_of_parameters():
    assert count(resnet_network()) == 64_842
    assert count(resnet_network().deq) == 2 * 48 * 64 * 9 + 2 * (64 + 48 + 48)
    assert count(tanh_network()) == 784 * 100 + 100 + 100 * 100 + 100 * 10 + 10
    assert count(mdeq_network()) == 158_890


def test_the_resnet_cell_is_the_formula_and_starts_as_said():
    cell = ResNetCell(16, 24, 4)
    for conv in (cell.conv1, cell.conv2):
        weight = conv.weight.detach()
        assert conv.bias is None and abs(float(weight.mean())) < 1e-3 and 0.0095 < float(weight.std()) < 0.0105
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z, x = torch.randn(2, 16, 5, 5), torch.randn(2, 16, 5, 5)

    def group_norm(v, norm):
        grouped = v.reshape(2, 4, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return grouped.reshape(v.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]

    inside = group_norm(functional.conv2d(z, cell.conv1.weight, padding=1).relu(), cell.norm1)
    inside = group_norm(x + functional.conv2d(inside, cell.conv2.weight, padding=1), cell.norm2)
    torch.testing.assert_close(cell(z, x), group_norm((z + inside).relu(), cell.norm3))


@pytest.mark.parametrize("solver", [Picard(1e-11, max_steps=2000), Anderson(1e-11, max_steps=500), Broyden(1e-11, max_steps=500)])
def test_a_tiny_resnet_cell_under_every_solver(solver):
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    deq = DEQ(ResNetCell(2, 2, 1), solver, TIGHT, policy="raise")
    value = deq(x)
    torch.testing.assert_close(deq.cell(value, x), value)
    got = torch.autograd.grad(value.square().mul(torch.arange(3)).sum(), [x, *deq.parameters()])
    deq.solver, deq.adjoint = Picard(1e-11, max_steps=2000), Unrolled()
    want = torch.autograd.grad(deq(x).square().mul(torch.arange(3)).sum(), [x, *deq.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_first_and_second_derivatives_of_a_tiny_resnet_cell():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    deq = DEQ(ResNetCell(2, 2, 1), Anderson(1e-12, max_steps=500), TIGHT, policy="raise")
    names = [name for name, _ in deq.named_parameters()]

    def layer(x, *given):
        return torch.func.functional_call(deq, dict(zip(names, given, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in deq.parameters()))
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
def test_the_multiscale_layer_finds_all_scales_together_and_differentiates_them(norm):
    cell = small_mdeq(norm).eval()  # in training mode a spectral norm's vectors would move between the two solves
    x = torch.randn(2, 4, 8, 4, requires_grad=True)
    deq = DEQ(cell, Anderson(1e-11, max_steps=500), TIGHT, policy="raise")
    value = deq(x)
    assert [tuple(z.shape) for z in value] == [(2, 4, 8, 4), (2, 4, 4, 2), (2, 8, 2, 1)]
    assert deq.solution is not None and deq.solution.rows == 2
    for a, b in zip(value, cell(value, x), strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(z) for z in value]
    got = torch.autograd.grad([*value], [x, *deq.parameters()], weights)
    deq.solver, deq.adjoint = Picard(1e-12, max_steps=2000), Unrolled()
    for a, b in zip(got, torch.autograd.grad([*deq(x)], [x, *deq.parameters()], weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_rows_of_the_multiscale_layer_are_independent():
    deq, x = DEQ(small_mdeq(), Picard(1e-10, max_steps=500), policy="raise"), torch.randn(3, 4, 8, 8)
    together = deq(x)
    for i in range(3):
        for a, b in zip(together, deq(x[i : i + 1]), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-7, atol=1e-8)


def test_a_spectral_norm_makes_a_tanh_layer_contract_and_its_vectors_move_once_a_forward():
    layer = TanhFixedPoint(6, Picard(1e-10, max_steps=2000), TIGHT, init_scale=30.0, norm="spectral", policy="raise")
    x = torch.randn(3, 6, requires_grad=True)
    twin = copy.deepcopy(layer)
    for _ in range(3):
        layer(x).sum().backward()
        assert layer.cell.get_parameter("parametrizations.weight.original").grad is not None
        twin.weight  # noqa: B018  (one step of the power iteration)
        for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for _ in range(100):
        layer.weight  # noqa: B018
    assert float(torch.linalg.matrix_norm(layer.eval().weight.detach(), 2)) == pytest.approx(1.0, rel=1e-6)
    assert torch.autograd.gradcheck(layer, x)


def test_weight_norm_keeps_the_weights_and_gives_them_a_length():
    torch.manual_seed(1)
    plain = ResNetCell(4, 4, 2)
    torch.manual_seed(1)
    normed = ResNetCell(4, 4, 2, norm="weight")
    assert count(normed) == count(plain) + 8  # a length for each output channel
    z, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(normed(z, x), plain(z, x))


def test_dropout_in_a_cell_is_one_mask_a_solve():
    deq = DEQ(ResNetCell(4, 4, 2, dropout=0.5), Anderson(1e-10, max_steps=500), policy="raise")
    x = torch.randn(2, 4, 3, 3)
    assert not torch.allclose(deq(x), deq(x))
    deq.eval()
    torch.testing.assert_close(deq(x), deq(x))


def test_a_network_from_images_to_logits_with_a_start_from_the_caller():
    for net in (
        tanh_network(8, (1, 4, 4), 3, policy="raise"),
        resnet_network(ResNetCell(4, 4, 2), (3, 8, 8), 3, pool=4, solver=Anderson(1e-8, max_steps=300), policy="raise"),
        mdeq_network(small_mdeq(), (3, 8, 8), 3, head=(2, 2, 2), final=5, solver=Anderson(1e-8, max_steps=300), policy="raise"),
    ):
        assert net.image is not None
        images = torch.randn(4, *net.image)
        logits = net.eval()(images)
        assert logits.shape == (4, 3)
        deq: Any = net.deq
        solution = deq.solution
        torch.testing.assert_close(net.head(solution.value), logits)
        again = net(images, z0=solution.value)
        assert int(deq.solution.forward.iterations.max()) <= 2
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
        net.train()(images).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
        assert isinstance(net[:1], ImageNetwork)


def test_images_of_the_wrong_shape():
    net = resnet_network(ResNetCell(8, 8), (3, 8, 8), pool=8)
    for shape in ((2, 1, 8, 8), (2, 3, 7, 7), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"the images have shape .* the network takes .*3, 8, 8.*change dataset or image"):
            net(torch.zeros(shape))
    with pytest.raises(ValueError, match="pool=8 does not divide images of 28 x 28; change pool"):
        resnet_network(image=(1, 28, 28))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\), but the cell takes \(rows, channels=8"):
        DEQ(ResNetCell(8, 8))(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"MDEQCell: images of 6 x 4 cannot be halved 2 times"):
        DEQ(small_mdeq())(torch.zeros(1, 4, 6, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\), but the layer takes \(rows, width=3\)"):
        TanhFixedPoint(3)(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNetCell(50, 64, 8), "channels=50 is not divisible by groups=8"),
        (lambda: ResNetCell(48, 60, 8), "inner=60 is not divisible by groups=8"),
        (lambda: ResNetCell(48, 64, 0), "groups=0 must be at least 1"),
        (lambda: ResNetCell(kernel_size=2), "kernel_size=2 must be odd"),
        (lambda: ResNetCell(dropout=1.0), r"dropout=1.0 is not in \[0, 1\)"),
        (lambda: ResNetCell(norm="batch"), "norm='batch' is not one of None, weight, spectral"),
        (lambda: normalise(nn.ReLU(), "weight"), "ReLU has no matrix or kernel called weight"),
        (lambda: MDEQCell(()), "channels is empty"),
        (lambda: MDEQCell((24, 25)), r"channels\[1\]=25 is not divisible by groups=8"),
        (lambda: MDEQCell((3, 3), groups=3), "groups=3 must be even"),
        (lambda: mdeq_network(MDEQCell((8, 8)), head=(2,)), r"inner=\(2,\) must have one number for each of channels=\(8, 8\)"),
        (lambda: TanhFixedPoint(0), "width=0 must be at least 1"),
    ],
)
def test_bad_numbers_are_refused_with_their_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_dense_newton_is_refused_for_images_with_the_size_and_what_to_use_instead():
    torch.set_default_dtype(torch.float32)
    from hyperopt import Chord, Newton

    for solver in (Newton(), Chord()):
        deq = DEQ(ResNetCell(), solver)
        with pytest.raises(ValueError, match=r"1 rows of 49152 entries take 9 GiB.*use NewtonKrylov"):
            deq(torch.zeros(1, 48, 32, 32))
    x = torch.randn(1, 2, 3, 3)
    DEQ(ResNetCell(2, 2, 1), NewtonKrylov(1e-4), policy="raise")(x)


def test_the_layer_is_the_primitive():
    deq, x = DEQ(ResNetCell(2, 2, 1), Anderson(1e-8, max_steps=300)), torch.randn(2, 2, 3, 3)
    bare = fixed_point(deq.cell, torch.zeros(2, 2, 3, 3), (x,), solver=Anderson(1e-8, max_steps=300), row_args=(0,))
    torch.testing.assert_close(deq(x), bare.value, rtol=0, atol=0)
    assert deq.solution is not None and deq.solution.forward.evaluations == bare.forward.evaluations

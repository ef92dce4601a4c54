"""Many seeds of the study of the quadratic at once: stacked networks, each with a range of its own, under one ``SelfTuning``.

The losses are sums over the networks and Adam works entry by entry, so that every network is trained as if it were alone: same
space, same draws, same step, same modes. What takes 20 runs takes about three times as long as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from hyperopt import stn
from hyperopt.bilevel.outer import OuterOptimizer
from hyperopt.stn.kinds import KINDS
from hyperopt.stn.response import Response
from hyperopt.tasks.stn_quadratic import ACTIVATION

REACH, BATCH, CLOSE = 2.0, 100, 0.05
BATCHES = 10**9


class Stack(nn.Module):
    """Linear layers side by side. shapes: (networks, rows, in) to (networks, rows, out)."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Stack them."""
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().double() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().double() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class StackResponse(Response):
    """That of the weights of all networks, each of which has a hyperparameter of its own: V has a row for each network."""

    def __init__(self, direction: Tensor, gate: str, std: float) -> None:
        """Draw V."""
        nn.Module.__init__(self)
        self.direction = nn.Parameter(direction)
        units = direction.shape[1] if gate == "unit" else 1
        self.gate = nn.Parameter(std * torch.randn(len(direction), units).double())

    def slope(self) -> Tensor:
        """Not asked for."""
        return torch.zeros(())


class HyperStack(stn.HyperLayer, Stack):
    """Each network responds to its own hyperparameter alone."""

    plain = Stack

    def respond(self, name: str, count: int, gate: str, std: float) -> Response:
        """As the base class, network by network."""
        weight = self.base(name).detach()
        return StackResponse(torch.stack([self.fresh(w.float()) for w in weight]).double(), gate, std)

    @staticmethod
    def tangent(delta: Tensor, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """The response of the outputs. shape of delta: (networks, rows or 1, 1)."""
        shift = delta * (bias.gate * bias.direction)[:, None]
        return torch.addcmul(shift, delta * weight.gate[:, None], torch.bmm(x, weight.direction.mT))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all."""
        y, draw = torch.baddbmm(self.base("bias")[:, None], x, self.base("weight").mT), self.draw
        if not draw.responds:
            return y
        delta, parts = draw.delta.mT[:, :, None], (self.responses["weight"], self.responses["bias"])
        if self.context is None or not self.context.linear:
            return y + self.tangent(delta, x, *parts)
        primal, slope = forward_ad.unpack_dual(y)
        found = self.tangent(delta, forward_ad.unpack_dual(x).primal, *parts)
        return forward_ad.make_dual(primal, found if slope is None else slope + found)


KINDS[Stack] = HyperStack


@dataclass
class Plan:
    """One way to run the study; the defaults are those of ``experiment=stn_quadratic_scheduled``."""

    mode: str = "centred"
    activation: str = "silu"
    width: int = 24
    warmup: int = 20
    train_steps: int = 10
    valid_steps: int = 1
    lr: float = 0.003
    values_lr: float = 0.185
    values_gamma: float | None = 0.955  # factor of the rate of the ranges after every round
    clip: float | None = 0.1  # of the gradient of each range
    betas: tuple[float, float] = (0.9, 0.99)  # of the optimizer of the ranges
    scales_lr: float = 0.003
    entropy: float = 1e-3
    update: str = "joint"
    gate: str = "unit"
    std: float = 0.0
    start: float = 0.5
    scale: float = 0.5
    rounds: int = 1000
    low: float = 0.01
    high: float = 10.0
    frozen: bool = False  # the control: the range never moves
    stop: bool = True  # once every network has been close
    measured: bool = False  # gradients of the ranges in measured scales, and SGD; see hyperopt.stn.rates
    cosine: bool = False  # the rates of weights, response and ranges fall to 0 over all rounds
    response_lr: float | None = None  # of the response, if it has a rate of its own
    weight_betas: tuple[float, float] = (0.9, 0.999)  # of Adam for the weights and the response
    dtype: str = "float64"  # of everything


@dataclass
class Found:
    """What came of it, a number for each seed.

    Attributes:
        hit: the first round (those of the warm-up not counted) at whose end the largest error is below 0.05; None: never.
        at_hit: the range then.
        best: the least largest error.
        last: the largest error at the last round done.
        range: the range then.
        scale: the scale then.
        last_tenth: the largest error in the last tenth of the rounds.
    """

    hit: list[int | None] = field(default_factory=list)
    at_hit: list[float | None] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    range: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    last_tenth: list[float] = field(default_factory=list)


def study(seeds: list[int], plan: Plan, trace: list[Any] | None = None, starts: list[float] | None = None) -> Found:
    """Run all seeds together.

    Args:
        seeds: of the networks' initial values; the first one seeds data and perturbations as well.
        plan: how.
        trace: gets ``(ranges, scales, training losses, validation losses, distances)`` of every round, all at the range itself.
        starts: where the range of each network starts (None: all as the plan says).
    """
    networks, dtype = [], getattr(torch, plan.dtype)
    for seed in seeds:
        torch.manual_seed(seed)
        sizes = [(1, plan.width), *[(plan.width, plan.width)] * 3, (plan.width, 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks.append([nn.Linear(*size, dtype=torch.float32) for size in sizes])
    stacks = [Stack(list(layers)).to(dtype) for layers in zip(*networks, strict=True)]
    layers: list[nn.Module] = [stacks[0]]
    for stack in stacks[1:4]:
        layers += [stack, ACTIVATION[plan.activation]()]
    torch.manual_seed(seeds[0])
    ranges = [stn.Bounded(start, plan.low, plan.high, scale=plan.scale) for start in starts or [plan.start] * len(seeds)]
    space = stn.HyperSpace({f"range{i}": each for i, each in enumerate(ranges)}, dtype=dtype)
    model = stn.convert(nn.Sequential(*layers, stacks[4]), space, gate=plan.gate, std=plan.std).to(dtype)
    generator = torch.Generator().manual_seed(BATCHES + seeds[0])  # not that of the perturbations: they would go hand in hand

    def uniform() -> Tensor:
        return 2 * torch.rand(BATCH, len(seeds), generator=generator, dtype=dtype) - 1

    def squares(x: Tensor, y: Tensor) -> Tensor:
        return (y[..., 0] - x.mT.square()).square().mean(1).sum()

    def train_loss(model: stn.STN, batch: Tensor, draw: stn.Draw) -> Tensor:
        for name in space.names if tuning.updates == 0 else ():
            draw.h[name]  # so that each counts as used
        ranges = plan.low + (plan.high - plan.low) * draw.m.detach().sigmoid()
        x = batch * ranges
        return squares(x, model(x.mT[..., None], draw))

    def valid_loss(model: stn.STN, batch: Tensor, draw: stn.Draw | None) -> Tensor:
        x = REACH * batch
        return squares(x, model(x.mT[..., None]))

    def check(gradients: Any) -> None:
        for gradient in gradients["values"] if plan.clip is not None else ():
            gradient.clamp_(-plan.clip, plan.clip)  # of each network on its own, as ``optimizer.clip_norm`` of a single one

    warm_rounds = -(-plan.warmup // plan.train_steps)
    adam = partial(Adam, betas=plan.weight_betas)
    cosine = partial(CosineAnnealingLR, T_max=plan.rounds) if plan.cosine else None
    falling: Any = cosine if plan.values_gamma is None else partial(ExponentialLR, gamma=plan.values_gamma)
    values_lr = 1e-30 if plan.frozen else plan.values_lr
    moving = partial(SGD, lr=values_lr) if plan.measured else partial(Adam, lr=values_lr, betas=plan.betas)
    settings = (plan.mode, plan.warmup, plan.train_steps, plan.valid_steps, plan.entropy, plan.update)
    tuning = stn.SelfTuning(
        model,
        train_loss,
        valid_loss,
        stn.SelfTuningSettings(*settings, measured=plan.measured, check_every=0),  # a check is of all networks together
        weights=OuterOptimizer(partial(adam, lr=plan.lr), cosine),
        response=None if plan.response_lr is None else OuterOptimizer(partial(adam, lr=plan.response_lr), cosine),
        values=OuterOptimizer(moving, falling),
        scales=partial(Adam, lr=1e-30 if plan.frozen else plan.scales_lr),
        seed=seeds[0],
    )

    def at_lam(x: Tensor) -> Tensor:
        return model(x.mT[..., None], space.draw(1, perturb=False))[..., 0] - x.mT.square()

    grid = torch.linspace(-REACH, REACH, 100, dtype=dtype)[:, None].expand(-1, len(seeds))
    found = Found([None] * len(seeds), [None] * len(seeds), [float("inf")] * len(seeds), last_tenth=[0.0] * len(seeds))
    for k in range(plan.rounds if plan.cosine else warm_rounds + plan.rounds):
        tuning.round(uniform, uniform, check=check)
        with torch.no_grad():
            errors = at_lam(grid)
            distance = errors.abs().amax(1).tolist()
            values = list(space.values().values())
            if trace is not None:
                train = at_lam(grid * torch.tensor(values, dtype=dtype) / REACH).square().mean(1).tolist()
                trace.append((values, list(space.scales().values()), train, errors.square().mean(1).tolist(), distance))
        for i, each in enumerate(distance):
            found.best[i] = min(found.best[i], each)
            if k >= plan.rounds - plan.rounds // 10:
                found.last_tenth[i] = max(found.last_tenth[i], each)
            if each < CLOSE and found.hit[i] is None and k >= warm_rounds:
                found.hit[i], found.at_hit[i] = k + 1 - warm_rounds, values[i]
        found.last, found.range, found.scale = distance, values, list(space.scales().values())
        if plan.stop and all(hit is not None for hit in found.hit):
            break
    return found

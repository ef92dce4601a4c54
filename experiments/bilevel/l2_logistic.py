"""One L2 per feature: ``experiment=l2_logistic`` beside hypertorch on the same rows, in the same process, in CPU seconds.

    pip install git+https://github.com/prolearner/hypertorch
    python experiments/bilevel/l2_logistic.py [--seeds 1 2 3] [--steps 1000]

hypertorch as its own example has it: T = 100 gradient steps of 0.1 from w = 0, ``reverse`` through the last K = 10 of them, SGD
with learning rate 1 and momentum 0.9, strengths kept above 1e-8. The target of a seed is the last validation loss that it
reaches.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import Row, built, save, spread, write_table
from torch.nn.functional import binary_cross_entropy_with_logits

from hyperopt.data.synthetic import Synthetic

T, K = 100, 10


def rival(seed: int, steps: int) -> Row:
    """The run of hypertorch."""
    import hypergrad

    torch.set_default_dtype(torch.float32)
    splits = Synthetic(seed=seed).load()
    x, y, xv, yv = splits.train.x, splits.train.y.float(), splits.val.x, splits.val.y.float()

    def step(params: list[torch.Tensor], hparams: list[torch.Tensor]) -> list[torch.Tensor]:
        (w,) = params
        loss = binary_cross_entropy_with_logits(x @ w, y) + (hparams[0] * w.square()).sum() / 2
        return [w - 0.1 * torch.autograd.grad(loss, w, create_graph=True)[0]]

    def outer(params: list[torch.Tensor], hparams: list[torch.Tensor]) -> torch.Tensor:
        losses.append(binary_cross_entropy_with_logits(xv @ params[0], yv))
        return losses[-1]

    losses: list[torch.Tensor] = []
    hparams = [torch.ones(splits.shape[0], requires_grad=True)]
    optimizer = torch.optim.SGD(hparams, lr=1.0, momentum=0.9)
    started = time.process_time()
    for _ in range(steps):
        history = [[torch.zeros(splits.shape[0], requires_grad=True)]]
        for _ in range(T):
            history.append(step(history[-1], hparams))
        optimizer.zero_grad()
        hypergrad.reverse(history[-K - 1 :], hparams, [step] * K, outer)
        optimizer.step()
        hparams[0].data.clamp_(min=1e-8)
        losses[-1] = losses[-1].detach()
    seconds = time.process_time() - started
    return {"first": float(losses[0]), "last": float(losses[-1]), "steps": steps, "seconds": seconds}


def ours(seed: int, target: float) -> Row:
    """The experiment, with the time at which the target is reached."""
    made = built("experiment=l2_logistic", f"seed={seed}")
    optimizer, losses, reached = made.optimizer.build(made.task.groups()), [], None
    started = time.process_time()
    for k in range(made.trainer.max_steps):
        losses.append(made.task.step(optimizer, lambda gradients: None).loss)
        if reached is None and losses[-1] <= target:
            reached = {"steps": k + 1, "seconds": time.process_time() - started}
    seconds = time.process_time() - started
    metrics = made.task.evaluate()
    found = {name: metrics[name] for name in ("val/loss", "val/accuracy", "test/loss", "test/accuracy")}
    return {"first": losses[0], "last": losses[-1], "steps": len(losses), "seconds": seconds, "reached": reached, **found}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    ours(1, 0.0)  # a warm-up
    rows = []
    lines = ["| seed | | first | last | outer steps | CPU s | CPU s to hypertorch's last |", "|---|---|---|---|---|---|---|"]
    for seed in options.seeds:
        theirs = rival(seed, options.steps)
        own = ours(seed, theirs["last"])
        rows.append({"seed": seed, "hypertorch": theirs, "ours": own})
        for name, row in (("hypertorch", theirs), ("`experiment=l2_logistic`", own)):
            to = row["reached"]["seconds"] if row.get("reached") else theirs["seconds"]
            cells = f"{row['first']:.4f} | {row['last']:.5f} | {row['steps']} | {row['seconds']:.2f} | {to:.2f}"
            lines.append(f"| {seed} | {name} | {cells} |")
            print(lines[-1], flush=True)
    ratio = {
        "whole": spread([row["hypertorch"]["seconds"] / row["ours"]["seconds"] for row in rows]),
        "to the same loss": spread([row["hypertorch"]["seconds"] / row["ours"]["reached"]["seconds"] for row in rows]),
    }
    print(ratio)
    save("l2_logistic", {"rows": rows, "times faster": ratio})
    write_table("l2_logistic", lines)


if __name__ == "__main__":
    main()

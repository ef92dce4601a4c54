"""20 newsgroups, one L2 per word: ``experiment=l2_20newsgroups`` and scikit-learn's logistic regression with its one C tuned.

    python experiments/bilevel/l2_20newsgroups.py [--seeds 0 1 2]

Both protocols for both: trained on the training half as the validation half has tuned it, and retrained on both halves at the
strengths so found. The number of outer steps is chosen by rows of the validation half that no strength is fitted to. CPU seconds
of one thread: of the outer steps, evaluations apart, and of scikit-learn's fits; loading the data apart.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import numpy as np
from common import Row, built, save, spread, write_table

from hyperopt.app.loop_state import LoopState
from hyperopt.data.splits import Rows
from hyperopt.tasks.linear import L2Task, joined

STRENGTHS = (10.0, 30.0, 100.0, 300.0)  # C


def ours(seed: int) -> Row:
    """The experiment, by the rules of its own trainer: the best step of the selection rows, and no more after ``patience``.

    ``hyperopt`` itself retrains at every evaluation; here that is done at the best step alone.
    """
    made = built("experiment=l2_20newsgroups", "task.retrain=false", f"seed={seed}")
    task, trainer, state = made.task, made.trainer, LoopState()
    assert isinstance(task, L2Task)
    optimizer, seconds, best = made.optimizer.build(task.groups()), 0.0, {}
    curve: list[Row] = []
    while state.stop_reason(trainer) is None:
        started = time.process_time()
        task.step(optimizer, lambda gradients: None)
        seconds += time.process_time() - started
        state.step, state.row = state.step + 1, {}
        if (state.step - 1) % trainer.eval_every == 0:
            if state.note(task.evaluate(), trainer):
                best = copy.deepcopy(task.state_dict())
            shown = ("outer/loss", "val/loss", "val/accuracy")
            curve.append({"step": state.step - 1, "seconds": seconds, **{key: state.row[key] for key in shown}})
            print(seed, curve[-1], flush=True)
    task.load_state_dict(best)
    found = {"best step": state.best_step, "objective": state.best_metrics["outer/loss"], "seconds": seconds, "curve": curve}
    return {**state.best_metrics, **found, **task.retrained(), "splits": task.splits}


def again(seed: int, steps: int) -> Row:
    """So many outer steps with the strengths fitted to the whole validation half."""
    made = built("experiment=l2_20newsgroups", "task.selection_rows=0", f"seed={seed}")
    task, started = made.task, time.process_time()
    assert isinstance(task, L2Task)
    optimizer = made.optimizer.build(task.groups())
    for _ in range(steps):
        task.step(optimizer, lambda gradients: None)
    seconds = time.process_time() - started
    found = task.evaluate()
    return {"steps": steps, "objective": found["outer/loss"], "seconds": seconds, **found}


def theirs(splits: Any) -> Row:
    """scikit-learn's logistic regression on the same rows, C chosen by the validation accuracy."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    def matrix(rows: Rows) -> csr_matrix:
        x = rows.x.to_sparse_csr() if rows.x.layout != rows.x.to_sparse_csr().layout else rows.x
        parts = (x.values().numpy().astype(np.float64), x.col_indices().numpy(), x.crow_indices().numpy())
        return csr_matrix(parts, shape=tuple(x.shape))

    def fit(rows: Rows, strength: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(C=strength, max_iter=200).fit(matrix(rows), rows.y.numpy())

    val, test = matrix(splits.val), matrix(splits.test)
    started, candidates = time.process_time(), []
    for strength in STRENGTHS:
        model = fit(splits.train, strength)
        found = {"C": strength, "val/accuracy": model.score(val, splits.val.y.numpy())}
        found["test/accuracy"] = model.score(test, splits.test.y.numpy())
        candidates.append(found)
        print(found, flush=True)
    best = max(candidates, key=lambda row: row["val/accuracy"])
    tuned = time.process_time() - started
    whole = fit(joined(splits.train, splits.val), best["C"]).score(test, splits.test.y.numpy())
    return {**best, "candidates": candidates, "seconds": tuned, "retrained/accuracy": whole}


SHOWN = {
    "chosen": "`experiment=l2_20newsgroups`: the number of steps chosen",
    "whole": "as many steps, fitted to the whole validation half",
    "scikit-learn": "scikit-learn, one C",
}


def report(rows: list[Row]) -> None:
    """Write the results of some seeds, and their table."""
    lines = ["| | objective | selected on | test, trained on half | test, retrained on all | CPU s |", "|---" * 6 + "|"]
    means: Row = {}
    for name, shown in SHOWN.items():
        keys = ("objective", "val/accuracy", "test/accuracy", "retrained/accuracy", "seconds")
        parts = [row[name] for row in rows]
        means[name] = found = {key: spread([part[key] for part in parts]) for key in keys if key in parts[0]}
        objective = f"{found['objective']['mean']:.3f}" if "objective" in found else ""
        selected = "" if name == "whole" else f"{100 * found['val/accuracy']['mean']:.1f} %"  # there it is what is fitted
        tests = [f"{100 * found[key]['mean']:.1f} %" for key in ("test/accuracy", "retrained/accuracy")]
        lines.append(f"| {shown} | {objective} | {selected} | {' | '.join(tests)} | {found['seconds']['mean']:.0f} |")
    print("\n".join(lines))
    save("l2_20newsgroups", {"means": means, "rows": rows})
    write_table("l2_20newsgroups", lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    rows: list[Row] = []
    for seed in options.seeds:
        chosen = ours(seed)
        splits = chosen.pop("splits")
        rows.append({"seed": seed, "chosen": chosen, "whole": again(seed, chosen["best step"] + 1)})
        print(seed, rows[-1], flush=True)
        rows[-1]["scikit-learn"] = theirs(splits)
        print(seed, rows[-1]["scikit-learn"], flush=True)
    report(rows)


if __name__ == "__main__":
    main()

"""Does it hold? Twenty seeds of ``experiment=stn_quadratic`` from four ranges, with each rate halved and doubled.

    python experiments/stn/stability.py [--only NAME ...] [--scheduled] [--seeds N]

A run holds if the largest error on [-2, 2] is below 0.05 in every round of the last tenth. No setting was chosen on these seeds.
All networks of a row are trained together, see ``stacked.py``. ``--scheduled`` measures the same for the tuned schedule.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from stacked import CLOSE, Plan, study
from tables import save, write_table

from hyperopt.stn.rates import BETAS

SEEDS = list(range(3000, 3020))
STARTS = (0.5, 2.0, 5.0, 9.0)
FILE = "results_stability.json"
LENGTH: dict[str, Any] = {"rounds": 500, "stop": False, "dtype": "float32"}
RATES: dict[str, Any] = {"lr": 0.008, "response_lr": 0.016, "weight_betas": BETAS, "values_lr": 0.4}
MEASURED = Plan(measured=True, cosine=True, values_gamma=None, clip=None, **RATES, **LENGTH)
SCHEDULED = Plan(**LENGTH)


def varied(plan: Plan) -> dict[str, Plan]:
    """The plan with each of its rates halved and doubled; what is not named stays."""
    found, response = {"as it is": plan}, plan.response_lr or plan.lr
    for factor, word in ((0.5, "halved"), (2.0, "doubled")):
        found[f"hyperparameters {word}"] = replace(plan, values_lr=factor * plan.values_lr)
        found[f"weights {word}"] = replace(plan, lr=factor * plan.lr, response_lr=response)
        found[f"response {word}"] = replace(plan, response_lr=factor * response)
    return found


PLANS = varied(MEASURED) | {f"tuned schedule, {name}": plan for name, plan in varied(SCHEDULED).items()}


def table(results: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    lines = [f"| rates | {' | '.join(f'from {start:g}' for start in STARTS)} |", f"|---|{'---|' * len(STARTS)}"]
    for name in PLANS:
        if name in results:
            cells = []
            for start in STARTS:
                each = results[name]["starts"][f"{start:g}"]
                low, high = each["range"]
                cells.append(f"{each['hold']} of {each['of']} ({each['worst']:.3f}; {low:.1f} to {high:.1f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="rows to measure")
    parser.add_argument("--scheduled", action="store_true", help="the rows of the tuned schedule too")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first N seeds only")
    args = parser.parse_args()
    seeds = SEEDS[: args.seeds]
    torch.set_num_threads(1)
    names = args.only or [name for name in PLANS if args.scheduled or not name.startswith("tuned schedule")]
    for name in names:
        started = time.process_time()
        found = study(seeds * len(STARTS), PLANS[name], starts=[start for start in STARTS for _ in seeds])
        row: dict[str, Any] = {"plan": asdict(PLANS[name]), "seconds": time.process_time() - started, "starts": {}}
        for k, start in enumerate(STARTS):
            part = slice(k * len(seeds), (k + 1) * len(seeds))
            errors, ranges = found.last_tenth[part], found.range[part]
            row["starts"][f"{start:g}"] = {
                "hold": sum(error < CLOSE for error in errors),
                "of": len(seeds),
                "worst": max(errors),
                "range": [min(ranges), max(ranges)],
                "errors": errors,
                "ranges": ranges,
            }
        results = save(FILE, name, row)
        print("\n".join(table({name: results[name]})[2:]), f"{row['seconds']:.0f} s", flush=True)
        write_table("stability", table(results))


if __name__ == "__main__":
    main()

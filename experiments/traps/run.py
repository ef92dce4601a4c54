"""Put this library and its rivals to the traps, each in an environment of its own; write results.json and the README's table.

    python experiments/traps/run.py [ours torchdeq xitorch ...] [--envs DIR] [--traps 1 5 ...] [--dry]

An environment is made where there is none, under ``outputs/traps/envs`` (git ignores it), by pip from the package index, in the
latest version that it offers. The environments of the libraries on torch see the packages of the running interpreter through a
.pth file, so that torch is not installed five times; those on JAX share one that sees nothing. ``ours`` runs in the interpreter
itself. Results of libraries that are not named are kept. ``--dry`` prints and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))

from environments import Environment, interpreter  # noqa: E402
from traps import TRAPS  # noqa: E402

JAX = Environment("jax", ("jax", "jaxopt", "optimistix"), False)
LIBRARIES: dict[str, Environment | None] = {
    "ours": None,
    "torchdeq": Environment("torchdeq", ("torchdeq",), True),
    "xitorch": Environment("xitorch", ("xitorch",), True),
    "torchopt": Environment("torchopt", ("torchopt",), True),
    "jaxopt": JAX,
    "optimistix": JAX,
    "betty": Environment("betty", ("betty-ml",), True),
}
MARKS = {"pass": "pass", "fail": "**fail**", "not applicable": "-", "error": "error"}


def measure(library: str, folder: Path, traps: list[int]) -> dict[str, Any]:
    """Run a library's script; its versions and outcomes."""
    environment = LIBRARIES[library]
    python = Path(sys.executable) if environment is None else interpreter(environment, folder)
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    if environment is None:
        settings["PYTHONPATH"] = str(ROOT)
    command = [str(python), str(HERE / f"{library}_traps.py"), *map(str, traps)]
    done = subprocess.run(command, env=settings, cwd=ROOT, text=True, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    missing = len(lines) - 1 < (len(traps) or len(TRAPS))
    if done.returncode or missing or any(line.get("verdict") == "error" for line in lines):
        print(done.stderr, file=sys.stderr)
    if done.returncode or missing:
        raise SystemExit(f"{library}: {command} ended with {done.returncode} after {len(lines)} lines")
    return {"versions": lines[0]["versions"], "outcomes": lines[1:]}


def table(libraries: dict[str, Any]) -> str:
    """Traps by libraries, in Markdown."""
    names = [name for name in LIBRARIES if name in libraries]
    lines = [f"| trap | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for trap in TRAPS:
        cells = [cell(found) for name in names for found in libraries[name]["outcomes"] if found["trap"] == trap.number]
        lines.append(f"| {trap.number}. {trap.name} | {' | '.join(cells)} |")
    counts = [count(libraries[name]["outcomes"]) for name in names]
    return "\n".join([*lines, f"| passed, of those that apply | {' | '.join(counts)} |"])


def cell(outcome: dict[str, Any]) -> str:
    """The verdict and the number that is nearest to, or farthest beyond, its limit."""
    trap = next(trap for trap in TRAPS if trap.number == outcome["trap"])
    limits, worst, shown = trap.limits, -1.0, ""
    for name, value in outcome["numbers"].items():
        if outcome["verdict"] == "fail" and outcome["said"] and name not in trap.firm:
            continue  # excused: it is not what failed
        if value is None:  # not finite
            worst, shown = float("inf"), "not finite"
        elif (excess := value / limits[name] if limits[name] else value * 1e9) > worst:
            worst, shown = excess, f"{value:.0f}" if value == int(value) and value < 1e6 else f"{value:.2g}"
    mark = MARKS[outcome["verdict"]]
    said = " (said)" if outcome["verdict"] == "pass" and outcome["said"] and not 0 <= worst <= 1 else ""
    return f"{mark}{said} {shown}".strip()


def count(outcomes: list[dict[str, Any]]) -> str:
    """How many were passed, of how many that apply."""
    return f"{sum(x['verdict'] == 'pass' for x in outcomes)} of {sum(x['verdict'] != 'not applicable' for x in outcomes)}"


def details(libraries: dict[str, Any]) -> str:
    """What was done and seen, a table for each library, in Markdown."""
    lines = []
    for name in (name for name in LIBRARIES if name in libraries):
        versions = ", ".join(f"{package} {version}" for package, version in libraries[name]["versions"].items())
        lines += [
            f"\n### {name} ({versions})\n",
            "| trap | what was done, or why not; remarks | numbers | what the library reported |",
        ]
        lines.append("|---|---|---|---|")
        for outcome in libraries[name]["outcomes"]:
            numbers = [f"{key} {'not finite' if x is None else format(x, '.3g')}" for key, x in outcome["numbers"].items()]
            done = "; ".join(filter(None, (outcome["reason"] or outcome["did"], outcome["remark"])))
            text = " | ".join(
                each.replace("|", "\\|").replace("<", "\\<")
                for each in (f"{outcome['trap']} {outcome['verdict']}", done, "; ".join(numbers), outcome["said"])
            )
            lines.append(f"| {text} |")
    return "\n".join(lines)


def criteria() -> str:
    """What each trap asks, in Markdown."""
    lines = []
    for trap in TRAPS:
        limits = ", ".join(f"{limit:g} ({name})" for name, limit in trap.limits.items())
        lines.append(
            f"{trap.number}. **{trap.name}**: {trap.criterion} The limit{'s are' if len(trap.limits) > 1 else ' is'} {limits}."
        )
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    """results.json, and the parts of README.md between its marks."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    found = results["libraries"]
    for mark, body in (("table", table(found)), ("traps", criteria()), ("details", details(found))):
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        text = text[: text.index(begin) + len(begin)] + body + "\n" + text[text.index(end) :]
    readme.write_text(text)


def main() -> None:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", help=f"some of {', '.join(LIBRARIES)} (default: all)")
    parser.add_argument("--envs", type=Path, default=ROOT / "outputs/traps/envs", help="where the environments are made")
    parser.add_argument("--traps", type=int, nargs="*", default=[], help="only these, and write nothing")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    unknown = set(options.libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(LIBRARIES)}")
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"libraries": {}}
    for library in options.libraries or LIBRARIES:
        found = measure(library, options.envs.resolve(), options.traps)
        found["date"] = datetime.date.today().isoformat()
        results["libraries"][library] = found
        print(f"{library}: {count(found['outcomes'])}", file=sys.stderr)
    results["python"], results["machine"] = platform.python_version(), platform.machine()
    if options.traps or options.dry:
        chosen = {name: results["libraries"][name] for name in options.libraries or LIBRARIES}
        print(details(chosen))
    else:
        write(results)
        print(table(results["libraries"]))


if __name__ == "__main__":
    main()

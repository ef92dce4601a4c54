"""What a first day on a GPU has to tell, in one command of at most 8 minutes.

    python experiments/gpu/run.py [--out FILE]
    python experiments/gpu/run.py --device cpu --small --out FILE      to see that the script itself works

Parts, in this order: ``right``, ``counts``, ``equilibrium``, ``deq`` and ``trained`` of ``measures.py``, and ``tests``, which are
those marked ``gpu``. The file is written after every part, so that a part that fails or runs out of time, and then says so under
``error``, costs only itself; the exit status is then 1. A file that exists is never written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch
from measures import PARTS, Row
from shared import REPOSITORY, save

from hyperopt.app.repro import run_facts

ALL = [*PARTS, "tests"]


def facts(device: torch.device, small: bool) -> Row:
    """When, on what and with which versions."""
    found = run_facts(device)
    kept = {key: found[key] for key in ("started", "git", "versions", "device")}
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        kept["device"] |= {"capability": f"{chip.major}.{chip.minor}", "bytes": chip.total_memory}
        kept["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return kept | {"small": small}


def tests(seconds: float) -> Row:
    """How many of the tests marked ``gpu`` passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and without a report: {(done.stderr or done.stdout)[-500:]}")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    number = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    passed = number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    found = {"passed": passed, "failed": number["failures"] + number["errors"], "skipped": number["skipped"]}
    return found | ({"output": done.stdout[-4000:]} if found["failed"] else {})


def measure(part: str, device: torch.device, small: bool, end: float) -> Row:
    """The rows of one part, those before a failure included."""
    rows: list[Row] = []
    begin = time.monotonic()
    found: Row = {}
    try:
        if part == "tests":
            found = tests(max(60.0, end - begin))
        else:
            found = {"rows": rows}
            making = PARTS[part](device, small)
            while time.monotonic() < end:
                row = next(making, None)
                if row is None:
                    break
                rows.append(row)
                print(part, row, flush=True)
            else:
                raise TimeoutError("the time was over, so rows may be missing; raise --seconds, or choose fewer --parts")
    except Exception as error:  # the other parts are still worth having
        found["error"] = f"{type(error).__name__}: {error}"[:1000]
    return found | {"took": time.monotonic() - begin}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--out", type=Path, help="a new file (default: results.json here, for a GPU at full size)")
    parser.add_argument("--parts", nargs="+", default=ALL, choices=ALL, metavar="PART", help=f"of {', '.join(ALL)}")
    parser.add_argument("--seconds", type=float, default=400, help="after which no further row is begun")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; give --device cpu --small --out FILE to try the script")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if options.out is None and (device.type != "cuda" or options.small):
        parser.error("give --out FILE: results.json here is for a GPU at full size")
    out = options.out or Path(__file__).with_name("results.json")
    if out.exists():
        parser.error(f"{out} exists; give another file with --out")
    end = time.monotonic() + options.seconds
    save(out, "facts", facts(device, options.small))
    failed = []
    for part in options.parts:
        found = measure(part, device, options.small, end)
        save(out, part, found)
        if found.get("error") or found.get("failed"):
            failed.append(part)
        print(f"{part}: {found['took']:.1f} s", found.get("error", ""), flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {out}")


if __name__ == "__main__":
    main()

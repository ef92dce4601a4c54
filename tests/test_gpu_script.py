"""The experiment for a GPU runs on the CPU with small sizes, and writes what its page says."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "gpu" / "run.py"
COMPARED = {"case", "seconds", "seconds alone", "ratio", "peak bytes"}
SOLVED = {"status", "iterations", "residual"}
FIELDS = {
    "right": {"case", "difference"},
    "counts": {"case", "kernels", "host reads", *SOLVED},
    "equilibrium": {*COMPARED, "rows", "dim", "precision", "peak states"},
    "deq": {*COMPARED, "evaluations", "products", "forward", "adjoint"},
    "trained": {*COMPARED, "weights", "hessian products", "hypergradient"},
}


def numbers(tree):
    """All numbers in a tree."""
    if isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(each)
    elif isinstance(tree, int | float):
        yield tree


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    monkeypatch.setenv("PYTEST_ADDOPTS", "tests/nn/test_regularise.py tests/data/test_data.py")  # some of those marked gpu
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found) == ["facts", *FIELDS, "tests"] and all(map(math.isfinite, numbers(found)))
    facts = found["facts"]
    assert facts["small"] and facts["started"] and facts["versions"]["torch"] and facts["device"]["name"] == "cpu"
    for part, fields in FIELDS.items():
        assert found[part]["rows"] and all(fields <= set(row) for row in found[part]["rows"]), part
    assert all(row["difference"] < 1e-9 for row in found["right"]["rows"])
    assert {row["status"] for row in found["counts"]["rows"]} == {"converged", "fixed_steps"}
    assert all(row["host reads"] == 0 for row in found["counts"]["rows"] if row["status"] == "fixed_steps")
    assert all(value["seconds"] > 0 and value["peak bytes"] > 0 for part in list(FIELDS)[2:] for value in found[part]["rows"])
    first, second = (row["hypergradient"] for row in found["trained"]["rows"])
    assert first == pytest.approx(second, rel=1e-2)  # by conjugate gradients and by the Neumann series
    assert found["tests"]["failed"] == 0 and found["tests"]["passed"] + found["tests"]["skipped"] > 0


@pytest.mark.slow
def test_a_part_without_time_says_so_and_a_file_that_exists_is_not_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))

    def run(*options):
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), "--device", "cpu", "--small", "--out", str(out), "--parts", "counts", *options]
        )
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code

    assert run("--seconds", "0") == f"failed: counts; see {out}"
    text = out.read_text()
    found = json.loads(text)["counts"]
    assert found["rows"] == [] and "raise --seconds" in found["error"]
    assert run() == 2 and f"{out} exists; give another file with --out" in capsys.readouterr().err
    assert out.read_text() == text

"""What a wheel would carry, and that README, CI and pyproject say the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from hyperopt import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPT = """
import sys
import hyperopt, hyperopt.nn, hyperopt.stn, hyperopt.spaces, hyperopt.tasks, hyperopt.app
from hyperopt.app.resolvers import config_path

print(hyperopt.__version__, "torch" in sys.modules, config_path(), hyperopt.Picard(), sep="\\n")
"""


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == __version__


def test_the_readme_has_the_test_command_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^<!-- test-command -->\n```bash\n(.*?)\n```$", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md: no bash block after <!-- test-command -->"
    assert block[1].splitlines() == ['pip install -e ".[test]"', "python -m pytest"]


@pytest.mark.slow
def test_an_installed_command_finds_its_configs(tmp_path: Path) -> None:
    # Borrows this environment's dependencies and pip through a .pth file, and installs a copy of the project for real: a build
    # leaves files beside the source.
    source = tmp_path / "hyperopt"  # as a clone is called: its parent folder must not hide the package
    made = shutil.ignore_patterns(".*", "build", "data", "outputs", "multirun", "*.egg-info")  # at the top; hyperopt/data stays
    cached = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT, source, ignore=lambda at, names: cached(at, names) | (made(at, names) if Path(at) == ROOT else set()))
    venv.create(tmp_path / "venv")
    python, command = (tmp_path / "venv" / "bin" / name for name in ("python", "hyperopt"))
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def output(*argv: str | Path) -> str:
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def assert_installed_at(configs: Path) -> None:
        (tmp_path / "script.py").write_text(SCRIPT)  # beside the folder that is called as the package
        version, torch, where, solver = output(python, tmp_path / "script.py").splitlines()
        assert (version, torch, where) == (__version__, "False", str(configs)) and "Picard" in solver
        composed = output(command, "--cfg", "all", "experiment=equilibrium_mnist")
        assert "name: equilibrium_mnist" in composed and "GridSweeper" in composed

    output(python, "-m", "pip", "install", "-q", "--no-deps", "-e", source)
    assert_installed_at(source / "configs")  # the other tests run commands of an editable installation
    output(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source)
    output(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *tmp_path.glob("*.whl"))
    shutil.rmtree(source)
    assert_installed_at(site / "hyperopt" / "configs")
    assert "anderson, broyden" in output(command, "--help")
    output(command, "debug=default", "device=cpu")
    assert list(tmp_path.glob("outputs/train/*/summary.json"))

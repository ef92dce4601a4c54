"""Virtual environments for other libraries, each made by one command where there is none.

A script finds this module by the line ``sys.path.append(str(Path(__file__).resolve().parents[1]))``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what is installed, and whether it sees the running interpreter's torch."""

    name: str
    packages: tuple[str, ...]
    base: bool


def interpreter(environment: Environment, folder: Path) -> Path:
    """The environment's Python; makes the environment where there is none."""
    place = folder / environment.name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = place / "installed"
    if not done.exists():
        print(f"making {place}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        if environment.base:
            code = "import sysconfig; print(sysconfig.get_path('purelib'))"
            site = subprocess.run([python, "-c", code], check=True, text=True, capture_output=True).stdout.strip()
            (Path(site) / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *environment.packages], check=True)
        done.touch()
    return python

"""What no file and no run may do; each other refusal has its test beside what it is about.

Pickles: ``test_checkpoint.py``, ``test_exporting.py``, ``test_data_cifar.py``, ``test_data_rows.py``.
Targets: ``test_config.py``, ``test_exporting``.
What a report shows: ``test_report.py``.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from launcher import Launcher

from hyperopt import load_exported
from hyperopt.app.export.write import export
from hyperopt.app.report.command import report


def test_no_connection_is_opened(command: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))  # pyright: ignore[reportArgumentType]
    assert command("debug=default", "device=cpu", "hydra.run.dir=mine").status == 0
    report([tmp_path / "mine"], tmp_path / "report")
    load_exported(export(tmp_path / "mine")[0])
    assert tried == []

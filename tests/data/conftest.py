"""What the sources of datasets are tried with: a local web server in the place of the datasets' own, or no network."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hyperopt.data import mnist


@dataclass
class LocalServer:
    """A server of one directory: where it is, and the path of every request."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)


class Server(http.server.ThreadingHTTPServer):
    """Says nothing when torchvision hangs up on the answer that tells it where a file is."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Serve ``tmp_path / "served"``."""
    found = LocalServer(tmp_path / "served")
    found.folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            found.asked.append(self.path)

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(found.folder))) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        found.url = f"http://127.0.0.1:{running.server_port}/"
        yield found
        running.shutdown()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both network sources fail at once, the one for want of a name server, the other of an index."""

    def no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def no_index(command: list[str], **_: object) -> Any:
        return types.SimpleNamespace(returncode=1, stdout="", stderr="ERROR: no matching distribution found")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(mnist.subprocess, "run", no_index)

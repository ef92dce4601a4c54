"""A local web server in the place of the datasets' own."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


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

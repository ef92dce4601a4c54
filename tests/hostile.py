"""What a row of the tables of hostile inputs asserts: that an input ends as a short refusal, and that nothing else happened.

A ``Place`` is a directory of a row's own. Outside of ``work`` it has a canary, a file that must keep its bytes, and a mark that
only code from the input would write. A row is refused when the act raises (or the command prints) a short message in a short
time, the canary and the mark are as they were, and no file under the place was written, emptied, removed or added that the row
does not name.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

CANARY = b"the user's own file\n" * 50


@dataclass
class Place:
    """Where one row acts."""

    root: Path
    work: Path = field(init=False)
    canary: Path = field(init=False)
    mark: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work, self.canary, self.mark = self.root / "work", self.root / "canary.txt", self.root / "mark"
        self.work.mkdir(parents=True)
        self.canary.write_bytes(CANARY)

    def listing(self) -> dict[str, str]:
        """Every file and link under the place, with a checksum of its bytes or where it leads."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_symlink():
                found[name] = f"link to {path.readlink()}"
            elif path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif not path.is_dir():
                found[name] = "special"
        return found


@dataclass(frozen=True)
class Refused:
    """How an act ended: its message and its seconds."""

    message: str
    seconds: float


def assert_refused(
    place: Place,
    act: Callable[[], str],
    *,
    words: Collection[str] = (),
    lines: int = 1,
    seconds: float = 30.0,
    may_write: Collection[str] = (),
) -> Refused:
    """Assert that ``act`` is refused and that nothing else happened.

    Args:
        place: prepared.
        act: does it, and returns the message of the refusal (empty: it was not refused).
        words: each is in the message.
        lines: at most, of the message.
        seconds: at most; what hangs takes far longer, and a busy machine less.
        may_write: files that may appear or change, relative to the place (a lock that was taken and given back, say).
    """
    before = place.listing()
    started = time.perf_counter()
    message = act().strip()
    took = time.perf_counter() - started
    assert place.canary.read_bytes() == CANARY, "the canary was changed"
    assert not place.mark.exists(), "code from the input was run"
    after = place.listing()
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)} - set(may_write)
    assert not changed, f"files were changed: {sorted(changed)}"
    assert message, "the input was not refused"
    assert len(message.splitlines()) <= lines, f"{len(message.splitlines())} lines: {message}"
    assert "\x1b" not in message, "an escape sequence reaches the terminal"
    assert all(word in message for word in words), message
    assert took < seconds, f"took {took:.1f} s"
    return Refused(message, took)

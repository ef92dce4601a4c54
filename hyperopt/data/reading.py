"""Reading of files that a run wrote: as plain data, within limits, with one-line errors that name the file.

A run directory may come from someone else. YAML is therefore read without aliases (a few hundred bytes of them can stand for
more data than any memory holds), anchors and tags, and JSON without the numbers NaN and Infinity. Both have limits on size and
depth that no real file reaches. Nothing in a file is resolved, imported or called. This module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LARGEST = 4_000_000
"""Bytes of a summary, or of one row of metrics; real ones have some thousands."""
LARGEST_YAML = 300_000
MOST = 20_000
"""Characters and values of one YAML file, which is slow to parse; real ones have some thousands and some hundreds."""
LARGEST_ROWS = 4_000_000_000
"""Bytes of all rows of metrics; a million steps of sixty numbers take a quarter of it."""
DEEPEST = 50
"""Levels of nesting; real files have about ten."""


class UnreadableError(ValueError):
    """A file is not what it should be: too large, damaged, or not only plain data. The message names the file."""


class DataError(RuntimeError):
    """A dataset is missing, unreachable or not what it should be; the message names the file and the key to change."""


class _Loader(yaml.SafeLoader):
    """Plain YAML: mappings, lists, strings, numbers, booleans and null."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse what plain data does not need, before anything is built from it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UnreadableError("has an anchor or an alias (& or *)")
        if getattr(event, "tag", None) is not None:
            raise UnreadableError(f"has a tag ({event.tag[:40]!r})")
        self.nodes += 1
        if self.nodes > MOST:
            raise UnreadableError(f"has more than {MOST} values")
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnreadableError(f"is nested more than {DEEPEST} levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that occurs twice, since readers differ on which of its values counts."""
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise UnreadableError("has a key twice in one mapping")
        return found


# Numbers as in YAML 1.2 and OmegaConf, where 1e-05 is a number too. Dates remain text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Return the mapping in a YAML text, as plain data.

    Args:
        text: the whole text.
        where: what to call it in an error.

    Raises:
        UnreadableError: the text is too long, not YAML, not a mapping with names as keys, or has aliases, anchors or tags.
    """
    if len(text) > LARGEST_YAML:
        raise UnreadableError(f"{where} has {len(text)} characters, more than {LARGEST_YAML}")
    try:
        found = yaml.load(text, _Loader)
    except UnreadableError as error:
        raise UnreadableError(f"{where} {error}, which no file of a run has") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{where} is not YAML, or is damaged ({type(error).__name__})") from error
    return _mapping(found, where)


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        UnreadableError: the text is too long, not JSON, not an object, or nested too deeply.
    """
    if len(text) > LARGEST:
        raise UnreadableError(f"{where} has {len(text)} characters, more than {LARGEST}")
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{where} is not JSON, or is damaged") from error
    return _mapping(found, where)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _mapping(found: Any, where: str) -> dict[str, Any]:
    """Refuse what is not a mapping with text as keys, at any level."""
    if not isinstance(found, dict):
        raise UnreadableError(f"{where} holds no mapping of names to values")
    stack: list[tuple[Any, int]] = [(found, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > DEEPEST:
            raise UnreadableError(f"{where} is nested more than {DEEPEST} levels deep")
        if isinstance(node, dict):
            if odd := [key for key in node if not isinstance(key, str | int)]:
                raise UnreadableError(f"{where} has the key {odd[0]!r}, which cannot be a name")
            stack += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in node]
    return found


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the bytes of a regular file; a device, a pipe or a socket is not read.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a regular file, is larger than ``largest``, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):  # before fdopen, whose own error for a directory would be different
        os.close(handle)
        raise UnreadableError(f"{path} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        if facts.st_size > largest:
            raise UnreadableError(f"{path} has {facts.st_size} bytes, more than {largest}")
        return file.read(facts.st_size)  # not more, since memory is reserved for all that is asked for


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return a text file, read as by ``read_bytes``.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: as for ``read_bytes``, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is not text") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; errors are those of ``read_text`` and ``parse_yaml``."""
    return parse_yaml(read_text(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; errors are those of ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one in each line; an unfinished last line is still being written and is left out.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: as for ``read_text``, or a line is not an object; the message names the line.
    """
    whole, _, _ = read_text(path, LARGEST_ROWS).rpartition("\n")
    for n, line in enumerate(whole.split("\n") if whole else (), 1):
        yield parse_json(line, f"{path}, line {n},")

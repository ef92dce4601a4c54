"""Errors of the command line in a few lines: what is wrong, what was probably meant, and the choices."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Mapping

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from hyperopt.core.text import printable

HIDDEN = ("hydra", "schema")
MANY = 40  # choices are not listed beside near ones


def near(word: str, choices: Iterable[str]) -> str:
    """Return ``did you mean ...? choices: ...`` for a word that is not one of ``choices``; of very many, the near ones alone."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else ""
    return hint if close and len(known) > MANY else f"{hint} choices: {', '.join(known) or 'none'}".lstrip()


def explain(error: BaseException, keys: Mapping[str, str] | None = None) -> str | None:
    """Return a message for an error that a user can fix on the command line, and None for others, which need a traceback.

    Args:
        error: an error from composing, checking or running a job. Text that it quotes may come from a file and is escaped.
        keys: for names of classes and arguments in the library's messages, the option that sets them on the command line. The
            options of names that occur are added to the message.
    """
    message = _message(error)
    return None if message is None else printable(with_keys(message, keys or {}), keep="\n")


def with_keys(message: str, keys: Mapping[str, str]) -> str:
    """Return a message followed by ``keys_in`` of it."""
    return "\n".join(filter(None, (message, keys_in(message, keys))))


def keys_in(message: str, keys: Mapping[str, str]) -> str:
    """Return a line with the options of all names of ``keys`` in a message, empty if there are none; see ``explain``."""
    named = [f"{name} is {key}" for name, key in keys.items() if re.search(rf"(?<![\w.]){name}\b", message)]
    return f"on the command line: {', '.join(named)}" if named else ""


def _message(error: BaseException) -> str | None:
    """Return the message before options are added."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, and quote what the shell would take apart\n{error.message}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        if type(chain[-1]).__module__.startswith("hyperopt."):
            return str(chain[-1])
        for link in chain:
            if isinstance(link, ConfigKeyError | ConfigAttributeError) and link.parent_node is not None:
                return _unknown_key(link)
        return "\n".join(dict.fromkeys(_tidy(str(link)) for link in chain))
    by_hydra = isinstance(error, ValueError) and _raised_in(error).startswith("hydra.")
    return str(error) if by_hydra or type(error).__module__.startswith("hyperopt.") else None


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised ``error``."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _missing_option(error: MissingConfigException) -> str:
    """Say which option a group does not have, and which options it has."""
    group, _, option = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    if not group or error.options is None:
        return _tidy(str(error))
    return f"{group}={option}: {group} has no option {option!r}; {near(option, error.options)}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    """Say which key a node does not have, and which keys it has."""
    key, node = str(error.key), error.parent_node
    path = str(error.full_key or key)
    where = path.rpartition(".")[0]
    keys = [str(name) for name in node if name not in HIDDEN and name != "_target_"] if OmegaConf.is_dict(node) else []
    if not where:
        return f"{path}: there is no such group or key; {near(key, keys)}"
    return f"{path}: {where} has no key {key!r}; {near(key, keys)}"


def _tidy(text: str) -> str:
    """Drop OmegaConf's lines about internals."""
    internal = ("reference_type", "object_type")
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.strip().startswith(internal))

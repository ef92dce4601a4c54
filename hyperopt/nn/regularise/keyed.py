"""The keys of the batch under way, for layers inside of a network that draw by an example's own number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from hyperopt.core.random import Keys

_KEYS: ContextVar[Keys | None] = ContextVar("keys", default=None)


@contextlib.contextmanager
def keyed(keys: Keys) -> Iterator[None]:
    """Let the layers of every network that is called in this block draw by these keys."""
    token = _KEYS.set(keys)
    try:
        yield
    finally:
        _KEYS.reset(token)


def current_keys(who: str) -> Keys:
    """The keys of the innermost block.

    Raises:
        RuntimeError: there is no block around; names ``who`` asked.
    """
    keys = _KEYS.get()
    if keys is None:
        raise RuntimeError(
            f"{who} draws by the numbers of the examples, and nobody gave them: call the network inside of "
            "'with hyperopt.nn.regularise.keyed.keyed(Keys(index, seed, epoch)):', or in eval mode"
        )
    return keys

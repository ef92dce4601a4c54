"""Reading a pickle of plain containers, text, numbers and arrays of them, and nothing else.

``pickle.load`` runs whatever a file says. Here the only names that a file can reach are three stand-ins: two take what numpy
writes for an array and keep it, and one is scikit-learn's dictionary with attributes, without the attributes. Neither library is
called, so what its own unpickling can be made to do is out of reach too. Call it on bytes whose checksum is right all the same.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np

from hyperopt.core.text import one_line
from hyperopt.data.errors import DataError


class _Dtype:
    """Stands for ``numpy.dtype``: of unsigned bytes, whole numbers or text."""

    def __init__(self, code: Any, *_: Any) -> None:
        """Refuse every other; a string of Python 2 is bytes."""
        if not re.fullmatch("u1|i8|U[0-9]{1,4}", text := _text(code)):
            raise pickle.UnpicklingError(f"an array of {text!r}, not of unsigned bytes, whole numbers or text")
        self.dtype = np.dtype(f"<{text}")

    def __setstate__(self, state: Any) -> None:
        """Take the byte order; there are no fields."""
        if _text(state[1]) not in "<|":
            raise pickle.UnpicklingError(f"an array in the byte order {state[1]!r}")


class _Array:
    """Stands for ``numpy.ndarray`` and for the function that numpy makes an empty one with.

    Every stand-in is a class with ``__setstate__``: the BUILD instruction sets attributes on whatever has none.
    """

    values: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Take ``(version, shape, dtype, fortran order, bytes)``; old versions of numpy write no version."""
        shape, dtype, fortran, data = state[-4:]
        if not isinstance(dtype, _Dtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize * math.prod(shape):
            raise pickle.UnpicklingError(f"an array of shape {shape!r} with other contents")
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _Bunch(dict[Any, Any]):
    """Stands for scikit-learn's dictionary."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes."""


class _Unpickler(pickle.Unpickler):
    """An unpickler of containers, numbers, strings, bytes and arrays."""

    known = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,  # as numpy 2 writes it
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("sklearn.utils._bunch", "Bunch"): _Bunch,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in, or refuse."""
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dataset does not need")
        return self.known[module, name]


def unpickle(data: bytes, name: str) -> dict[str, Any]:
    """Return the dictionary that a pickle holds.

    Args:
        data: the whole file, as Python 2 or 3 writes it.
        name: what to call it in an error.

    Returns:
        The values by key. An array is a read-only view; strings of Python 2 are bytes, save the keys themselves.

    Raises:
        DataError: no pickle, one of something else, or one that asks for any other class or function.
    """
    try:
        tree = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if isinstance(tree, dict):
            return _plain(tree)
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise DataError(f"{name}: refused, not a pickle of plain data: {type(error).__name__}: {one_line(error)}") from error
    raise DataError(f"{name}: a pickle of a {type(tree).__name__}, expected a dictionary")


def _plain(value: Any) -> Any:
    """Return arrays for their stand-ins, in dictionaries of any depth."""
    if isinstance(value, dict):
        return {_text(key): _plain(item) for key, item in value.items()}
    return value.values if isinstance(value, _Array) else value


def _text(key: Any) -> str:
    """Return a key as text: those of Python 2 are bytes."""
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)

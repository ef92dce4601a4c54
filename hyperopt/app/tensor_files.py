"""Reading of files by ``torch.save`` as data: no code runs, and memory is bounded by the file's size.

torch does not unpickle them: even under ``weights_only=True`` a few bytes may ask for any amount of memory. A real checkpoint
or export holds plain containers and tensors, which need few codes of pickle and few names; all others are refused.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor

TYPES = {
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Double", "Float", "Half", "BFloat16", "Bool")},
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"ByteStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}
"""The types that tensors may have, by torch's names for them in a pickle."""


class UnsafeError(ValueError):
    """A file holds more than plain containers and tensors; nothing of it was used."""

    def __init__(self, what: str) -> None:
        """Make the message that says what it holds."""
        super().__init__(
            f"it holds objects other than tensors and plain containers, and was not loaded, since that could run code: {what}"
        )


class DamagedFileError(ValueError):
    """A file is not as ``torch.save`` writes it."""


def read(file: IO[bytes]) -> Any:
    """Return the content of a file, on the CPU.

    Raises:
        UnsafeError: the file names something other than containers and tensors.
        DamagedFileError: it is compressed, has another byte order, or a tensor does not fit its storage.
        Exception: any other error of zipfile and pickle for a damaged file.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {each.filename for each in members}
        # torch stores members uncompressed, so that they need no more memory than the file has bytes.
        stored = all(each.compress_type == zipfile.ZIP_STORED and each.compress_size == each.file_size for each in members)
        if not stored or len(names) != len(members) or sum(each.file_size for each in members) > size:
            raise DamagedFileError("it is packed, and may grow without a limit when it is unpacked")
        if archive.testzip() is not None:
            raise DamagedFileError("the checksum of one of its parts is wrong")
        folder = members[0].filename.partition("/")[0]
        order = archive.read(f"{folder}/byteorder").decode()
        if order != sys.byteorder:
            raise DamagedFileError(f"it was written on a machine of byte order {order!r:.20}, and this one's is {sys.byteorder}")
        pickled = io.BytesIO(archive.read(f"{folder}/data.pkl"))
        return _Plain(pickled, lambda key: archive.read(f"{folder}/data/{key}")).load()


class _Codes(dict[int, Any]):
    """The functions for the codes of a pickle that plain data needs."""

    def __missing__(self, code: int) -> Any:
        """Refuse a code that plain data does not need."""
        raise UnsafeError(f"code {code} of pickle")


class _Plain(pickle._Unpickler):  # the Python version, since the C version allocates a table as long as the file says
    """Reads texts, numbers, lists, tuples, mappings and tensors.

    Args:
        file: the pickle.
        storage: a function that returns the bytes of a storage by its key.
    """

    dispatch = _Codes(
        {
            code[0]: pickle._Unpickler.dispatch[code[0]]
            for code in (
                *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID),
                *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
                *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
                *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE),
                *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
                *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
                *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
            )
        }
    )

    def __init__(self, file: IO[bytes], storage: Callable[[str], bytes]) -> None:
        """Start before the first code."""
        super().__init__(file)
        self.storage = storage
        self.known: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that replaces a name that torch writes."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered
        if module == "torch" and name in TYPES:
            return TYPES[name]
        raise UnsafeError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a vector; the same key always gives the same one."""
        _, kind, key, _, count = pid
        if key not in self.known:
            data = bytearray(self.storage(key))
            if kind.itemsize * count != len(data):
                raise DamagedFileError(f"a storage of {count!r:.20} numbers has {len(data)} bytes")
            self.known[key] = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        if self.known[key].dtype != kind:
            raise DamagedFileError("a storage has two types")
        return self.known[key]


def _keep_plain(self: Any) -> None:
    """Drop what a mapping has beside its items, such as the versions in the state of a module."""
    self.stack.pop()
    if type(self.stack[-1]) is not collections.OrderedDict:
        raise UnsafeError("code 98 of pickle")


_Plain.dispatch[pickle.BUILD[0]] = _keep_plain


def _ordered() -> dict[Any, Any]:
    """Return an ordered mapping, which torch writes for the (empty) hooks of a tensor and for the state of a module."""
    return collections.OrderedDict()


def _tensor(storage: Tensor, offset: int, shape: Any, stride: Any, requires_grad: Any = False, *_: Any) -> Tensor:
    """Return a tensor in a storage, with no more numbers than the storage."""
    sizes = (*shape, *stride, offset)
    if not all(type(n) is int and n >= 0 for n in sizes) or len(shape) != len(stride):
        raise DamagedFileError(f"a tensor has the shape {shape!r:.60} and the strides {stride!r:.60}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if count > storage.numel() or (count and last > storage.numel()):
        raise DamagedFileError(f"a tensor of shape {shape!r:.60} lies in a storage of {storage.numel()} numbers")
    return torch.as_strided(storage, tuple(shape), tuple(stride), offset).requires_grad_(requires_grad is True)

"""The IDX format of MNIST's files.

A file is two zero bytes, 0x08 (unsigned bytes), the number of dimensions, each dimension as a big-endian 32-bit integer, and the
values in C order.

Reference: Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits, 1998, section "File formats".
"""

from __future__ import annotations

import math
import struct

import numpy as np

from hyperopt.data.errors import DataError


def pack(array: np.ndarray) -> bytes:
    """Return the bytes of the IDX file that holds a uint8 array.

    Raises:
        DataError: another dtype; IDX has others, MNIST's files have not.
    """
    if array.dtype != np.uint8:
        raise DataError(f"an IDX file of {array.dtype} is not supported, only of uint8")
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def unpack(data: bytes, name: str) -> np.ndarray:
    """Return the uint8 array of an IDX file's bytes, as a read-only view of them.

    Args:
        data: the whole file.
        name: what to call it in an error.

    Raises:
        DataError: not an IDX file of bytes, or one with more or fewer values than its header says.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{name}: not an IDX file of unsigned bytes (it starts with {data[:4].hex(' ')!r})")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise DataError(f"{name}: {len(data) - start} values, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)

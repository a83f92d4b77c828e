"""How the values of one column become bytes, for every MDS encoding that holds text, numbers or arrays.

Images are left out: nothing here reads them. `pkl` is refused on purpose: unpickling a downloaded file runs
whatever it says. Values are decoded from a buffer at an offset, so that arrays are views of the memory map.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.errors import UserError

Buffer = bytes | mmap.mmap
Encode = Callable[[Any], list[bytes | memoryview]]
"""A value to the buffers that make it up, one after the other; they may refer to the value's memory."""
Decode = Callable[[Buffer, int, int], Any]
"""(buffer, start, size in bytes) to the value."""

# Codes of the format for arrays whose dtype is not part of the column's type.
_DTYPE_OF_CODE = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32",
    33: "int32", 34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_CODE_OF_DTYPE = {name: code for code, name in _DTYPE_OF_CODE.items()}
_SHAPE_DTYPES = [np.dtype(f"<u{2**power}") for power in range(4)]


@dataclass(frozen=True)
class Encoding:
    """One column type. size: bytes of every value, None if it varies."""

    name: str
    size: int | None
    encode: Encode
    decode: Decode


@cache
def encoding(name: str) -> Encoding:
    """The encoding called `name`, such as `str`, `int`, `ndarray`, `ndarray:uint32`, `ndarray:uint32:8,2`.

    Raises UserError for a type that is unknown, an image, or a pickle.
    """
    kind, _, details = name.partition(":")
    if kind == "ndarray":
        return _ndarray(name, details)
    if kind in _CODE_OF_DTYPE and not details:
        dtype = np.dtype(kind).newbyteorder("<")
        return Encoding(name, dtype.itemsize, partial(_encode_scalar, dtype), partial(_decode_scalar, dtype))
    if name == "int":
        dtype = np.dtype("<i8")
        return Encoding(name, 8, partial(_encode_scalar, dtype), _decode_int)
    if name in _VARIABLE:
        return Encoding(name, None, *_VARIABLE[name])
    if name == "pkl":
        raise UserError("columns of type pkl are not read: unpickling runs code from the file")
    known = ["ndarray", "int", *_VARIABLE, *_CODE_OF_DTYPE]
    raise UserError(f"unknown MDS column type {name!r}; known: {', '.join(known)}")


def _encode_scalar(dtype: np.dtype, value: Any) -> list[bytes | memoryview]:
    number = np.asarray(value)
    if number.ndim or number.dtype.kind not in "iufb" or (dtype.kind != "f" and number.dtype.kind == "f"):
        raise TypeError(f"expected one {dtype.name}, found {type(value).__name__}")
    stored = number.astype(dtype)
    if dtype.kind != "f" and int(stored) != int(number):
        raise OverflowError(f"{value} does not fit into {dtype.name}")
    return [stored.tobytes()]


def _decode_scalar(dtype: np.dtype, buffer: Buffer, start: int, size: int) -> Any:
    return np.frombuffer(buffer, dtype, 1, start)[0]


def _decode_int(buffer: Buffer, start: int, size: int) -> int:
    return int.from_bytes(buffer[start : start + size], "little", signed=True)


def _decode_bytes(buffer: Buffer, start: int, size: int) -> bytes:
    return bytes(buffer[start : start + size])


def _decode_str(buffer: Buffer, start: int, size: int) -> str:
    return str(buffer[start : start + size], "utf-8")


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _encode_json(value: Any) -> list[bytes | memoryview]:
    return [json.dumps(value.tolist() if isinstance(value, np.ndarray) else value).encode()]


_VARIABLE: dict[str, tuple[Encode, Decode]] = {
    "bytes": (lambda value: [_expect(bytes, value)], _decode_bytes),
    "str": (lambda value: [_expect(str, value).encode()], _decode_str),
    "str_int": (lambda value: [str(_expect(int, value)).encode()], lambda *at: int(_decode_str(*at))),
    "str_float": (lambda value: [str(_expect(float, value)).encode()], lambda *at: float(_decode_str(*at))),
    "json": (_encode_json, lambda *at: json.loads(_decode_str(*at))),
}


def _ndarray(name: str, details: str) -> Encoding:
    """`ndarray[:dtype[:shape]]`; what the name leaves open is stored in front of every value."""
    dtype_name, _, shape_text = details.partition(":")
    if dtype_name and dtype_name not in _CODE_OF_DTYPE:
        raise UserError(f"unknown MDS column type {name!r}: no array of {dtype_name}")
    try:
        shape = tuple(int(size) for size in shape_text.split(",")) if shape_text else None
    except ValueError:
        raise UserError(f"unknown MDS column type {name!r}: {shape_text} is not a shape") from None
    dtype = np.dtype(dtype_name).newbyteorder("<") if dtype_name else None
    size = dtype.itemsize * prod(shape) if dtype is not None and shape is not None else None
    return Encoding(name, size, partial(_encode_array, dtype, shape), partial(_decode_array, dtype, shape))


def _encode_array(
    dtype: np.dtype | None, shape: tuple[int, ...] | None, value: Any
) -> list[bytes | memoryview]:
    array = _expect(np.ndarray, value)
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"expected an array of {dtype.name}, found {array.dtype}")
    if array.size == 0 or array.ndim == 0:
        raise ValueError("the format has no arrays without elements and no arrays without axes")
    head = b""
    if dtype is None:
        if array.dtype.name not in _CODE_OF_DTYPE:
            raise TypeError(f"the format has no arrays of {array.dtype.name}")
        head += bytes([_CODE_OF_DTYPE[array.dtype.name]])
    if shape is None:
        power = next(p for p in range(4) if max(array.shape) < 1 << (8 * 2**p))
        head += bytes([array.ndim << 2 | power]) + np.array(array.shape, _SHAPE_DTYPES[power]).tobytes()
    elif array.shape != shape:
        raise ValueError(f"expected shape {shape}, found {array.shape}")
    return [head, np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data]


def _decode_array(
    dtype: np.dtype | None, shape: tuple[int, ...] | None, buffer: Buffer, start: int, size: int
) -> NDArray[Any]:
    """A read-only view of the buffer; not aligned in general, which numpy allows."""
    end = start + size
    if dtype is None:
        dtype = np.dtype(_DTYPE_OF_CODE[buffer[start]]).newbyteorder("<")
        start += 1
    if shape is None:
        ndim, item = buffer[start] >> 2, 1 << (buffer[start] & 3)
        first, start = start + 1, start + 1 + ndim * item
        if ndim == 1:  # nearly always, and worth the shorter way
            shape = (int.from_bytes(buffer[first:start], "little"),)
        else:
            shape = tuple(
                int.from_bytes(buffer[at : at + item], "little") for at in range(first, start, item)
            )
    count = prod(shape)
    if start + count * dtype.itemsize != end:
        raise ValueError(f"an array of {dtype.name} {list(shape)} does not fill its {size} bytes")
    array = np.frombuffer(buffer, dtype, count, start)
    return array if len(shape) == 1 else array.reshape(shape)

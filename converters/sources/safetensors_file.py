"""Reads one .safetensors file: header checked in full, tensors read one at a time with plain file reads.

The safetensors library has no bfloat16 for numpy, and its memory map would count towards peak memory; the header
is 8 bytes of length and JSON (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from edgellm.errors import CheckpointError

# stored type → (numpy type of the same width, bytes); BF16 is the upper half of a float32
_DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("<f8", 8),
    "F32": ("<f4", 4),
    "F16": ("<f2", 2),
    "BF16": ("<u2", 2),
    "F8_E4M3": ("u1", 1),
    "F8_E5M2": ("u1", 1),
    "F8_E8M0": ("u1", 1),
    "I64": ("<i8", 8),
    "I32": ("<i4", 4),
    "I16": ("<i2", 2),
    "I8": ("i1", 1),
    "U8": ("u1", 1),
    "BOOL": ("?", 1),
}
_MAX_HEADER = 100_000_000  # the limit of the format's own library


def read_tensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one file; CheckpointError where the header is damaged or the file is cut off."""
    header, data_start, n_data = _read_header(path)
    tensors: dict[str, SourceTensor] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(path, *item)):
        dtype, shape, begin, end = _entry(path, name, entry)
        if begin != position:
            raise CheckpointError(
                f"{path} is damaged: tensor {name} begins at {begin}, expected {position}; copy it again"
            )
        position = end
        read = partial(_read, path, name, dtype, shape, data_start + begin)
        stored = partial(_read_stored, path, name, dtype, shape, data_start + begin)
        tensors[name] = SourceTensor(name, shape, dtype, end - begin, read, stored)
    if position > n_data:
        raise CheckpointError(f"{path} is cut off: {position - n_data:,} bytes are missing; copy it again")
    if position < n_data:
        raise CheckpointError(f"{path} is damaged: {n_data - position:,} bytes belong to no tensor; copy it again")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or n_header > min(_MAX_HEADER, n_bytes - 8):
                raise CheckpointError(f"{path} is no safetensors file or is cut off inside its header; copy it again")
            header = json.loads(file.read(n_header))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is damaged: its header is no valid JSON; copy it again") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is no table of tensors; copy it again")
    header.pop("__metadata__", None)
    return header, 8 + n_header, n_bytes - 8 - n_header


def _begin(path: Path, name: str, entry: Any) -> tuple[int, int]:
    return _entry(path, name, entry)[2:]


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a header entry, checked."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as exc:
        raise CheckpointError(f"{path} is damaged: bad header entry for tensor {name}; copy it again") from exc
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype}, which isn't supported")
    if not whole or end - begin != prod(shape) * _DTYPES[dtype][1]:
        raise CheckpointError(f"{path} is damaged: the size of tensor {name} doesn't fit its shape; copy it again")
    return dtype, shape, begin, end


def _read(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int, k: int = 0, n: int = 1
) -> NDArray[np.float32]:
    return to_float32(_read_stored(path, name, dtype, shape, offset, k, n), dtype)


def _read_stored(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int, k: int = 0, n: int = 1
) -> NDArray[Any]:
    numpy_type, item = _DTYPES[dtype]
    count = prod(shape) // n
    try:
        raw = np.fromfile(path, dtype=numpy_type, count=count, offset=offset + k * count * item)
    except OSError as exc:
        raise CheckpointError(f"cannot read tensor {name} in {path}: {exc.strerror or exc}") from exc
    if raw.size != count:
        raise CheckpointError(f"{path} changed while it was read: tensor {name} is cut off")
    return raw.reshape((shape[0] // n, *shape[1:]) if n > 1 else shape)


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32; BF16 comes as its uint16 bits, FP8 as its uint8 bits."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype.startswith("F8_"):
        values: NDArray[np.float32] = _fp8_table(dtype)[raw]
        return values
    return raw.astype(np.float32, copy=False)


@cache
def _fp8_table(dtype: str) -> NDArray[np.float32]:
    """The values of all 256 bit patterns (OCP 8-bit floating point specification; E8M0: OCP microscaling formats).

    E5M2 is the upper byte of a float16. E4M3 has a bias of 7, no infinity, and NaN only where all bits are set.
    """
    bits = np.arange(256)
    if dtype == "F8_E5M2":
        return (bits << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":
        return np.ldexp(np.where(bits == 255, np.nan, 1.0), bits - 127).astype(np.float32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size[bits & 127 == 127] = np.nan
    values: NDArray[np.float32] = np.where(bits < 128, size, -size).astype(np.float32)
    return values

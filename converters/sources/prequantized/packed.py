"""What the formats share: bits out of 32-bit words, groups of columns with a scale each, tensors that belong together.

Everything here works through a weight some rows at a time, so that a tensor takes its stored bytes, its float32
result and a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from edgellm.errors import CheckpointError

Tensors = Mapping[str, SourceTensor]
Config = Mapping[str, Any]  # the quantization_config
Array = NDArray[np.float32]
FLOATS = ("F32", "F16", "BF16", "F64")
_SLAB_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Restored:
    """A weight the format gives back, and the names of the stored tensors it is made of."""

    tensor: SourceTensor
    used: tuple[str, ...]


def companion(tensors: Tensors, name: str, of: str, dtypes: tuple[str, ...], n_dims: int | None = None) -> SourceTensor:
    """The tensor `name`, which `of` can't be read without; CheckpointError where it is missing or of another kind."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"tensor {of} is quantized, but {name} is missing; copy the checkpoint again in full")
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"tensor {name} has type {tensor.dtype}, expected {' or '.join(dtypes)}")
    if n_dims is not None and len(tensor.shape) != n_dims:
        raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, expected {n_dims} dimensions")
    return tensor


def require_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")


def stored(tensor: SourceTensor, k: int = 0, n: int = 1) -> NDArray[Any]:
    """The stored numbers, unconverted."""
    assert tensor.read_stored is not None  # only a GGUF's tensors lack it, and they don't come here
    return tensor.read_stored(k, n)


def words(tensor: SourceTensor) -> NDArray[np.uint32]:
    """An I32 tensor as unsigned words, so that shifts don't drag the sign along."""
    return stored(tensor).view(np.uint32)


def packed_width(n: int, bits: int) -> int:
    """How many 32-bit words `n` densely packed values take."""
    return -(-n * bits // 32)


def unpack(packed: NDArray[np.uint32], bits: int, n: int) -> NDArray[np.uint8]:
    """The first `n` values of `bits` bits packed densely, lowest bits first, along the last axis (…, words).

    A value may straddle two words. That is how GPTQ packs 2, 3, 4 and 8 bits and compressed-tensors 1 to 8.
    """
    # values that never straddle a byte come out of bytes: a quarter of the traffic
    unit = 8 if 8 % bits == 0 else 32
    units: NDArray[Any] = np.ascontiguousarray(packed, "<u4").view(np.uint8) if unit == 8 else packed
    n_units = bits // gcd(bits, unit)  # after so many the pattern repeats
    n_values = unit * n_units // bits
    lead, width = units.shape[:-1], units.shape[-1]
    n_runs = -(-width // n_units)
    if n_runs * n_units != width:
        units = np.concatenate([units, np.zeros((*lead, n_runs * n_units - width), units.dtype)], axis=-1)
    runs = units.reshape(*lead, n_runs, n_units)
    out = np.empty((*lead, n_runs, n_values), np.uint8)
    for i in range(n_values):
        at, shift = divmod(i * bits, unit)
        value = runs[..., at] >> units.dtype.type(shift)
        if shift + bits > unit:
            value = value | runs[..., at + 1] << units.dtype.type(unit - shift)
        out[..., i] = value & units.dtype.type((1 << bits) - 1)
    return out.reshape(*lead, n_runs * n_values)[..., :n]


def check_unpacked(n: int, bits: int, packed: SourceTensor, axis: int) -> None:
    """The packed axis must hold exactly `n` values."""
    if packed.shape[axis] != packed_width(n, bits):
        raise CheckpointError(
            f"tensor {packed.name} has shape {list(packed.shape)}, but {n} values of {bits} bit take "
            f"{packed_width(n, bits)} words along dimension {axis}"
        )


def part_of(n_rows: int, k: int, n: int) -> tuple[int, int]:
    """First row and row after the last of the k-th of n equal parts."""
    return k * n_rows // n, (k + 1) * n_rows // n


def by_rows(first: int, last: int, n_columns: int, rows: Callable[[int, int], Array], multiple: int = 1) -> Array:
    """float32 (last - first, n_columns), put together from `rows(start, stop)`; starts are multiples of `multiple`."""
    out = np.empty((last - first, n_columns), np.float32)
    step = max(1, _SLAB_WEIGHTS // max(1, n_columns) // multiple) * multiple
    start = first
    while start < last:
        stop = min(start // multiple * multiple + step, last)
        out[start - first : stop - first] = rows(start, stop)
        start = stop
    return out


def affine(q: NDArray[Any], zeros: NDArray[Any] | None, scales: Array, group: NDArray[np.intp] | None) -> Array:
    """(q - zeros[:, group]) · scales[:, group] in float32; q (rows, columns), zeros and scales (rows, groups or 1)."""
    values = q.astype(np.float32, order="C")
    if zeros is not None:
        zeros = zeros.astype(np.float32)
        values -= zeros if group is None else np.take(zeros, group, axis=1)
    values *= scales if group is None else np.take(scales, group, axis=1)
    return values


def group_of_columns(n_columns: int, group_size: int) -> NDArray[np.intp]:
    return np.arange(n_columns) // group_size


def read_groups(tensor: SourceTensor, n_columns: int, n_groups: int) -> NDArray[np.intp]:
    """A g_idx tensor: the group of each column, checked against the number of groups."""
    require_shape(tensor, (n_columns,))
    groups = stored(tensor).astype(np.intp)
    if groups.size and not (groups.min() >= 0 and groups.max() < n_groups):
        raise CheckpointError(f"tensor {tensor.name} names group {groups.max()}, but there are {n_groups} groups")
    return groups


def guess_group_size(n_columns: int, n_groups: int, name: str, hints: tuple[int, ...]) -> int:
    """Columns in a group; the last group may be short only where the config gives the size."""
    for size in hints:
        if size > 0 and -(-n_columns // size) == n_groups:
            return size
    if n_groups < 1 or n_columns % n_groups:
        raise CheckpointError(f"tensor {name} has scales for {n_groups} groups, which don't divide {n_columns} columns")
    return n_columns // n_groups

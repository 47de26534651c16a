"""bitsandbytes checkpoints: nf4 and fp4 (Dettmers et al. 2023, arXiv 2305.14314), and int8.

4 bit: x.weight U8 (n/2, 1) holds the flattened weight, the first value in the high nibble.

    x.weight.absmax      float (blocks,), or U8 where it is quantized itself ("nested")
    x.weight.quant_map   float (16,), the value of each code
    x.weight.nested_absmax, x.weight.nested_quant_map
    x.weight.quant_state.bitsandbytes__nf4 (or __fp4)  U8: JSON with shape, blocksize, nested_blocksize, nested_offset

value = quant_map[code] · absmax[block]; nested: absmax = nested_quant_map[a] · nested_absmax[block of a] + offset.

8 bit: x.weight I8 (out, in) and x.SCB float (out,): value = q · SCB / 127, in that order of products. The library
rounds to the layer's dtype in the end; here values stay float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from converters.sources import SourceTensor
from converters.sources.prequantized.packed import (
    FLOATS,
    Array,
    Config,
    Restored,
    Tensors,
    by_rows,
    companion,
    part_of,
    require_shape,
    stored,
)
from edgellm.errors import CheckpointError

_STATE = ".quant_state.bitsandbytes__"
_SLAB_BYTES = 1 << 18
_MAX_STATE = 1 << 16
_PER_127 = 7.874015718698502e-3  # the library multiplies with this reciprocal


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every 4-bit and 8-bit layer; CheckpointError names what is missing or doesn't fit."""
    eight = [_int8(tensors, name) for name, t in tensors.items() if name.endswith(".weight") and t.dtype == "I8"]
    four = [_4bit(tensors, name) for name, t in tensors.items() if name.endswith(".weight") and t.dtype == "U8"]
    return eight + four


def _int8(tensors: Tensors, name: str) -> Restored:
    layer = name.removesuffix(".weight")
    weight = companion(tensors, name, name, ("I8",), 2)
    scb = companion(tensors, f"{layer}.SCB", name, FLOATS, 1)
    require_shape(scb, weight.shape[:1])
    used = [n for n in (name, scb.name, f"{layer}.weight_format") if n in tensors]
    n_bytes = weight.n_bytes + scb.n_bytes
    read = partial(_read_int8, weight, scb)
    return Restored(SourceTensor(name, weight.shape, "bitsandbytes 8 bit", n_bytes, read), tuple(used))


def _read_int8(weight: SourceTensor, scb: SourceTensor, k: int = 0, n: int = 1) -> Array:
    scale, q = scb.read(), stored(weight, k, n)
    first, last = part_of(len(scale), k, n)

    def rows(start: int, stop: int) -> Array:
        values = q[start - first : stop - first].astype(np.float32)
        values *= scale[start:stop, None]
        values *= np.float32(_PER_127)
        return values

    return by_rows(first, last, q.shape[1], rows)


@dataclass(frozen=True)
class _Blocks:
    """Everything about a 4-bit weight but its codes."""

    shape: tuple[int, ...]
    block: int
    absmax: SourceTensor
    codes: SourceTensor
    nested_absmax: SourceTensor | None
    nested_codes: SourceTensor | None
    nested_block: int
    offset: float

    def scales(self) -> Array:
        """One factor a block, float32."""
        if self.nested_absmax is None or self.nested_codes is None:
            return self.absmax.read()
        values: Array = self.nested_codes.read()[stored(self.absmax)]
        values *= self.nested_absmax.read()[np.arange(len(values)) // self.nested_block]
        values += np.float32(self.offset)
        return values


def _4bit(tensors: Tensors, name: str) -> Restored:
    weight = tensors[name]
    state_name = next((f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in tensors), None)
    state = companion(tensors, state_name or f"{name}{_STATE}nf4", name, ("U8",), 1)
    kind = state.name.removeprefix(name + _STATE)
    shape, block, nested_block, offset = _state(state)
    absmax = companion(tensors, f"{name}.absmax", name, (*FLOATS, "U8"), 1)
    codes = companion(tensors, f"{name}.quant_map", name, FLOATS, 1)
    require_shape(codes, (16,))
    require_shape(absmax, (-(-prod(shape) // block),))
    if prod(weight.shape) != -(-prod(shape) // 2):
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, too many or few for {list(shape)}")
    nested_absmax = nested_codes = None
    if absmax.dtype == "U8":
        nested_absmax = companion(tensors, f"{name}.nested_absmax", name, FLOATS, 1)
        nested_codes = companion(tensors, f"{name}.nested_quant_map", name, FLOATS, 1)
        require_shape(nested_codes, (256,))
        require_shape(nested_absmax, (-(-absmax.shape[0] // nested_block),))
    blocks = _Blocks(shape, block, absmax, codes, nested_absmax, nested_codes, nested_block, offset)
    parts = [t for t in (weight, state, absmax, codes, nested_absmax, nested_codes) if t]
    n_bytes = sum(t.n_bytes for t in parts)
    tensor = SourceTensor(name, shape, f"bitsandbytes {kind}", n_bytes, partial(_read_4bit, weight, blocks))
    return Restored(tensor, tuple(t.name for t in parts))


def _state(state: SourceTensor) -> tuple[tuple[int, ...], int, int, float]:
    """(shape, block, block of the nested factors, their offset) out of the packed JSON."""
    try:
        if state.n_bytes > _MAX_STATE:
            raise ValueError
        said: dict[str, Any] = json.loads(stored(state).tobytes())
        shape, block = tuple(said["shape"]), said["blocksize"]
        nested_block, offset = said.get("nested_blocksize", 256), float(said.get("nested_offset", 0.0))
        sizes = (*shape, block, nested_block)
        if not shape or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"tensor {state.name} doesn't hold bitsandbytes' quant_state; copy it again") from exc
    return shape, block, nested_block, offset


def _read_4bit(weight: SourceTensor, blocks: _Blocks, k: int = 0, n: int = 1) -> Array:
    codes, scales, packed = blocks.codes.read(), blocks.scales(), stored(weight).reshape(-1)
    n_rows = blocks.shape[0]
    row = prod(blocks.shape[1:])
    first, last = (at * row for at in part_of(n_rows, k, n))
    out = np.empty(last - first, np.float32)
    start = first
    while start < last:
        stop = min(start + 2 * _SLAB_BYTES, last)
        low = start // 2
        pairs = packed[low : -(-stop // 2)]
        nibbles = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[start - 2 * low : stop - 2 * low]
        values = codes[nibbles]
        values *= scales[np.arange(start, stop) // blocks.block]
        out[start - first : stop - first] = values
        start = stop
    return out.reshape(n_rows // n, *blocks.shape[1:])

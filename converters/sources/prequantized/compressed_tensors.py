"""compressed-tensors checkpoints (llm-compressor): int-quantized, float-quantized, naive-quantized, pack-quantized.

The first three store x.weight as I8 or FP8 (see scaled.py) with x.weight_scale and perhaps x.weight_zero_point and
x.weight_g_idx. pack-quantized stores

    x.weight_packed      I32 (out, in·bits/32)      q + 2^(bits-1), packed densely along the inputs
    x.weight_shape       integers (2,)              [out, in]
    x.weight_scale       float (out, groups or 1), or one number
    x.weight_zero_point  I32 (out·bits/32, groups)  packed along the outputs with the same offset; asymmetric only
    x.weight_g_idx       I32 (in,)                  the group of each input, with activation ordering

weight = (q - zero) · scale. The library computes that in the scale's own type, here it stays float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from converters.sources import SourceTensor
from converters.sources.prequantized.packed import (
    FLOATS,
    Array,
    Config,
    Restored,
    Tensors,
    affine,
    by_rows,
    check_unpacked,
    companion,
    group_of_columns,
    guess_group_size,
    packed_width,
    part_of,
    read_groups,
    require_shape,
    stored,
    unpack,
    words,
)
from converters.sources.prequantized.scaled import Blocks, scaled
from edgellm.errors import CheckpointError

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every quantized layer; CheckpointError names what is missing, doesn't fit or isn't supported."""
    schemes = _schemes(config)
    for stored_as in (config.get("format"), *(scheme.get("format") for scheme in schemes)):
        if stored_as not in (None, *_FORMATS):
            raise CheckpointError(
                f"config.json says compressed-tensors format {stored_as!r}; supported: {', '.join(_FORMATS)}"
            )
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), dict)]
    blocks = tuple(_blocks(w.get("block_structure")) for w in weights)
    groups = tuple(w["group_size"] for w in weights if isinstance(w.get("group_size"), int))
    blocks += tuple((1, size) for size in groups if size > 0)
    widths = tuple(w["num_bits"] for w in weights if isinstance(w.get("num_bits"), int))
    packed = [_packed(tensors, name, widths, groups) for name in tensors if name.endswith(".weight_packed")]
    whole = [
        scaled(tensors, name, blocks, "compressed-tensors")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in ("I8", "F8_E4M3", "F8_E5M2")
    ]
    return packed + whole


def _schemes(config: Config) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def _blocks(structure: Any) -> Blocks | None:
    if isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure):
        return structure[0], structure[1]
    return None


def _packed(tensors: Tensors, name: str, widths: tuple[int, ...], groups: tuple[int, ...]) -> Restored:
    layer = name.removesuffix("_packed")
    packed = companion(tensors, name, name, ("I32",), 2)
    said = companion(tensors, f"{layer}_shape", name, ("I64", "I32"), 1)
    require_shape(said, (2,))
    n_out, n_in = (int(size) for size in stored(said))
    # layers may differ in bits; only one width fits what is stored
    bits = next((b for b in widths if 1 <= b <= 8 and packed.shape == (n_out, packed_width(n_in, b))), None)
    if bits is None:
        raise CheckpointError(
            f"tensor {name} has shape {list(packed.shape)}, which {widths} bit of {[n_out, n_in]} don't give"
        )
    scale = companion(tensors, f"{layer}_scale", name, FLOATS)
    n_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if scale.shape not in ((), (1,), (n_out,), (n_out, n_groups)):
        raise CheckpointError(f"tensor {scale.name} has shape {list(scale.shape)}, expected [{n_out}, groups]")
    g_idx, zero = tensors.get(f"{layer}_g_idx"), None
    if f"{layer}_zero_point" in tensors:
        zero = companion(tensors, f"{layer}_zero_point", name, ("I32",), 2)
        check_unpacked(n_out, bits, zero, 0)
        require_shape(zero, (zero.shape[0], n_groups))
    size = guess_group_size(n_in, n_groups, scale.name, groups) if not g_idx else None
    parts = tuple(t for t in (packed, said, scale, zero, g_idx) if t)
    read = partial(_read_packed, packed, scale, zero, g_idx, bits, (n_out, n_in), size)
    n_bytes = sum(t.n_bytes for t in parts)
    tensor = SourceTensor(layer, (n_out, n_in), f"compressed-tensors {bits} bit", n_bytes, read)
    return Restored(tensor, tuple(t.name for t in parts))


def _read_packed(
    packed: SourceTensor,
    scale: SourceTensor,
    zero: SourceTensor | None,
    g_idx: SourceTensor | None,
    bits: int,
    shape: tuple[int, int],
    group_size: int | None,
    k: int = 0,
    n: int = 1,
) -> Array:
    n_out, n_in = shape
    factors = scale.read().reshape(-1, 1) if len(scale.shape) < 2 else scale.read()
    factors = np.broadcast_to(factors, (n_out, factors.shape[1]))
    offset = 1 << (bits - 1)
    if zero:
        zeros = np.ascontiguousarray(unpack(np.ascontiguousarray(words(zero).T), bits, n_out).T)
    else:
        zeros = np.full(factors.shape, offset, np.uint8)  # in q - zero the two offsets cancel
    if factors.shape[1] == 1:
        group = None
    elif g_idx:
        group = read_groups(g_idx, n_in, factors.shape[1])
    else:
        group = group_of_columns(n_in, group_size or n_in)
    first, last = part_of(n_out, k, n)
    values = stored(packed, k, n).view(np.uint32)

    def rows(start: int, stop: int) -> Array:
        q = unpack(values[start - first : stop - first], bits, n_in)
        return affine(q, zeros[start:stop], factors[start:stop], group)

    return by_rows(first, last, n_in, rows)

"""GPTQ checkpoints: AutoGPTQ, GPTQModel, AutoRound's GPTQ export (Frantar et al. 2022, arXiv 2210.17323).

A layer `x` of `out` rows and `in` columns is stored transposed:

    x.qweight  I32 (in·bits/32, out)      packed along the inputs
    x.qzeros   I32 (groups, out·bits/32)  packed along the outputs
    x.scales   float (groups, out)
    x.g_idx    I32 (in,), optional        the group of each input; shuffled with desc_act

weight[o, i] = scales[g_idx[i], o] · (q[i, o] - zero[g_idx[i], o]). The first format stores every zero point less one;
checkpoint_format "gptq_v2" stores it as it is.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

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
    unpack,
    words,
)
from edgellm.errors import CheckpointError

_BITS = (4, 8, 2, 3)
_FORMATS = ("gptq", "gptq_v2")


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every layer with a qweight; CheckpointError names what is missing or doesn't fit."""
    stored_as = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored_as not in _FORMATS:
        raise CheckpointError(
            f"config.json says checkpoint_format {stored_as!r}; of GPTQ {' and '.join(_FORMATS)} are supported"
        )
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return [_layer(tensors, layer, config, stored_as == "gptq_v2") for layer in layers]


def _layer(tensors: Tensors, layer: str, config: Config, v2: bool) -> Restored:
    weight_name = f"{layer}.qweight"
    qweight = companion(tensors, weight_name, weight_name, ("I32",), 2)
    scales = companion(tensors, f"{layer}.scales", weight_name, FLOATS, 2)
    qzeros = companion(tensors, f"{layer}.qzeros", weight_name, ("I32",), 2)
    g_idx = (
        companion(tensors, f"{layer}.g_idx", weight_name, ("I32", "I64"), 1) if f"{layer}.g_idx" in tensors else None
    )
    n_groups, n_out = scales.shape
    bits = _bits(config, qzeros, n_out)
    n_in = g_idx.shape[0] if g_idx else qweight.shape[0] * 32 // bits
    check_unpacked(n_in, bits, qweight, 0)
    if qweight.shape[1] != n_out or qzeros.shape[0] != n_groups:
        raise CheckpointError(
            f"tensor {weight_name} has shape {list(qweight.shape)} and its qzeros {list(qzeros.shape)}, "
            f"but {scales.name} has {list(scales.shape)}; they don't belong together"
        )
    group_size = config.get("group_size")
    hints = (group_size,) if isinstance(group_size, int) else ()
    size = None if g_idx else guess_group_size(n_in, n_groups, weight_name, hints)
    parts = tuple(t for t in (qweight, qzeros, scales, g_idx) if t)
    read = partial(_read, qweight, qzeros, scales, g_idx, bits, n_in, size, v2)
    n_bytes = sum(t.n_bytes for t in parts)
    tensor = SourceTensor(f"{layer}.weight", (n_out, n_in), f"GPTQ {bits} bit", n_bytes, read)
    return Restored(tensor, tuple(t.name for t in parts))


def _bits(config: Config, qzeros: SourceTensor, n_out: int) -> int:
    """Bits of one layer. The config's number where it fits: GPTQModel can give single layers another."""
    for bits in (config.get("bits"), *_BITS):
        if bits in _BITS and packed_width(n_out, bits) == qzeros.shape[1]:
            return int(bits)
    raise CheckpointError(
        f"tensor {qzeros.name} has shape {list(qzeros.shape)}, which fits {n_out} outputs with none of 2, 3, 4, 8 bit"
    )


def _read(
    qweight: SourceTensor,
    qzeros: SourceTensor,
    scales: SourceTensor,
    g_idx: SourceTensor | None,
    bits: int,
    n_in: int,
    group_size: int | None,
    v2: bool,
    k: int = 0,
    n: int = 1,
) -> Array:
    scale = np.ascontiguousarray(scales.read().T)
    n_out, n_groups = scale.shape
    packed, zeros = words(qweight), np.ascontiguousarray(_zeros(words(qzeros), bits, n_out, v2).T)
    group = read_groups(g_idx, n_in, n_groups) if g_idx else group_of_columns(n_in, group_size or n_in)

    def rows(start: int, stop: int) -> Array:
        q = unpack(np.ascontiguousarray(packed[:, start:stop].T), bits, n_in)
        return affine(q, zeros[start:stop], scale[start:stop], group)

    return by_rows(*part_of(n_out, k, n), n_in, rows)


def _zeros(packed: NDArray[np.uint32], bits: int, n_out: int, v2: bool) -> NDArray[np.uint8]:
    """Zero points, uint8 (groups, out)."""
    if not v2 and bits != 3:
        # as whole words with carry: GPTQModel took the ones off that way, so a zero point of 0 borrowed
        packed = packed + np.uint32(sum(1 << at for at in range(0, 32, bits)))
    zeros = unpack(packed, bits, n_out)
    return (zeros + np.uint8(1)) & np.uint8(7) if not v2 and bits == 3 else zeros

"""Quantized layers as other tools store them, packed from their published definitions, bit by bit and without our code.

Each function takes a float weight (out, in) and returns the stored tensors of a layer and the float32 values they
stand for by the format's definition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Layer = dict[str, NDArray[Any]]


def pack_bits(values: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Values of one row after another as a stream of bits, lowest first, cut into int32 words along the last axis."""
    rows = values.reshape(-1, values.shape[-1]).astype(np.int64)
    n_words = -(-values.shape[-1] * bits // 32)
    stream = np.zeros((len(rows), n_words * 32), np.uint8)
    for i in range(rows.shape[1]):
        for b in range(bits):
            stream[:, i * bits + b] = rows[:, i] >> b & 1
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return words.reshape(*values.shape[:-1], n_words)


def grouped(weight: Floats, bits: int, group: NDArray[np.intp], seed: int = 0) -> tuple[Any, Any, Floats, Floats]:
    """(q, zeros, scales, values) of asymmetric rounding by groups of columns; zeros and scales (out, groups), F16."""
    n_groups, top = int(group.max()) + 1, (1 << bits) - 1
    low = np.stack([weight[:, group == g].min(axis=1) for g in range(n_groups)], axis=1)
    high = np.stack([weight[:, group == g].max(axis=1) for g in range(n_groups)], axis=1)
    scales = ((high - low) / top).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.round(-low / scales), 0, top).astype(np.int64)
    q = np.clip(np.round(weight / scales[:, group]) + zeros[:, group], 0, top).astype(np.int64)
    values = (q - zeros[:, group]).astype(np.float32) * scales[:, group]
    return q, zeros, scales, values


def gptq(
    weight: Floats, bits: int, group_size: int, *, v2: bool = False, shuffled: bool = False
) -> tuple[Layer, Floats]:
    """AutoGPTQ's layout; v1 has every zero point less one, taken off as whole words as GPTQModel does."""
    n_in = weight.shape[1]
    group = np.arange(n_in) // (n_in if group_size == -1 else group_size)
    if shuffled:
        group = np.random.default_rng(1).permutation(group)
    q, zeros, scales, values = grouped(weight, bits, group)
    if not v2 and bits == 3:
        zeros = np.maximum(zeros, 1)
        values = (q - zeros[:, group]).astype(np.float32) * scales[:, group]
    packed_zeros = pack_bits(zeros.T - (1 if not v2 and bits == 3 else 0), bits)
    if not v2 and bits != 3:
        ones = sum(1 << at for at in range(0, 32, bits))
        packed_zeros = (packed_zeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
    layer = {
        "qweight": np.ascontiguousarray(pack_bits(q, bits).T),
        "qzeros": packed_zeros,
        "scales": scales.T.astype(np.float16),
        "g_idx": group.astype(np.int32),
    }
    return layer, values


def awq_gemm(weight: Floats, group_size: int) -> tuple[Layer, Floats]:
    """AutoAWQ's gemm layout: nibble i of a word holds output (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    group = np.arange(weight.shape[1]) // (weight.shape[1] if group_size == -1 else group_size)
    q, zeros, scales, values = grouped(weight, 4, group)

    def pack(rows: NDArray[Any]) -> NDArray[np.int32]:
        eights = rows.reshape(len(rows), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack_bits(eights.reshape(len(rows), -1), 4)

    return {"qweight": pack(q.T), "qzeros": pack(zeros.T), "scales": scales.T.astype(np.float16)}, values


def awq_gemv(weight: Floats, group_size: int) -> tuple[Layer, Floats]:
    """AutoAWQ's gemv layout: plain order, groups padded to a width its kernel likes."""
    n_in = weight.shape[1]
    q, zeros, scales, values = grouped(weight, 4, np.arange(n_in) // group_size)
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    width = math.ceil(n_in // group_size / 8 / multiple) * multiple
    padded_zeros = np.zeros((len(weight), width * 8), np.int64)
    padded_scales = np.zeros((len(weight), width * 8), np.float16)
    padded_zeros[:, : zeros.shape[1]], padded_scales[:, : scales.shape[1]] = zeros, scales
    return {"qweight": pack_bits(q, 4), "qzeros": pack_bits(padded_zeros, 4), "scales": padded_scales}, values


def pack_quantized(
    weight: Floats, bits: int, group_size: int, *, symmetric: bool, shuffled: bool = False
) -> tuple[Layer, Floats]:
    """compressed-tensors' pack-quantized."""
    n_out, n_in = weight.shape
    half = 1 << (bits - 1)
    group = np.arange(n_in) // (n_in if group_size == -1 else group_size)
    if shuffled:
        group = np.random.default_rng(1).permutation(group)
    q, zeros, scales, values = grouped(weight, bits, group)
    if symmetric:
        zeros = np.full_like(zeros, half)
        values = (q - half).astype(np.float32) * scales[:, group]
    layer: Layer = {
        "weight_packed": pack_bits(q, bits),
        "weight_shape": np.array([n_out, n_in]),
        "weight_scale": scales,
    }
    if not symmetric:
        layer["weight_zero_point"] = np.ascontiguousarray(pack_bits(zeros.T, bits).T)
    if shuffled:
        layer["weight_g_idx"] = group.astype(np.int32)
    return layer, values

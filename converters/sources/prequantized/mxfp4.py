"""MXFP4 experts as gpt-oss stores them (OCP microscaling formats: E2M1 values, a power of two for 32 of them).

    x_blocks  U8 (experts, outputs, groups, 16)  two values a byte, the first in the low nibble
    x_scales  U8 (experts, outputs, groups)      exponent + 127

The unquantized checkpoint calls the tensor x and lays it out (experts, inputs, outputs); so does `read`. Quantizing
what it returns to ggml's MXFP4 along the inputs gives the same values again, so nothing is lost by going through
float32: ggml takes the exponent that brings a block's largest value to 4 or more, and each value a block can hold is
on the grid of that exponent too.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from converters.sources import SourceTensor
from converters.sources.prequantized.packed import Array, Config, Restored, Tensors, companion, require_shape, stored

DTYPE = "MXFP4"
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every tensor stored as blocks and scales; CheckpointError names what is missing or doesn't fit."""
    return [_experts(tensors, name.removesuffix("_blocks")) for name in tensors if name.endswith("_blocks")]


def _experts(tensors: Tensors, name: str) -> Restored:
    blocks = companion(tensors, f"{name}_blocks", f"{name}_blocks", ("U8",), 4)
    scales = companion(tensors, f"{name}_scales", blocks.name, ("U8", "F8_E8M0"), 3)
    n_experts, n_out, n_groups, n_bytes = blocks.shape
    require_shape(scales, (n_experts, n_out, n_groups))
    require_shape(blocks, (n_experts, n_out, n_groups, 16))
    shape = (n_experts, n_groups * 2 * n_bytes, n_out)
    tensor = SourceTensor(name, shape, DTYPE, blocks.n_bytes + scales.n_bytes, partial(_read, blocks, scales))
    return Restored(tensor, (blocks.name, scales.name))


def _read(blocks: SourceTensor, scales: SourceTensor, k: int = 0, n: int = 1) -> Array:
    n_experts, n_out, n_groups, _ = blocks.shape
    packed, exponents = stored(blocks, k, n), stored(scales, k, n).astype(np.int32) - 127
    out = np.empty((n_experts // n, n_groups * 32, n_out), np.float32)
    for expert in range(len(out)):  # one at a time: all of them are gigabytes
        pairs = packed[expert]
        values = _VALUES[np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(n_out, n_groups, 32)]
        out[expert] = np.ldexp(values, exponents[expert][..., None]).reshape(n_out, -1).T
    return out

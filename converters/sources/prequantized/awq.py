"""AWQ checkpoints of AutoAWQ (Lin et al. 2023, arXiv 2306.00978), 4 bit, versions "gemm" and "gemv".

    gemm: x.qweight I32 (in, out/8)   x.qzeros I32 (groups, out/8)   x.scales float (groups, out)
    gemv: x.qweight I32 (out, in/8)   x.qzeros I32 (out, words)      x.scales float (out, 8·words), padded groups

weight[o, i] = scales[g, o] · (q[i, o] - zero[g, o]) with g = i // group_size. gemv packs in order, lowest bits
first; gemm interleaves the eight outputs of a word for its kernel.
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
    companion,
    group_of_columns,
    guess_group_size,
    part_of,
    require_shape,
    unpack,
    words,
)
from edgellm.errors import CheckpointError

_PER_WORD = 8
# output j of a word lies at nibble _NIBBLE[j]
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every layer with a qweight; CheckpointError names what is missing or doesn't fit."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise CheckpointError(f"config.json says AWQ version {version!r}; gemm and gemv are supported")
    if config.get("bits", config.get("w_bit", 4)) != 4:
        raise CheckpointError(f"config.json says AWQ with {config.get('bits')} bit; 4 bit is supported")
    layer = _gemm_layer if version == "gemm" else _gemv_layer
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return [layer(tensors, name, config) for name in names]


def _parts(tensors: Tensors, layer: str) -> tuple[SourceTensor, SourceTensor, SourceTensor]:
    weight_name = f"{layer}.qweight"
    return (
        companion(tensors, weight_name, weight_name, ("I32",), 2),
        companion(tensors, f"{layer}.qzeros", weight_name, ("I32",), 2),
        companion(tensors, f"{layer}.scales", weight_name, FLOATS, 2),
    )


def _restored(layer: str, shape: tuple[int, int], parts: tuple[SourceTensor, ...], read: partial[Array]) -> Restored:
    n_bytes = sum(t.n_bytes for t in parts)
    tensor = SourceTensor(f"{layer}.weight", shape, "AWQ 4 bit", n_bytes, read)
    return Restored(tensor, tuple(t.name for t in parts))


def _size_hints(config: Config) -> tuple[int, ...]:
    size = config.get("group_size", config.get("q_group_size"))
    return (size,) if isinstance(size, int) else ()


def _gemm_layer(tensors: Tensors, layer: str, config: Config) -> Restored:
    qweight, qzeros, scales = parts = _parts(tensors, layer)
    n_in, n_words = qweight.shape
    n_groups = scales.shape[0]
    require_shape(scales, (n_groups, n_words * _PER_WORD))
    require_shape(qzeros, (n_groups, n_words))
    size = guess_group_size(n_in, n_groups, qweight.name, _size_hints(config))
    read = partial(_read_gemm, qweight, qzeros, scales, size)
    return _restored(layer, (n_words * _PER_WORD, n_in), parts, read)


def _read_gemm(
    qweight: SourceTensor, qzeros: SourceTensor, scales: SourceTensor, size: int, k: int = 0, n: int = 1
) -> Array:
    packed, scale = words(qweight), np.ascontiguousarray(scales.read().T)
    zeros = np.ascontiguousarray(_interleaved(words(qzeros)).T)
    group = group_of_columns(len(packed), size)

    def rows(start: int, stop: int) -> Array:
        first = start // _PER_WORD
        q = _interleaved(packed[:, first : -(-stop // _PER_WORD)])
        inside = q[:, start - first * _PER_WORD : stop - first * _PER_WORD]
        return affine(inside.T, zeros[start:stop], scale[start:stop], group)

    return by_rows(*part_of(len(scale), k, n), len(packed), rows, _PER_WORD)


def _interleaved(packed: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """(rows, words) to (rows, 8·words), outputs in order."""
    nibbles = unpack(packed, 4, packed.shape[1] * _PER_WORD).reshape(*packed.shape, _PER_WORD)
    return nibbles[..., _NIBBLE].reshape(len(packed), -1)


def _gemv_layer(tensors: Tensors, layer: str, config: Config) -> Restored:
    qweight, qzeros, scales = parts = _parts(tensors, layer)
    n_out, n_in = qweight.shape[0], qweight.shape[1] * _PER_WORD
    require_shape(qzeros, (n_out, qzeros.shape[1]))
    require_shape(scales, (n_out, qzeros.shape[1] * _PER_WORD))
    # groups are padded, so their size must come from the config; -1: one group a row
    size = next((size if size > 0 else n_in for size in _size_hints(config)), 128)
    if -(-n_in // size) > scales.shape[1]:
        raise CheckpointError(f"tensor {scales.name} has too few scales for groups of {size} in {n_in} columns")
    return _restored(layer, (n_out, n_in), parts, partial(_read_gemv, qweight, qzeros, scales, size))


def _read_gemv(
    qweight: SourceTensor, qzeros: SourceTensor, scales: SourceTensor, size: int, k: int = 0, n: int = 1
) -> Array:
    packed, scale = words(qweight), scales.read()
    zeros = unpack(words(qzeros), 4, scale.shape[1])
    n_in = packed.shape[1] * _PER_WORD
    group = group_of_columns(n_in, size)

    def rows(start: int, stop: int) -> Array:
        return affine(unpack(packed[start:stop], 4, n_in), zeros[start:stop], scale[start:stop], group)

    return by_rows(*part_of(len(packed), k, n), n_in, rows)

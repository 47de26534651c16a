"""The maps specs are made of."""

from __future__ import annotations

import numpy as np

from converters.architectures.spec import Array, Op, Shape, Sizes


def permute_rope(heads: str) -> Op:
    """Reorder each head's rows from halves (x_0 … x_{d/2-1}, y_0 …) to pairs (x_0, y_0, x_1, y_1, …).

    Checkpoints of Hugging Face rotate the first half of a head against the second; llama.cpp's NORM rope rotates
    neighbours. `heads` names the size that counts the heads.
    """

    def forward(rows: Array, sizes: Sizes) -> Array:
        n = sizes[heads]
        return rows.reshape(n, 2, len(rows) // n // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def inverse(rows: Array, sizes: Sizes) -> Array:
        n = sizes[heads]
        return rows.reshape(n, len(rows) // n // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return Op(f"permute_rope({heads})", forward, inverse)


def add(constant: float) -> Op:
    """Add a constant: norms that are stored as their distance from one. Affine, not linear."""
    return Op(
        f"add({constant})",
        lambda weights, sizes: weights + np.float32(constant),
        lambda weights, sizes: weights - np.float32(constant),
        affine=True,
    )


def transpose() -> Op:
    """Swap rows and columns: GPT-2 stores (inputs, outputs)."""
    return Op(
        "transpose",
        lambda weights, sizes: np.swapaxes(weights, -1, -2),
        lambda weights, sizes: np.swapaxes(weights, -1, -2),
        axis="both",
        stored_shape=lambda shape, sizes: (*shape[:-2], shape[-1], shape[-2]),
    )


def squeeze(axis: int) -> Op:
    """Drop a dimension of length one, as in depthwise convolutions."""

    def stored(shape: Shape, sizes: Sizes) -> Shape:
        at = axis % (len(shape) + 1)
        return (*shape[:at], 1, *shape[at:])

    return Op(
        f"squeeze({axis})",
        lambda weights, sizes: np.squeeze(weights, axis),
        lambda weights, sizes: np.expand_dims(weights, axis),
        axis="both",
        stored_shape=stored,
    )


def part(k: int, n: int, axis: int = -2, interleaved: bool = False) -> Op:
    """The k-th of n equal parts along an axis: one stored tensor holds several (gate and up, say).

    interleaved: part k has every n-th row from row k on, instead of one run of rows.
    """

    def forward(weights: Array, sizes: Sizes) -> Array:
        if interleaved:
            index = [slice(None)] * weights.ndim
            index[axis] = slice(k, None, n)
            return weights[tuple(index)]
        return np.split(weights, n, axis)[k]

    def stored(shape: Shape, sizes: Sizes) -> Shape:
        at = axis % len(shape)
        return (*shape[:at], n * shape[at], *shape[at + 1 :])

    def join(parts: list[Array]) -> Array:
        if not interleaved:
            return np.concatenate(parts, axis)
        at = axis % parts[0].ndim
        stacked = np.stack(parts, at + 1)
        shape = parts[0].shape
        return stacked.reshape(*shape[:at], n * shape[at], *shape[at + 1 :])

    return Op(
        f"part({k}, {n})",
        forward,
        lambda weights, sizes: weights,
        axis="rows" if axis in (0, -2) else "both",
        stored_shape=stored,
        part=(k, n),
        join=join,
    )

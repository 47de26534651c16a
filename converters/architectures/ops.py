"""The maps specs are made of."""

from __future__ import annotations

import math

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


def scale(*factors: str) -> Op:
    """Multiply by sizes: numbers, or a column with one number for each row. A GGUF doesn't tell what they were."""

    def product(sizes: Sizes) -> Array:
        return np.asarray(math.prod(sizes[factor] for factor in factors), dtype=np.float32)

    return Op(
        f"scale({', '.join(factors)})",
        lambda weights, sizes: weights * product(sizes),
        lambda weights, sizes: weights / product(sizes),
    )


def minus_exp() -> Op:
    """The decay of a state-space model, stored as the logarithm of its negative. Not linear."""
    return Op(
        "minus_exp",
        lambda weights, sizes: -np.exp(weights),
        lambda weights, sizes: np.log(-weights),
        affine=True,
    )


def tile_heads(head: str = "", skip: str = "", columns: bool = False) -> Op:
    """Reorder value heads from groups (all of key head 0, all of 1, …) to turns (the first of each group, …).

    llama.cpp repeats key heads by tiling them. head: names the size of a head, 1 without; skip: the size of what
    comes before the value heads; columns: it is the inputs that are heads. Uses the sizes n_group, the number of
    key heads, and n_per_group.
    """

    def reorder(weights: Array, sizes: Sizes, first: str, second: str) -> Array:
        rows = weights.T if columns else weights
        start = sizes[skip] if skip else 0
        heads = rows[start:].reshape(sizes[first], sizes[second], sizes[head] if head else 1, *rows.shape[1:])
        tiled = np.concatenate((rows[:start], heads.swapaxes(0, 1).reshape(-1, *rows.shape[1:])))
        return tiled.T if columns else tiled

    return Op(
        f"tile_heads({head}, {skip})",
        lambda weights, sizes: reorder(weights, sizes, "n_group", "n_per_group"),
        lambda weights, sizes: reorder(weights, sizes, "n_per_group", "n_group"),
        axis="columns" if columns else "rows",
    )


def skip_rows(count: str) -> Op:
    """Leave out the first rows, which nothing uses; they come back as zeros."""

    def inverse(weights: Array, sizes: Sizes) -> Array:
        return np.concatenate((np.zeros((sizes[count], *weights.shape[1:]), dtype=np.float32), weights))

    return Op(
        f"skip_rows({count})",
        lambda weights, sizes: weights[sizes[count] :],
        inverse,
        stored_shape=lambda shape, sizes: (shape[0] + sizes[count], *shape[1:]),
    )


def flat() -> Op:
    """Stored as a vector: the GGUF has the same numbers with another shape."""
    return Op(
        "flat",
        lambda weights, sizes: weights,
        lambda weights, sizes: weights,
        stored_shape=lambda shape, sizes: (math.prod(shape),),
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

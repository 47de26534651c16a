"""The linear maps specs are made of."""

from __future__ import annotations

from collections.abc import Mapping

from converters.architectures.spec import Array, Op


def permute_rope(heads: str) -> Op:
    """Reorder each head's rows from halves (x_0 … x_{d/2-1}, y_0 …) to pairs (x_0, y_0, x_1, y_1, …).

    Checkpoints of Hugging Face rotate the first half of a head against the second; llama.cpp's NORM rope rotates
    neighbours. `heads` names the size that counts the heads.
    """

    def forward(rows: Array, sizes: Mapping[str, int]) -> Array:
        n = sizes[heads]
        return rows.reshape(n, 2, len(rows) // n // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def inverse(rows: Array, sizes: Mapping[str, int]) -> Array:
        n = sizes[heads]
        return rows.reshape(n, len(rows) // n // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return Op(f"permute_rope({heads})", forward, inverse)

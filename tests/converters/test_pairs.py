"""LoRA pairs through the maps of the specs: mapped factors give what mapping their dense product gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.adapters.pairs import through_ops
from converters.architectures import ARCHITECTURES
from converters.architectures.ops import (
    add,
    flat,
    minus_exp,
    part,
    permute_rope,
    scale,
    skip_rows,
    squeeze,
    tile_heads,
    transpose,
)
from converters.architectures.spec import Op, Sizes
from edgellm.errors import AdapterError

# 48 rows and columns suit every map
N = 48
SIZES: Sizes = {
    "n_head": 4, "n_group": 3, "n_per_group": 2, "d_head": 4, "d_wide": 8, "before": 24, "n_skip": 5,
    "two": 2, "three": 3,
}  # fmt: skip
KINDS: dict[str, list[Op]] = {
    "permute_rope": [permute_rope("n_head"), permute_rope("two")],
    "transpose": [transpose()],
    "scale": [scale("two", "three")],
    "tile_heads": [
        tile_heads("d_head", "before"),
        tile_heads("d_head", "before", columns=True),
        tile_heads("d_wide", ""),
    ],
    "skip_rows": [skip_rows("n_skip")],
    "part": [part(0, 2), part(1, 2), part(2, 3), part(1, 2, interleaved=True), part(0, 2, axis=-1),
             part(1, 2, axis=-1, interleaved=True)],
}  # fmt: skip
REFUSED = {"add": add(1.0), "minus_exp": minus_exp()}  # not linear
OF_VECTORS = {"flat": flat(), "squeeze": squeeze(1)}  # of tensors that no method gives low-rank changes for


def matrices_of(rng: np.random.Generator, rank: int, ops: list[Op]) -> tuple[np.ndarray, np.ndarray]:
    """Factors whose product has a shape that every op of the list takes: parts and skipped rows are added up front."""
    rows, columns = N, N
    for op in reversed(ops):
        if op.stored_shape is not None:
            rows, columns = op.stored_shape((rows, columns), SIZES)
    return rng.normal(size=(rows, rank)).astype(np.float32), rng.normal(size=(rank, columns)).astype(np.float32)


def fits(ops: list[Op]) -> bool:
    """permute and tile need their own number of rows; only the shapes after parts and skips have it."""
    try:
        left, right = matrices_of(np.random.default_rng(0), 1, ops)
        dense = left @ right
        for op in ops:
            dense = op.forward(dense, SIZES)
    except ValueError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(
    ops=st.lists(st.sampled_from([op for ops in KINDS.values() for op in ops]), max_size=4).filter(fits),
    rank=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_pairs_equal_the_dense_product(ops: list[Op], rank: int, seed: int) -> None:
    left, right = matrices_of(np.random.default_rng(seed), rank, ops)
    dense = left.astype(np.float64) @ right.astype(np.float64)
    for op in ops:
        dense = op.forward(dense, SIZES)
    mapped_left, mapped_right = through_ops(left, right, ops, SIZES)
    assert mapped_left.shape[1] == mapped_right.shape[0] == rank
    product = mapped_left.astype(np.float64) @ mapped_right.astype(np.float64)
    np.testing.assert_allclose(product, dense, rtol=0, atol=1e-5 * np.abs(dense).max())


@pytest.mark.parametrize("op", REFUSED.values(), ids=list(REFUSED))
def test_maps_that_are_not_linear_are_refused(op: Op) -> None:
    left, right = matrices_of(np.random.default_rng(0), 2, [])
    with pytest.raises(AdapterError, match="merge it instead"):
        through_ops(left, right, [op], SIZES)


def test_no_family_uses_a_map_this_file_leaves_out() -> None:
    used = {op.name.partition("(")[0] for arch in ARCHITECTURES for weight in arch.weights for op in weight.ops}
    assert used <= KINDS.keys() | REFUSED.keys() | OF_VECTORS.keys()

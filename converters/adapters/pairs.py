"""Low-rank pairs through the maps of a family's spec: L·R becomes a pair again, without forming the product.

A map on rows acts on L alone, one on columns on R alone, and transposing swaps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from converters.adapters.methods import Factors
from converters.architectures.spec import Array, Op, Sizes
from edgellm.errors import AdapterError


def through_ops(left: Array, right: Array, ops: Sequence[Op], sizes: Sizes) -> Factors:
    """left (rows, r), right (r, columns) of a stored tensor → those of the tensor in the GGUF.

    AdapterError for a map that isn't linear, or that no low-rank pair passes.
    """
    for op in ops:
        left, right = _through(op, left, right, sizes)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _through(op: Op, left: Array, right: Array, sizes: Sizes) -> Factors:
    if op.affine:
        raise AdapterError(f"a run-time adapter can't pass {op.name}, which isn't linear; merge it instead")
    if op.name == "transpose":
        return right.T, left.T
    if op.axis == "rows":
        return op.forward(left, sizes), right
    if op.axis == "columns" or op.part is not None:
        return left, op.forward(right, sizes)
    raise AdapterError(f"a run-time adapter can't pass {op.name}; merge it instead")

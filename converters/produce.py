"""A plan's tensors as the bytes of the file: read, merged, mapped, quantized; the next one is read meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from converters.architectures.spec import Array, Sizes
from converters.plan import PlannedTensor
from converters.quantize.types import TYPE_IDS
from edgellm.errors import CheckpointError
from edgellm.native.ggml import quantize_rows

_F16_MAX = 65504.0

Pieces = Iterator[NDArray[np.uint8]]


def produce(
    tensors: Sequence[PlannedTensor], sizes: Sizes, n_threads: int = 0
) -> Iterator[tuple[PlannedTensor, Pieces]]:
    """Each tensor with its bytes, in one piece or expert by expert. Take them all before the next tensor.

    CheckpointError for weights that can't be stored.
    """
    largest = max((tensor.n_elements for tensor in tensors), default=0)
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        read: Future[Array] | None = None
        for tensor, after in zip_longest(tensors, tensors[1:]):
            weights = read.result() if read else None
            # Two at a time stay below what the largest needs alone, so that reading ahead costs no memory.
            is_whole = after is not None and after.packed is None and len(after.sources) == 1
            if after and is_whole and 2 * max(tensor.n_elements, after.n_elements) <= largest:
                read = reader.submit(load, after, 0, sizes)
            else:
                read = None
            yield tensor, _pieces(tensor, weights, sizes, n_threads)


def _pieces(tensor: PlannedTensor, weights: Array | None, sizes: Sizes, n_threads: int) -> Pieces:
    """weights: those of the only source, if they have been read already."""
    if tensor.packed is not None:
        yield np.load(tensor.packed, mmap_mode="r")
        return
    if tensor.computed is not None:
        yield quantize_rows(tensor.computed, TYPE_IDS[tensor.type_name], n_threads=n_threads)
    for k in range(len(tensor.sources)):
        yield _quantized(tensor, k, load(tensor, k, sizes) if weights is None else weights, n_threads)


def _quantized(tensor: PlannedTensor, k: int, weights: Array, n_threads: int) -> NDArray[np.uint8]:
    """The k-th source's bytes; each expert has an importance of its own, in a source of its own or all in one."""
    ggml_type, importance = TYPE_IDS[tensor.type_name], tensor.importance
    if importance is None or weights.ndim == 2:
        weighed = importance[k] if importance is not None else None
        return quantize_rows(weights, ggml_type, importance=weighed, n_threads=n_threads)
    experts = zip(weights, importance, strict=True)
    return np.stack([quantize_rows(w, ggml_type, importance=i, n_threads=n_threads) for w, i in experts])


def load(tensor: PlannedTensor, k: int, sizes: Sizes) -> Array:
    """The k-th source, merged and mapped, float32."""
    source = tensor.sources[k]
    weights = source.read()
    _check_finite(source.name, tensor.type_name, weights)
    for op in tensor.ops:
        weights = op.forward(weights, sizes)
    return weights


def load_whole(tensor: PlannedTensor, sizes: Sizes) -> Array:
    """All sources together, float32 of the tensor's shape."""
    parts = [load(tensor, k, sizes) for k in range(len(tensor.sources))]
    return (parts[0] if len(parts) == 1 else np.stack(parts)).reshape(tensor.shape)


def _check_finite(name: str, type_name: str, weights: Array) -> None:
    low, high = float(weights.min()), float(weights.max())  # NaN wins in both: no array of flags is needed
    if not (np.isfinite(low) and np.isfinite(high)):
        n_bad = int(weights.size - np.isfinite(weights).sum())
        raise CheckpointError(f"tensor {name} has {n_bad} values that are not finite; the training run diverged")
    if type_name == "F16" and max(-low, high) > _F16_MAX:
        raise CheckpointError(f"tensor {name} has values up to {max(-low, high):.3g}, beyond F16; use BF16 or F32")

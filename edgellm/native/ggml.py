"""Quantization of rows of weights with ggml's own code, on all cores.

Rows are independent in every ggml type, so slabs of rows go to a thread pool (ctypes releases the GIL) and the
bytes don't depend on how many threads there are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.config import physical_cpu_count
from edgellm.gguf_header import GGML_TYPES
from edgellm.native import library
from edgellm.native.shared import Functions, open_library

F32 = 0
_SLAB_WEIGHTS = 1 << 18  # a slab is some 10 ms of work for the slowest types: small enough to balance two cores


_FUNCTIONS: Functions = {
    "ggml_op_name": (c_char_p, (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
}


@cache
def base_library() -> Any:
    """libggml-base, which lies beside llama.cpp's own library."""
    return open_library(library.load(), "ggml-base", _FUNCTIONS)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")


def row_bytes(ggml_type: int, n_per_row: int) -> int:
    """Bytes of one row of `n_per_row` weights; ValueError where the row isn't a whole number of blocks."""
    name, block, size = GGML_TYPES[ggml_type]
    if n_per_row % block:
        raise ValueError(f"{n_per_row} weights a row are no whole number of {name} blocks ({block})")
    return n_per_row // block * size


def quantize_rows(
    weights: NDArray[np.float32],
    ggml_type: int,
    *,
    importance: NDArray[np.float32] | None = None,
    n_threads: int = 0,
) -> NDArray[np.uint8]:
    """Quantize `weights`, float32 (…, n_per_row), to uint8 (…, row_bytes), as `ggml_quantize_chunk` does.

    importance: float32 (n_per_row,), one non-negative weight per column. n_threads: 0 = all cores.
    ValueError: a row that is no whole number of blocks. Values must be finite (the caller checks).
    """
    n_per_row = weights.shape[-1]
    n_row_bytes = row_bytes(ggml_type, n_per_row)
    rows = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, n_per_row)
    if ggml_type == F32:
        return rows.view(np.uint8).reshape(*weights.shape[:-1], n_row_bytes)
    out = np.empty((len(rows), n_row_bytes), dtype=np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (n_per_row,):
            raise ValueError(f"importance has shape {importance.shape}, expected {(n_per_row,)}")
    importance_pointer = None if importance is None else importance.ctypes.data
    quantize_chunk = base_library().ggml_quantize_chunk

    def quantize_slab(start: int, stop: int) -> None:
        source, target = rows[start:stop], out[start:stop]
        quantize_chunk(
            ggml_type, source.ctypes.data, target.ctypes.data, 0, stop - start, n_per_row, importance_pointer
        )

    step = max(1, _SLAB_WEIGHTS // n_per_row)
    slabs = [(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    if len(slabs) == 1:
        quantize_slab(*slabs[0])
    else:
        list(_pool(n_threads or physical_cpu_count()).map(lambda slab: quantize_slab(*slab), slabs))
    return out.reshape(*weights.shape[:-1], n_row_bytes)

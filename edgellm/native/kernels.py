"""How long ggml's own CPU kernels take for one product of a weight with a vector, as in decoding. No model needed.

The graph has as many copies of the weight as exceed the last-level cache, one product each: in a decode, too, each
weight comes from memory. Every product is a node of its own, quantizes its input anew and ends at a barrier, and the
graph runs on a CPU backend without an attached thread pool: all of it as llama.cpp has it.

Which memory a weight lies in decides about its kernel. llama.cpp (`make_cpu_buft_list`, `select_weight_buft`) takes
the first of the CPU's extra buffer types (AMX, KleidiAI, repack) that supports the product, else plain memory; so
does `repack=True` here. Of a tied head it makes a second tensor of token_embd, which is asked as an output (a product)
and so is repacked like any other weight, beside the plain one that embeddings are looked up in.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.config import physical_cpu_count
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import GGML_TYPES
from edgellm.native import cpu_device, library
from edgellm.native.ggml import F32, quantize_rows, row_bytes
from edgellm.native.shared import Functions, open_library
from edgellm.native.undisturbed import undisturbed

_TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_NO_WEIGHTS = frozenset(("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))  # no kernel has these as its weight

_MIN_WORKING_SET, _MAX_WORKING_SET = 96 << 20, 256 << 20  # bytes
_MAX_WEIGHT = 64 << 20  # bytes; of a larger one a part of the rows is enough
_MAX_COPIES = 4096  # of a tiny weight: its time is threading then, and no cache matters
_CACHES = 3  # as many last-level caches as the working set must fill
_RANDOM_ROWS = 16  # quantized; the weight repeats them
_ROW_STEP = 1024  # a weight too large is cut by multiples of it: no kernel asks for rows in larger groups
_N_GRAPHS = 16  # the copies are run in parts: a shorter run is more likely to be undisturbed
_N_OUTPUTS = 8  # results that are kept: one slot for each of eight products in turn
_ALIGNMENT = 64

_LOAD_COLUMNS = 512  # what llama.cpp asks with when it chooses the buffer type


class _InitParams(ctypes.Structure):
    """ggml.h's ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_BASE_FUNCTIONS: Functions = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_dev_init": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}


@dataclass(frozen=True)
class Weight:
    """A matrix (rows, columns) of a ggml type, as `quantize_rows` stores it: uint8 (rows, row bytes)."""

    ggml_type: int
    n_columns: int
    data: NDArray[np.uint8]


def seconds_per_product(type_name: str, shape: tuple[int, ...], *, n_threads: int = 0, repack: bool = True) -> float:
    """Seconds of one product of a weight (rows, columns) of this type with one float32 vector, on the CPU.

    n_threads: 0 = all cores. repack: the weight lies where llama.cpp puts it with use_extra_bufts, else in plain
    memory. Takes some 0.3 s where nothing else runs, and 100 to 400 MiB; of a large weight a part of the rows is timed.
    ValueError: no type of weights, or no matrix of whole blocks. EdgeLLMError: no memory, or ggml fails.
    """
    ggml_type = check_weight(type_name, shape)
    rows, n_columns = shape
    n_row_bytes = row_bytes(ggml_type, n_columns)
    n_timed = _rows_that_fit(rows, n_row_bytes)
    weight = _random_weight(ggml_type, n_timed, n_columns)
    n_copies = min(_MAX_COPIES, -(-_working_set() // weight.data.nbytes))
    x = np.random.default_rng(1).standard_normal(n_columns, np.float32)
    with products(weight, x, n_copies, n_threads=n_threads, repack=repack) as graphs:
        graphs.run_all()  # touches the pages and starts the threads
        parts = cycle(range(graphs.n_graphs))
        seconds = undisturbed(lambda: graphs.seconds_per_product(next(parts)))
    return seconds * (rows / n_timed)


def check_weight(type_name: str, shape: tuple[int, ...]) -> int:
    """The ggml type's number; ValueError where ggml would abort: no weights' type, no matrix of whole blocks."""
    if type_name not in _TYPE_IDS or type_name in _NO_WEIGHTS:
        raise ValueError(f"{type_name!r} is no type of weights that ggml multiplies with")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"a weight of shape {shape}: expected (rows, columns)")
    row_bytes(_TYPE_IDS[type_name], shape[1])
    return _TYPE_IDS[type_name]


def _rows_that_fit(rows: int, n_row_bytes: int) -> int:
    surplus = rows - max(1, _MAX_WEIGHT // n_row_bytes)
    return rows if surplus <= 0 else max(rows - -(-surplus // _ROW_STEP) * _ROW_STEP, rows % _ROW_STEP or _ROW_STEP)


def _random_weight(ggml_type: int, rows: int, n_columns: int) -> Weight:
    values = np.random.default_rng(0).standard_normal((min(rows, _RANDOM_ROWS), n_columns), np.float32)
    # some types can't do without an importance, and abort
    few = quantize_rows(values, ggml_type, importance=np.ones(n_columns, np.float32), n_threads=1)
    return Weight(ggml_type, n_columns, np.resize(few, (rows, few.shape[1])))


@cache
def _working_set() -> int:
    """Bytes that don't fit the last-level cache, of which only Linux tells the size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        n_bytes = int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        n_bytes = 0
    return min(max(_MIN_WORKING_SET, _CACHES * n_bytes), _MAX_WORKING_SET)


@dataclass(frozen=True)
class Products:
    """Graphs of products that are ready to run. buffer_type: ggml's name of the memory the weights are in."""

    buffer_type: str
    _backend: int
    _graphs: list[tuple[int, int]]  # with the number of products in each
    _slots: NDArray[np.float32]

    @property
    def n_graphs(self) -> int:
        return len(self._graphs)

    def seconds_per_product(self, i: int) -> float:
        """Compute the i-th graph. EdgeLLMError where ggml fails."""
        graph, n = self._graphs[i]
        started = time.perf_counter()
        status = _library().ggml_backend_graph_compute(self._backend, graph)
        if status:
            raise EdgeLLMError(f"ggml could not compute a product (status {status})")
        return (time.perf_counter() - started) / n

    def run_all(self) -> NDArray[np.float32]:
        """Compute all products. Returns the results of the last ones, at most eight: float32 (products, rows)."""
        for i in range(self.n_graphs):
            self.seconds_per_product(i)
        return self._slots.copy()


@contextmanager
def products(
    weight: Weight, x: NDArray[np.float32], n_copies: int, *, n_threads: int = 0, repack: bool = True
) -> Iterator[Products]:
    """The graph of `n_copies` products of copies of `weight` with `x`, float32 (columns,). Everything is freed after.

    EdgeLLMError: not enough memory.
    """
    lib, device = _library(), cpu_device.find(library.load())
    buffer_type = _buffer_type(device, weight, repack)
    with ExitStack() as stack:
        backend = _owned(stack, lib.ggml_backend_free, lib.ggml_backend_dev_init(device, None))
        _set_threads(device, backend, n_threads or physical_cpu_count())
        context = _context(stack, 2 * n_copies + 1)
        weights = _place_weights(stack, context, buffer_type, weight, n_copies)
        nodes, slots = _place_products(stack, context, lib.ggml_backend_dev_buffer_type(device), weights, weight, x)
        n = -(-n_copies // _N_GRAPHS)
        parts = [nodes[i : i + n] for i in range(0, n_copies, n)]
        name = lib.ggml_backend_buft_name(buffer_type).decode()
        yield Products(name, backend, [(_graph(stack, part), len(part)) for part in parts], slots)


def _place_weights(stack: ExitStack, context: int, buffer_type: int, weight: Weight, n_copies: int) -> list[int]:
    lib = _library()
    tensors = [_new_matrix(context, weight) for _ in range(n_copies)]
    stride = _aligned(lib.ggml_backend_buft_get_alloc_size(buffer_type, tensors[0]))
    buffer, base = _buffer(stack, buffer_type, stride * n_copies)
    for i, tensor in enumerate(tensors):
        lib.ggml_backend_tensor_alloc(buffer, tensor, base + i * stride)
    data = np.ascontiguousarray(weight.data)
    lib.ggml_backend_tensor_set(tensors[0], data.ctypes.data, 0, data.nbytes)  # this repacks it
    for i in range(1, n_copies):
        ctypes.memmove(base + i * stride, base, stride)
    return tensors


def _place_products(
    stack: ExitStack, context: int, buffer_type: int, weights: list[int], weight: Weight, x: NDArray[np.float32]
) -> tuple[list[int], NDArray[np.float32]]:
    """The products, and a view of their results. In a model, too, outputs stay in the cache: so few slots for them."""
    lib, rows = _library(), len(weight.data)
    n_slots = min(_N_OUTPUTS, len(weights))
    slot = _aligned(4 * rows)
    buffer, base = _buffer(stack, buffer_type, n_slots * slot + 4 * weight.n_columns)
    column = lib.ggml_new_tensor_2d(context, F32, weight.n_columns, 1)
    lib.ggml_backend_tensor_alloc(buffer, column, base + n_slots * slot)
    x = np.ascontiguousarray(x, np.float32)
    lib.ggml_backend_tensor_set(column, x.ctypes.data, 0, x.nbytes)
    nodes = [lib.ggml_mul_mat(context, tensor, column) for tensor in weights]
    for i, node in enumerate(nodes):
        lib.ggml_backend_tensor_alloc(buffer, node, base + i % n_slots * slot)
    floats = (ctypes.c_float * (n_slots * slot // 4)).from_address(base)
    return nodes, np.ctypeslib.as_array(floats).reshape(n_slots, -1)[:, :rows]


def _graph(stack: ExitStack, nodes: list[int]) -> int:
    lib = _library()
    size = len(nodes) + 1  # its leaves: the weights and the column
    n_bytes = lib.ggml_graph_overhead_custom(size, False)
    context = _owned(stack, lib.ggml_free, lib.ggml_init(_InitParams(n_bytes, None, True)))
    graph = lib.ggml_new_graph_custom(context, size, False)
    for node in nodes:
        lib.ggml_build_forward_expand(graph, node)
    return int(graph)


@cache
def _library() -> Any:
    """libggml-base with the functions of this module declared."""
    return open_library(library.load(), "ggml-base", _BASE_FUNCTIONS)


def _set_threads(device: int, backend: int, n_threads: int) -> None:
    set_n_threads = cpu_device.function(library.load(), device, "ggml_backend_set_n_threads", None, c_void_p, c_int)
    if set_n_threads is not None:
        set_n_threads(backend, n_threads)


def _buffer_type(device: int, weight: Weight, repack: bool) -> int:
    """The type of memory that llama.cpp would load the weight into."""
    can_repack = repack and library.can_repack()
    extra = cpu_device.extra_buffer_types(library.load(), device).values() if can_repack else ()
    found = next((buft for buft in extra if _is_supported(device, buft, weight)), None)
    return found or int(_library().ggml_backend_dev_buffer_type(device))


def _is_supported(device: int, buffer_type: int, weight: Weight) -> bool:
    lib = _library()
    with ExitStack() as stack:
        context = _context(stack, 3)
        tensor = _new_matrix(context, weight)
        inputs = lib.ggml_new_tensor_2d(context, F32, weight.n_columns, _LOAD_COLUMNS)
        product = lib.ggml_mul_mat(context, tensor, inputs)
        buffer, base = _buffer(stack, buffer_type, lib.ggml_backend_buft_get_alloc_size(buffer_type, tensor))
        lib.ggml_backend_tensor_alloc(buffer, tensor, base)
        return bool(lib.ggml_backend_dev_supports_op(device, product))


def _new_matrix(context: int, weight: Weight) -> int:
    return int(_library().ggml_new_tensor_2d(context, weight.ggml_type, weight.n_columns, len(weight.data)))


def _context(stack: ExitStack, n_tensors: int) -> int:
    """A ggml context with room for so many tensors, without their data."""
    lib = _library()
    n_bytes = n_tensors * lib.ggml_tensor_overhead()
    return _owned(stack, lib.ggml_free, lib.ggml_init(_InitParams(n_bytes, None, True)))


def _buffer(stack: ExitStack, buffer_type: int, n_bytes: int) -> tuple[int, int]:
    """A buffer and the address of its memory."""
    lib = _library()
    buffer = _owned(stack, lib.ggml_backend_buffer_free, lib.ggml_backend_buft_alloc_buffer(buffer_type, n_bytes))
    return buffer, int(lib.ggml_backend_buffer_get_base(buffer))


def _owned(stack: ExitStack, free: Any, pointer: int | None) -> int:
    if not pointer:
        raise EdgeLLMError("there is not enough memory to time ggml's kernels; close other programs")
    stack.callback(free, pointer)
    return pointer


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT

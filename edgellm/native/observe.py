"""What goes into each weight's matrix product, seen through llama.cpp's evaluation callback.

The callback gets pointers to `ggml_tensor`, whose layout (ggml.h) is checked against the library's own accessors
before it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import EdgeLLMError
from edgellm.native import library
from edgellm.native.ggml import base_library

_N_SOURCES, _N_DIMS, _N_OP_PARAMS, _N_NAME = 10, 4, 16, 64
_F32, _F16 = 0, 1
_FLOATS = (_F32, _F16)


class _Tensor(ctypes.Structure):
    """ggml.h's ggml_tensor, as far as it is read. ne: sizes, innermost first; nb: strides in bytes."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _N_DIMS),
        ("nb", ctypes.c_size_t * _N_DIMS),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * _N_OP_PARAMS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _N_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _N_NAME),
    )


# Called with a weight's name; a number of its inputs, the same in calls one after the other that have the same inputs;
# the inputs, float32 (matrices, rows, columns), a view that is valid only during the call; and for experts the expert
# of each row, int32 (matrices, rows), else None.
OnInputs = Callable[[str, int, NDArray[np.float32], NDArray[np.int32] | None], object]

# Called with a weight's name, the name of what is added to its product (see `InputWatch.values`), and that, float32
# (rows, columns of the product), a view as above.
OnAdded = Callable[[str, str, NDArray[np.float32]], object]


class InputWatch:
    """Shows the inputs of the chosen weights' matrix products while a context decodes.

    wanted: whether a weight (by its GGUF name) is of interest. last: the tensor of the graph after which nothing more
    is computed, its values being `last_values`. step_by_step: inputs are shown before the product is computed, not
    after, and `replace` may give the weight other values for it.

    An exception of `on_inputs` can't cross native code: it is kept, nothing more is shown, and `raise_error` raises it
    after the decode.
    """

    def __init__(
        self,
        wanted: Callable[[str], bool],
        on_inputs: OnInputs,
        *,
        last: str = "",
        step_by_step: bool = False,
        on_added: OnAdded | None = None,
    ) -> None:
        self._wanted, self._on_inputs, self._on_added = wanted, on_inputs, on_added
        self._last, self.step_by_step = last.encode(), step_by_step
        self.last_values: NDArray[np.float32] | None = None
        self._stopped = False
        self._replaced: dict[str, NDArray[np.float32]] = {}
        self._error: BaseException | None = None
        self._names: dict[int, str | None] = {}  # address of a weight → its name if wanted
        self._products, self._add = _product_ops(), _op_number(b"ADD")
        self._made: dict[int, str] = {}  # address of a product, or of it with its bias → the weight's name
        self._seen: dict[str, int] = {}  # name → address of what was computed last, or went into it
        self.callback: Any = library.load().ggml_backend_sched_eval_callback(self._see)

    def close(self) -> None:
        """Let go of what `on_inputs` holds on to, when no context uses the watch any more: the callback and the watch
        refer to each other, and what a garbage collection finds late may be gigabytes.
        """
        self.callback = None

    def raise_error(self) -> None:
        """The exception that ended the watch, if one did."""
        if self._error is not None:
            raise self._error

    def replace(self, name: str, values: NDArray[np.float32]) -> None:
        """Other values for a wanted weight, of its shape, from its next product on. The model must not be mapped."""
        self._replaced[name] = values

    def values(self, name: str) -> NDArray[np.float32] | None:
        """What a tensor of the graph holds, float32 (rows, columns): a view; None if there was none of that name. Valid
        where the graph still needs it.
        """
        address = self._seen.get(name)
        return None if address is None else _rows_of(_Tensor.from_address(address))

    def _see(self, address: int, ask: bool, _: object) -> bool:
        """llama.cpp asks about each node of the graph in turn, and again once it has computed those it was told yes to.
        What it is told then is whether to go on.
        """
        try:
            if self._stopped:
                return ask
            tensor = _Tensor.from_address(address)
            is_expert = self._products.get(tensor.op)
            name = None if is_expert is None else self._name(tensor.src[0])
            if name is not None and ask == self.step_by_step:
                self._show(name, tensor, bool(is_expert))
            if ask and name is not None and not is_expert:
                self._made[address] = name
            if ask and self._on_added and tensor.op == self._add:
                self._see_sum(address, tensor, self._on_added)
            if ask and self.step_by_step:
                for seen in (address, tensor.src[0], tensor.src[1]):
                    if seen:
                        self._seen[_Tensor.from_address(seen).name.decode("utf-8", "replace")] = seen
            if not ask and self._last and tensor.name == self._last:
                self.last_values = _as_array(tensor, ctypes.c_float, np.float32).copy()
                self._stopped = True
            return not self._stopped and (not ask or self.step_by_step or name is not None or self._is_last(tensor))
        except BaseException as exc:
            self._error, self._stopped = exc, True
            return ask

    def _see_sum(self, address: int, tensor: _Tensor, on_added: OnAdded) -> None:
        for made, other in ((tensor.src[0], tensor.src[1]), (tensor.src[1], tensor.src[0])):
            name = self._made.get(made)
            if name is None:
                continue
            added = _Tensor.from_address(other)
            if list(added.ne) != list(tensor.ne):  # a bias
                self._made[address] = name
            elif (rows := _rows_of(added)) is not None:
                on_added(name, added.name.decode("utf-8", "replace"), rows)
            return

    def _is_last(self, tensor: _Tensor) -> bool:
        return bool(self._last) and bool(tensor.name == self._last)

    def _name(self, address: int) -> str | None:
        if address not in self._names:
            name = _Tensor.from_address(address).name.decode("utf-8", "replace")
            self._names[address] = name if self._wanted(name) else None
        return self._names[address]

    def _show(self, name: str, tensor: _Tensor, is_expert: bool) -> None:
        source = _Tensor.from_address(tensor.src[1])
        if source.type != _F32:
            return
        inputs = _as_array(source, ctypes.c_float, np.float32)
        if not is_expert:
            self._on_inputs(name, tensor.src[1], inputs.reshape(-1, *inputs.shape[-2:]), None)
        else:
            self._show_experts(name, tensor, inputs)
        if name in self._replaced:
            _overwrite(_Tensor.from_address(tensor.src[0]), self._replaced.pop(name))

    def _show_experts(self, name: str, tensor: _Tensor, inputs: NDArray[np.float32]) -> None:
        # inputs: (tokens, 1 or experts used, columns); the experts: (tokens, experts used)
        experts = _as_array(_Tensor.from_address(tensor.src[2]), ctypes.c_int32, np.int32)[0, 0]
        rows = np.broadcast_to(inputs[0], (*experts.shape, inputs.shape[-1]))
        self._on_inputs(name, tensor.src[1], rows.transpose(1, 0, 2), experts.T)


def _overwrite(tensor: _Tensor, values: NDArray[np.float32]) -> None:
    if tensor.type not in _FLOATS:
        raise EdgeLLMError(f"tensor {tensor.name.decode()} isn't stored as floats: it can't be given other values")
    data = values.astype(np.float32) if tensor.type == _F32 else values.astype(np.float16)
    if data.size != np.prod(list(tensor.ne)):
        raise EdgeLLMError(f"tensor {tensor.name.decode()} has another shape than {data.shape}")
    ctypes.memmove(tensor.data, np.ascontiguousarray(data).ctypes.data, data.nbytes)


def _rows_of(tensor: _Tensor) -> NDArray[np.float32] | None:
    if tensor.type != _F32:
        return None
    return _as_array(tensor, ctypes.c_float, np.float32).reshape(-1, tensor.ne[0])


def _as_array(tensor: _Tensor, c_type: Any, dtype: Any) -> NDArray[Any]:
    """A view of a tensor in this process's memory, outermost dimension first, whatever its strides."""
    n_bytes = sum((n - 1) * stride for n, stride in zip(tensor.ne, tensor.nb, strict=True)) + ctypes.sizeof(c_type)
    memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    return np.ndarray(shape, dtype, memory, strides=strides)


@cache
def _product_ops() -> dict[int, bool]:
    """ggml's numbers of the matrix products → whether it is the one by experts. EdgeLLMError: an unknown layout."""
    _check_layout(base_library())
    return {_op_number(b"MUL_MAT"): False, _op_number(b"MUL_MAT_ID"): True}


@cache
def _op_number(name: bytes) -> int:
    ggml = base_library()
    return next(i for i in range(60) if ggml.ggml_op_name(i) == name)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _check_layout(ggml: ctypes.CDLL) -> None:
    """Make a product in ggml and find its parts where the structure says they are."""
    pointer = ctypes.c_void_p
    for function, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_free", None, [pointer]),
    ):
        getattr(ggml, function).restype = result
        getattr(ggml, function).argtypes = arguments
    context = ggml.ggml_init(_InitParams(1 << 16, None, False))
    try:
        a, b = (ggml.ggml_new_tensor_2d(context, _F32, 4, n) for n in (3, 2))
        made = ggml.ggml_mul_mat(context, a, b)
        ggml.ggml_set_name(made, b"checked")
        seen = _Tensor.from_address(made)
        fits = (
            seen.name == b"checked"
            and ggml.ggml_op_name(seen.op) == b"MUL_MAT"
            and (seen.src[0], seen.src[1], seen.src[2]) == (a, b, None)
            and list(seen.ne) == [3, 2, 1, 1]
            and list(seen.nb) == [4, 12, 24, 24]
            and seen.data == ggml.ggml_get_data(made)
        )
    finally:
        ggml.ggml_free(context)
    if not fits:
        raise EdgeLLMError("this llama.cpp lays out its tensors otherwise than edgellm knows; install another version")

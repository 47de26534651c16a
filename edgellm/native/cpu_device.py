"""ggml's CPU device, and its buffer types beside plain memory: there weights lie as its faster kernels want them.

bindings: the module that `library.load` returns.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_void_p
from functools import cache
from typing import Any

from edgellm.errors import EdgeLLMError
from edgellm.native.shared import Functions, open_library

_CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def find(bindings: Any) -> int:
    """The device's address. EdgeLLMError: this build has none."""
    device = _registry(bindings).ggml_backend_dev_by_type(_CPU_DEVICE)
    if not device:
        raise EdgeLLMError("this build of llama.cpp has no CPU backend; reinstall it: pip install llama-cpp-python")
    return int(device)


def function(bindings: Any, device: int, name: str, result: Any, *arguments: Any) -> Any:
    """A function of the CPU backend, by the way llama.cpp gets it; None where the backend has none of that name."""
    base = _base(bindings)
    address = base.ggml_backend_reg_get_proc_address(base.ggml_backend_dev_backend_reg(device), name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


def extra_buffer_types(bindings: Any, device: int) -> dict[str, int]:
    """ggml's name → address, in the order in which llama.cpp tries them for a weight.

    ggml makes the list the first time that anybody asks, and keeps it as long as the process lives.
    """
    get_types = function(bindings, device, "ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)
    listed = get_types(device) if get_types is not None else None
    types: dict[str, int] = {}
    while listed and listed[len(types)]:  # ends with a null pointer
        address = listed[len(types)]
        types[_base(bindings).ggml_backend_buft_name(address).decode()] = address
    return types


@cache
def _registry(bindings: Any) -> Any:
    return open_library(bindings, "ggml", {"ggml_backend_dev_by_type": (c_void_p, (c_int,))})


@cache
def _base(bindings: Any) -> Any:
    functions: Functions = {
        "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
        "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
        "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    }
    return open_library(bindings, "ggml-base", functions)

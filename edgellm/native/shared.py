"""ggml's shared libraries, which lie beside llama.cpp's own. bindings: the module that `library.load` returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Functions: TypeAlias = Mapping[str, tuple[Any, tuple[Any, ...]]]  # name → ctypes of the result and of the arguments


def folder(bindings: Any) -> Path:
    """Where they lie."""
    return Path(bindings.__file__).parent / "lib"


def open_library(bindings: Any, name: str, functions: Functions) -> Any:
    """The library `name` ("ggml", "ggml-base"), with these functions declared."""
    lib = bindings.load_shared_library(name, folder(bindings))
    for function_name, (result, arguments) in functions.items():
        function = getattr(lib, function_name)
        function.restype, function.argtypes = result, arguments
    return lib

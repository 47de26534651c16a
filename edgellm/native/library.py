"""Loads llama.cpp's shared library once, and routes what it logs into `logging` instead of stderr.

Only the ctypes module of llama-cpp-python is imported: its package also pulls in numpy, jinja2 and a disk cache,
which take four times as long as everything edgellm needs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

from edgellm.errors import EdgeLLMError
from edgellm.native import amx

logger = logging.getLogger(__name__)

# ggml's levels; 5 continues the line before. llama-cpp-python's own table has them wrong.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5
_KEPT_ERRORS = 8

PACKAGE = "llama_cpp"

_load_lock = threading.Lock()
_bindings: Any = None
_can_repack = True
_log_callback: Any = None  # ctypes keeps no reference of its own
_log = threading.local()  # per thread: the unfinished line, its level, and the last error lines


def load() -> Any:
    """The low-level bindings module (`llama_cpp.llama_cpp`), its library initialised. EdgeLLMError if it can't load."""
    global _bindings, _can_repack
    if _bindings is None:
        with _load_lock:
            if _bindings is None:
                os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort must not start a debugger
                bindings = _import_bindings()
                _route_log(bindings)
                bindings.llama_backend_init()
                _can_repack = amx.keep_out(bindings)
                _bindings = bindings
    return _bindings


def can_repack() -> bool:
    """Whether weights may lie in memory of the kernels' own layouts: not where that crashes (see `native.amx`)."""
    load()
    return _can_repack


def version() -> str:
    """Of llama-cpp-python; "" if it doesn't say. Read from its source: importlib.metadata takes 15 ms to import."""
    with contextlib.suppress(OSError):
        source = Path(load().__file__).with_name("__init__.py").read_text(encoding="utf-8")
        if found := re.search(r"__version__ = [\"'](.+?)[\"']", source):
            return found[1]
    return ""


def claim_log() -> None:
    """Route the log to us again: `import llama_cpp` anywhere in the process installs a printing callback."""
    load().llama_log_set(_log_callback, None)


def forget_errors() -> None:
    """Start a native call whose failure `last_error` shall explain. Errors are kept for each thread."""
    _log.errors = []


def last_error(default: str) -> str:
    """What the native library said, on this thread, since `forget_errors`: one line, or `default`."""
    lines = getattr(_log, "errors", [])
    # The first error names the cause, the later ones say that the callers failed too.
    return lines[0].rsplit("error loading model: ", 1)[-1] if lines else default


def _import_bindings() -> Any:
    try:
        if "llama_cpp" in sys.modules:
            return importlib.import_module("llama_cpp.llama_cpp")
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("the package llama-cpp-python is not installed")
        # A bare stand-in for the package lets its submodule load without its __init__; taken away at once,
        # so that a real `import llama_cpp` elsewhere still works and shares the submodule.
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["llama_cpp"] = package
        try:
            return importlib.import_module("llama_cpp.llama_cpp")
        finally:
            del sys.modules["llama_cpp"]
    except (ImportError, OSError, RuntimeError, AttributeError) as exc:
        raise EdgeLLMError(f"llama.cpp can't be loaded ({exc}); reinstall it: pip install llama-cpp-python") from exc


def _route_log(bindings: Any) -> None:
    global _log_callback

    @bindings.llama_log_callback  # type: ignore[untyped-decorator]
    def callback(level: int, text: bytes, _: object) -> None:
        with contextlib.suppress(Exception):  # logging may be half gone when the interpreter exits
            _take_log(level, text.decode("utf-8", "replace"))

    _log_callback = callback
    bindings.llama_log_set(callback, None)


def _take_log(level: int, text: str) -> None:
    if level != _CONTINUE:
        _log.level = _LEVELS.get(level, logging.DEBUG)
    line = getattr(_log, "line", "") + text
    if not line.endswith("\n"):
        _log.line = line
        return
    _log.line = ""
    severity = getattr(_log, "level", logging.DEBUG)
    if severity >= logging.ERROR:
        _log.errors = [*getattr(_log, "errors", []), line.strip()][-_KEPT_ERRORS:]
    if line.strip(" .\n"):  # llama.cpp draws its load progress with dots
        logger.log(severity, "%s", line.rstrip())

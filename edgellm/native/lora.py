"""LoRA adapters in native memory, and which of them a context adds from which position on.

An adapter belongs to a model and may be used by several of its contexts. llama.cpp frees what is left of them with
the model; one that is closed earlier must not be in use by any context.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any

from edgellm.errors import AdapterError
from edgellm.gguf_adapter import AdapterFile
from edgellm.native import library
from edgellm.native.model import NativeModel

_NEVER = sys.maxsize


class Adapter:
    """A LoRA loaded beside its model. AdapterError where llama.cpp refuses it."""

    def __init__(self, model: NativeModel, file: AdapterFile) -> None:
        self.file = file
        self._lib = library.load()
        library.forget_errors()
        self.pointer = self._lib.llama_adapter_lora_init(model.pointer, os.fsencode(file.path))
        if not self.pointer:
            reason = library.last_error("llama.cpp gave no reason")
            raise AdapterError(f"cannot load the adapter {file.path}: {reason}; export it again")

    def close(self) -> None:
        """Free it. No context may use it any more, and the model must still be there. Twice is fine."""
        if self.pointer:
            self._lib.llama_adapter_lora_free(self.pointer)
            self.pointer = None


class ActiveAdapters:
    """The adapters of one context, by weight; an activated one is on only from its invocation in the prompt.

    Methods that take a context's pointer are called with its lock held.
    """

    def __init__(self, adapters: Sequence[tuple[Adapter, float]] = ()) -> None:
        self._lib = library.load()
        n = len(adapters)
        self._pointers = (self._lib.llama_adapter_lora_p_ctypes * n)(*(adapter.pointer for adapter, _ in adapters))
        self._scales = (ctypes.c_float * n)(*(scale for _, scale in adapters))
        self._invocation = next((adapter.file.invocation for adapter, _ in adapters if adapter.file.invocation), ())
        self._starts_at = _NEVER if self._invocation else 0

    def begin(self, tokens: Sequence[int]) -> int:
        """Find where a prompt switches the adapters on. Returns how much of a memory made before stays valid."""
        if not self._invocation:
            return len(tokens)
        before, self._starts_at = self._starts_at, _last_occurrence(tokens, self._invocation)
        return len(tokens) if before == self._starts_at else min(before, self._starts_at)

    def switch(self, pointer: Any, position: int) -> None:
        """Put on the adapters that hold at this position; llama.cpp does nothing where they are on already."""
        n = len(self._pointers) if position >= self._starts_at else 0
        self._lib.llama_set_adapters_lora(pointer, self._pointers, n, self._scales)

    def reach(self, position: int) -> int:
        """How many tokens from this position on can be evaluated together."""
        return self._starts_at - position if position < self._starts_at else _NEVER


def _last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    n, wanted = len(wanted), list(wanted)
    tokens = list(tokens)
    return next((i for i in range(len(tokens) - n, -1, -1) if tokens[i : i + n] == wanted), _NEVER)

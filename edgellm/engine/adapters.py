"""Which LoRA adapters a model has loaded, and which of them are in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from edgellm.errors import AdapterError
from edgellm.gguf_adapter import check_adapter
from edgellm.gguf_header import GGUFHeader
from edgellm.native.lora import Adapter
from edgellm.native.model import NativeModel

Lora: TypeAlias = str | Path | tuple[str | Path, float]  # a GGUF, at its own strength or at `scale` times that

_Key = tuple[Path, int, int]  # a file, its size and time: a file that was written anew is loaded anew


class LoadedAdapters:
    """The adapters of one model. Who uses it holds the model's turn."""

    def __init__(self, model: GGUFHeader) -> None:
        self._model = model
        self._loaded: dict[_Key, Adapter] = {}
        self.in_use: tuple[tuple[Adapter, float], ...] = ()

    def choose(self, native: NativeModel, adapters: Sequence[Lora]) -> bool:
        """Load what isn't yet and put it in use. False if nothing changed. After AdapterError all is as before."""
        wanted: dict[_Key, float] = {}
        for path, scale in map(_pair, adapters):
            key = _key(path)
            wanted[key] = wanted.get(key, 0.0) + scale
        checked = {key: check_adapter(key[0], self._model) for key in wanted if key not in self._loaded}
        try:
            for key, file in checked.items():
                self._loaded[key] = Adapter(native, file)
            chosen = tuple((self._loaded[key], scale) for key, scale in wanted.items())
            if len(chosen) > 1 and any(adapter.file.invocation for adapter, _ in chosen):
                raise AdapterError("an activated LoRA can't be used together with other adapters; give it alone")
        except AdapterError:
            self.free_unused()
            raise
        changed = chosen != self.in_use
        self.in_use = chosen
        return changed

    def free_unused(self) -> None:
        """Free what is no longer in use. No context may use it."""
        used = {id(adapter) for adapter, _ in self.in_use}
        for key, adapter in tuple(self._loaded.items()):
            if id(adapter) not in used:
                del self._loaded[key]
                adapter.close()


def _pair(adapter: Lora) -> tuple[Path, float]:
    path, scale = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    if not math.isfinite(scale):
        raise AdapterError(f"the scale of {path} is {scale}; give a finite number")
    return Path(path), scale


def _key(path: Path) -> _Key:
    try:
        state = path.stat()
        return path.resolve(), state.st_size, state.st_mtime_ns
    except OSError as exc:
        raise AdapterError(f"cannot read the adapter {path}: {exc.strerror or exc}; check the path") from exc

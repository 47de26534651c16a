"""How a model is loaded and how its next token is chosen: plain data, checked when made."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

LoadMode = Literal["mmap", "repack", "mlock"]
KVType = Literal["f16", "bf16", "f32", "q8_0"]

DEFAULT_N_CTX = 4096
DEFAULT_N_BATCH = 512
DEFAULT_KV_TYPE: KVType = "f16"
DEFAULT_LOAD_MODE: LoadMode = "repack"
RANDOM_SEED = 0xFFFFFFFF


def physical_cpu_count() -> int:
    """Cores this process may use: the affinity mask, or all of them where the system has none."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory this machine has."""
    if sys.platform == "win32":
        return _windows_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _windows_memory() -> int:
    import ctypes

    # MEMORYSTATUSEX (sysinfoapi.h): two 32-bit fields, then 64-bit ones, the total of physical memory first
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined, unused-ignore]
    return int(status[1])


@dataclass(frozen=True)
class LoadParams:
    """How to load a GGUF. What isn't given (None, and 0 threads) is what `edgellm tune` found for this model on this
    machine; without that, or with tuned=False, the default below.

    n_ctx: tokens of context; 0 = what the model was trained with. A model trained with less gets less.
    n_batch: most tokens one decode call takes (512). n_threads: every core this process may use.
    kv_type: data type of the KV cache (f16). flash_attn: llama.cpp chooses.
    load_mode (repack): "mmap" shares the file's pages between processes; "repack" copies repackable weights into a
    faster layout (more memory); "mlock" is mmap and pins the pages.
    n_gpu_layers: layers offloaded to a GPU (Metal); -1 = all. Nothing happens on a CPU-only build.
    """

    n_ctx: int = DEFAULT_N_CTX
    n_batch: int | None = None
    n_threads: int = 0
    kv_type: KVType | None = None
    flash_attn: bool | None = None
    load_mode: LoadMode | None = None
    n_gpu_layers: int = -1
    tuned: bool = True

    def __post_init__(self) -> None:
        _check(self.n_ctx >= 0, "n_ctx", self.n_ctx, "0 or more tokens")
        _check(self.n_batch is None or self.n_batch >= 1, "n_batch", self.n_batch, "at least 1 token")
        _check(self.n_threads >= 0, "n_threads", self.n_threads, "0 (all cores) or more")
        kv_type = self.kv_type or DEFAULT_KV_TYPE
        _check(kv_type in ("f16", "bf16", "f32", "q8_0"), "kv_type", kv_type, "f16, bf16, f32 or q8_0")
        fits = kv_type in ("f16", "bf16", "f32") or self.flash_attn is not False
        _check(fits, "kv_type", kv_type, "f16, bf16 or f32 when flash_attn is off")
        load_mode = self.load_mode or DEFAULT_LOAD_MODE
        _check(load_mode in ("mmap", "repack", "mlock"), "load_mode", load_mode, "mmap, repack or mlock")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy: temperature 0 ignores the other filters.

    max_tokens: None = until the model stops or the context is full. top_k 0, top_p 1 and min_p 0 are off.
    repeat_penalty 1, presence_penalty 0 and frequency_penalty 0 are off; they look back penalty_last_n tokens
    (-1 = the whole context). seed None = a new one for each call.
    stop: generation ends before any of these strings, which aren't part of the text.
    shown_tokens: texts of control tokens, which otherwise stand for no text, that shall be part of the answer.
    schema, regex, lark: at most one of them, the form of the answer: a JSON Schema (mapping, text, or Pydantic model),
    a regular expression, a Lark grammar as llguidance reads it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shown_tokens: tuple[str, ...] = ()
    schema: Any = None
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        for name, given in (("stop", self.stop), ("shown_tokens", self.shown_tokens)):
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        _check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        _check(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(0 < self.repeat_penalty < float("inf"), "repeat_penalty", self.repeat_penalty, "above 0")
        _check(self.penalty_last_n >= -1, "penalty_last_n", self.penalty_last_n, "-1 or more")
        _check(self.seed is None or 0 <= self.seed < RANDOM_SEED, "seed", self.seed, "from 0 to 2**32 - 2")
        _check(all(self.stop), "stop", self.stop, "non-empty strings")
        forms = [name for name in ("schema", "regex", "lark") if getattr(self, name) is not None]
        _check(len(forms) <= 1, " and ".join(forms), "given", "one of them")

    @property
    def is_constrained(self) -> bool:
        """Whether the answer has a given form."""
        return self.schema is not None or self.regex is not None or self.lark is not None


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it takes {allowed}")

"""What a model will take of this machine's memory, worked out from its header before native code is asked for it.

Linux hands out memory it hasn't got and kills the process that then writes to it, so that a context that is too large
must be refused beforehand. KV memory is exact for plain transformers (the tests compare it with llama.cpp's log), the
buffers of the computation are a rough guess, and so is what repacking copies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edgellm.config import (
    DEFAULT_KV_TYPE,
    DEFAULT_LOAD_MODE,
    DEFAULT_N_BATCH,
    KVType,
    LoadMode,
    LoadParams,
    total_memory,
)
from edgellm.errors import GenerationError
from edgellm.gguf_header import GGML_TYPES, GGUFHeader

# the types that some CPU's repack, KleidiAI or AMX buffer takes
_REPACKED = frozenset(("Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"))
_KV_TYPE_IDS = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
_CELLS = 256  # llama.cpp rounds a context up to a whole number of these
_PROGRAM = 48 << 20  # bytes of the interpreter, the library and the vocabulary
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes. mapped: of the file, which the system may drop and read again. The others have to be there: copied
    (weights in a faster layout), kv (the context), compute (a decode's buffers; rough).
    """

    mapped: int
    copied: int
    kv: int
    compute: int

    @property
    def resident(self) -> int:
        return self.copied + self.kv + self.compute + _PROGRAM


@dataclass(frozen=True)
class Memory:
    """Bytes this process may have: free now (what only caches files counts as free), and at all."""

    available: int
    total: int


def memory_need(header: GGUFHeader, params: LoadParams) -> MemoryNeed:
    """What loading with `params` takes, LoRAs and drafts aside."""
    load_mode = params.load_mode or DEFAULT_LOAD_MODE
    n_ctx = context_length(header, params.n_ctx)
    weights = sum(tensor.n_bytes for tensor in header.tensors.values())
    copied = _repacked_bytes(header) if load_mode == "repack" else weights if load_mode == "mlock" else 0
    kv = kv_bytes(header, n_ctx, params.kv_type or DEFAULT_KV_TYPE)
    mapped = 0 if load_mode == "mlock" else weights - copied
    n_batch = min(params.n_batch or DEFAULT_N_BATCH, n_ctx)
    return MemoryNeed(mapped, copied, kv, _compute_bytes(header, n_ctx, n_batch, params.flash_attn is not False))


def check_fits(header: GGUFHeader, params: LoadParams, memory: Memory | None = None) -> None:
    """GenerationError, with the figures and what would fit, for a model that this machine has no memory for."""
    memory = memory or available_memory()
    advice = what_fits(header, params, memory)
    if not advice:
        return
    need = memory_need(header, params)
    raise GenerationError(
        f"{header.path.name} needs {_gb(need.resident + need.mapped)} of memory ({_gb(need.copied + need.mapped)} "
        f"weights, {_gb(need.kv)} for a context of {context_length(header, params.n_ctx)} tokens); this machine has "
        f"{_gb(memory.available)} free of {_gb(memory.total)}; {advice}"
    )


def what_fits(header: GGUFHeader, params: LoadParams, memory: Memory) -> str:
    """What would fit, if loading it as asked doesn't: the largest context, as it was to be loaded or mapped; or ""."""
    if _fits(memory_need(header, params), memory):
        return ""
    modes: tuple[LoadMode | None, ...] = (params.load_mode, "mmap")
    for mode in modes:
        n_ctx = _largest_context(header, params, mode, memory)
        if n_ctx:
            option = "" if mode == params.load_mode else " and load_mode mmap (--load-mode mmap)"
            whole = n_ctx >= context_length(header, params.n_ctx)
            said = (
                "load with load_mode mmap (--load-mode mmap)" if whole else f"load with n_ctx {n_ctx} (--n-ctx){option}"
            )
            return f"{said}, which fits"
    return "convert the model to a smaller type (edgellm convert --max-size), or free some memory"


def _fits(need: MemoryNeed, memory: Memory) -> bool:
    return need.resident <= memory.available and need.resident + need.mapped <= memory.total


def _largest_context(header: GGUFHeader, params: LoadParams, mode: LoadMode | None, memory: Memory) -> int:
    n_ctx = context_length(header, params.n_ctx)
    while n_ctx >= _CELLS:
        need = memory_need(header, replace(params, n_ctx=n_ctx, load_mode=mode))
        if _fits(need, memory):
            return n_ctx
        n_ctx = n_ctx // 2 // _CELLS * _CELLS
    return 0


def context_length(header: GGUFHeader, n_ctx: int) -> int:
    """The n_ctx that a model gets when so much is asked for: never more than it was trained with."""
    trained = _number(header, "context_length")
    return min(n_ctx or trained or _CELLS, trained or n_ctx or _CELLS)


def kv_bytes(header: GGUFHeader, n_ctx: int, kv_type: KVType) -> int:
    """Bytes of keys and values of a whole context, and of the states of recurrent layers."""
    if header.metadata.get(f"{header.architecture}.attention.causal") is False:
        return 0  # an encoder keeps nothing
    _, block, size = GGML_TYPES[_KV_TYPE_IDS[kv_type]]
    n_cells = -(-n_ctx // _CELLS) * _CELLS
    return n_cells * sum(_kv_widths(header)) * size // block + _recurrent_bytes(header)


def _kv_widths(header: GGUFHeader) -> list[int]:
    """Of each layer that has a cache: its keys' and values' elements for one token."""
    n_layer = _number(header, "block_count")
    heads_kv = _per_layer(header, "attention.head_count_kv", n_layer) or _per_layer(
        header, "attention.head_count", n_layer
    )
    n_head = max(_per_layer(header, "attention.head_count", n_layer), default=0)
    usual = _number(header, "embedding_length") // n_head if n_head else 0
    sliding = _per_layer(header, "attention.sliding_window_pattern", n_layer)
    n_own = n_layer - _number(header, "attention.shared_kv_layers")  # the last ones may use earlier layers' keys
    interval = _number(header, "full_attention_interval")  # the layers between are recurrent
    widths = []
    for layer, n_heads in enumerate(heads_kv[:n_own]):
        if interval and (layer + 1) % interval:
            continue
        ending = "_swa" if layer < len(sliding) and sliding[layer] else ""
        per_head = sum(
            _number(header, f"attention.{kind}_length{ending}") or _number(header, f"attention.{kind}_length") or usual
            for kind in ("key", "value")
        )
        widths.append(n_heads * per_head)
    return widths


def _recurrent_bytes(header: GGUFHeader) -> int:
    """llama.cpp's states of Mamba's kind, float32; of every layer, though some may have none."""
    inner, state = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
    convolved = inner + 2 * _number(header, "ssm.group_count") * state
    one = max(0, _number(header, "ssm.conv_kernel") - 1) * convolved + inner * state
    return 4 * one * _number(header, "block_count")


def _compute_bytes(header: GGUFHeader, n_ctx: int, n_batch: int, flash_attn: bool) -> int:
    """Activations of a batch and its mask; without flash attention also every head's scores."""
    n_layer = _number(header, "block_count")
    feed_forward = max(_per_layer(header, "feed_forward_length", n_layer), default=0)
    n_used = max(1, _number(header, "expert_used_count"))
    n_head = max(_per_layer(header, "attention.head_count", n_layer), default=0)
    width = 2 * feed_forward * n_used + 4 * _number(header, "embedding_length")
    scores = n_ctx if flash_attn else (n_head + 1) * n_ctx
    vocabulary = header.metadata.get("tokenizer.ggml.tokens", ())
    outputs = min(n_batch, 32) * len(vocabulary)
    return 4 * (n_batch * (width + scores) + outputs)


def _repacked_bytes(header: GGUFHeader) -> int:
    return sum(
        tensor.n_bytes
        for name, tensor in header.tensors.items()
        if tensor.type_name in _REPACKED and len(tensor.shape) > 1 and not name.startswith("token_embd")
    )


def _number(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", 0)
    return value if isinstance(value, int) and value > 0 else 0


def _per_layer(header: GGUFHeader, key: str, n_layer: int) -> Sequence[int]:
    """A number for each layer, where the file has one for all or a list; empty where it has none."""
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, list):
        return [int(item) for item in value if isinstance(item, int)]
    return [value] * n_layer if isinstance(value, int) and value > 0 else []


def available_memory() -> Memory:
    """Of this machine, or of the container (cgroup) this process is confined to."""
    total = total_memory()
    available = total if sys.platform != "linux" else _available_on_linux(total)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None:
        total = min(total, limit)
        available = min(available, max(0, limit - (used or 0) + (_cgroup_file_cache() or 0)))
    return Memory(available, total)


def _available_on_linux(total: int) -> int:
    with suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total


def _cgroup(name: str) -> int | None:
    """A figure of the control group's root, as a container sees it; None where there is none, or no limit."""
    with suppress(OSError, ValueError):
        return int((_CGROUP / name).read_text())
    return None


def _cgroup_file_cache() -> int | None:
    """Bytes of files in the group's memory, which the kernel gives back when they are wanted."""
    with suppress(OSError, ValueError):
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith("file "):
                return int(line.split()[1])
    return None


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes < 1e10 else f"{n_bytes / 1e9:.0f} GB"

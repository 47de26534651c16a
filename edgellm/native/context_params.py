"""What a context is made with: llama.cpp's parameters, a batch, and a flag that stops a decode."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from edgellm.config import DEFAULT_KV_TYPE, DEFAULT_N_BATCH, LoadParams, physical_cpu_count

_KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # ggml type ids


def flag_reader(lib: Any) -> tuple[Any, Any]:
    """An abort callback with the flag it reads: no Python runs inside a decode, which asks hundreds of times.

    C's strlen is that callback: of a two-byte buffer it gives 0 (go on) or 1 (abort) by the first byte.
    """
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    return ctypes.cast(libc.strlen, lib.ggml_abort_callback), ctypes.create_string_buffer(2)


def context_params(lib: Any, params: LoadParams, n_ctx: int, n_outputs: int) -> Any:
    """llama.cpp's own, as `params` has them."""
    native = lib.llama_context_default_params()
    native.n_ctx = n_ctx
    native.n_batch = native.n_ubatch = min(params.n_batch or DEFAULT_N_BATCH, n_ctx)
    native.n_outputs_max = min(n_outputs, native.n_batch)
    native.n_outputs_max_per_seq = 0
    native.n_threads = native.n_threads_batch = params.n_threads or physical_cpu_count()
    native.type_k = native.type_v = _KV_TYPES[params.kv_type or DEFAULT_KV_TYPE]
    flash_attention = {
        None: lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
        True: lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        False: lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }
    native.flash_attn_type = flash_attention[params.flash_attn]
    native.no_perf = True
    native.swa_full = True  # without it a sliding-window model can't take back the end of a conversation
    return native


def new_batch(lib: Any, n_batch: int, n_embd: int = 0) -> Any:
    """A batch for n_batch tokens of one sequence; with n_embd for as many hidden states. For llama_batch_free."""
    batch = lib.llama_batch_init(n_batch, n_embd, 1)
    for i in range(n_batch):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    return batch

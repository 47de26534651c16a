"""All of a text through a model in one go: one batch, one evaluation of the graph, for a watch to look at."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.config import LoadParams
from edgellm.errors import GenerationError
from edgellm.native import library
from edgellm.native.context_params import context_params, new_batch
from edgellm.native.model import NativeModel
from edgellm.native.observe import InputWatch

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ

Tokens = Sequence[Sequence[int]]  # of sequences that are equally long
States = NDArray[np.float32]  # (sequences, tokens, n_embd)


def sweep(path: Path, inputs: Tokens | States, watch: InputWatch, *, n_threads: int = 0) -> None:
    """Evaluate all sequences, at most MAX_SEQUENCES of the same length, each on its own, in a single batch.

    inputs: tokens, or the hidden states to go on from. The watch sees the rows of one sequence after those of another.
    A watch that goes step by step may replace weights. GenerationError where llama.cpp fails; what the watch raised.
    """
    if isinstance(inputs, np.ndarray) and inputs.ndim != 3:
        raise ValueError(f"states of shape {inputs.shape}, expected (sequences, tokens, n_embd)")
    n_seq, n = len(inputs), len(inputs[0])
    lib = library.load()
    with closing(NativeModel(path, load_mode="copy" if watch.step_by_step else "mmap", n_gpu_layers=0)) as native:
        params = context_params(lib, LoadParams(n_batch=n_seq * n, n_threads=n_threads), n_seq * _padded(n), n_seq * n)
        params.n_batch = params.n_ubatch = params.n_outputs_max = n_seq * n
        params.n_seq_max = n_seq
        params.cb_eval = watch.callback
        library.forget_errors()
        context = lib.llama_init_from_model(native.pointer, params)
        if not context:
            reason = library.last_error("out of memory?")
            raise GenerationError(f"cannot evaluate {n_seq * n} tokens at once: {reason}; calibrate with fewer")
        try:
            _decode(lib, context, inputs)
        finally:
            lib.llama_free(context)
            watch.close()
    watch.raise_error()


def _padded(n: int) -> int:
    return -(-n // 256) * 256  # llama.cpp gives each sequence a whole number of these


def _decode(lib: Any, context: Any, inputs: Tokens | States) -> None:
    n_seq, n = len(inputs), len(inputs[0])
    total = n_seq * n
    states = np.ascontiguousarray(inputs, np.float32) if isinstance(inputs, np.ndarray) else None
    batch = new_batch(lib, total, 0 if states is None else states.shape[-1])
    try:
        batch.n_tokens = total
        if states is not None:
            ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
        else:
            tokens = np.array(inputs, np.int32)
            ctypes.memmove(batch.token, tokens.ctypes.data, tokens.nbytes)
        positions = np.tile(np.arange(n, dtype=np.int32), n_seq)
        ctypes.memmove(batch.pos, positions.ctypes.data, positions.nbytes)
        ctypes.memmove(batch.logits, b"\1" * total, total)
        for i in range(total):
            batch.seq_id[i][0] = i // n
        code = lib.llama_decode(context, batch)
    finally:
        lib.llama_batch_free(batch)
    if code:
        reason = library.last_error("llama.cpp gave no reason")
        raise GenerationError(f"llama.cpp could not evaluate {total} tokens (code {code}): {reason}")

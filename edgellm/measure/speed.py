"""How fast a model reads and writes on this machine: a few seconds' look, not a benchmark."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np

from edgellm.config import LoadMode, LoadParams
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.undisturbed import undisturbed

_N_WRITTEN, _ROUNDS = 24, 3
_N_STEPS = 32


def decode_seconds_per_token(path: Path, *, n_threads: int = 0, repack: bool = True) -> float:
    """Seconds of decoding one token on the CPU at the beginning of a context, see `undisturbed`."""
    load_mode: LoadMode = "repack" if repack else "mmap"
    with closing(NativeModel(path, load_mode=load_mode, n_gpu_layers=0)) as model:
        params = LoadParams(n_ctx=_N_STEPS, n_threads=n_threads)
        with closing(Context(model, params)) as context:
            return undisturbed(lambda: _seconds_of_step(context))


def _seconds_of_step(context: Context) -> float:
    if len(context.tokens) in (0, context.n_ctx):
        context.reuse_prefix(())
        context.decode([0])
        context.step(context.likeliest(np))  # the first one after a pause wakes the threads
    started = time.perf_counter()
    context.step(context.likeliest(np))
    return time.perf_counter() - started


def measure_speed(path: Path, tokens: Sequence[int]) -> dict[str, float]:
    """Tokens per second of reading `tokens` as a prompt and of writing after it: medians of three rounds."""
    prompt, decode = [], []
    with closing(NativeModel(path)) as model:
        params = LoadParams(n_ctx=len(tokens) + _N_WRITTEN, n_batch=512)
        with closing(Context(model, params)) as context:
            for _ in range(_ROUNDS):
                context.reuse_prefix(())
                started = time.perf_counter()
                context.decode(tokens)
                read = time.perf_counter()
                for _ in range(_N_WRITTEN):
                    context.step(context.likeliest(np))
                prompt.append(len(tokens) / (read - started))
                decode.append(_N_WRITTEN / (time.perf_counter() - read))
    return {"prompt": median(prompt), "decode": median(decode)}

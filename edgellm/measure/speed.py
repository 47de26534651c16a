"""How fast a model reads and writes on this machine: a few seconds' look, not a benchmark."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np

from edgellm.config import LoadParams
from edgellm.native.context import Context
from edgellm.native.model import NativeModel

_N_WRITTEN, _ROUNDS = 24, 3


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

"""Load a GGUF in a process of its own and say what it does: `python -m edgellm.native.probe`.

Native code aborts the process on some damaged files, so a file nobody has loaded yet is tried here first.
Input on stdin, one JSON object: {"path", "texts"}. Output on stdout: {"ids": [[…] per text], "logits_finite"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import EdgeLLMError, ModelFileError

_N_PROBED = 8  # tokens decoded: enough to run every tensor once


@dataclass(frozen=True)
class Probe:
    """What a child process saw: ids of each text (no special tokens added or parsed), and of logits or embedding."""

    ids: list[list[int]]
    logits_finite: bool  # and not all the same


def probe(path: Path, texts: Sequence[str], timeout: float = 600) -> Probe:
    """Load the model in a child process; ModelFileError with llama.cpp's reason where it can't be."""
    request = json.dumps({"path": str(path), "texts": list(texts)})
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edgellm.native.probe"],
            input=request.encode(),
            capture_output=True,
            timeout=timeout,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ModelFileError(f"llama.cpp didn't load {path} within {timeout:.0f} s") from exc
    if child.returncode != 0:
        raise ModelFileError(f"llama.cpp can't use {path}: {_reason(child.stderr, child.returncode)}")
    answer = json.loads(child.stdout)
    return Probe(answer["ids"], answer["logits_finite"])


def _reason(stderr: bytes, code: int) -> str:
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return (telling or lines or [f"its process ended with {code}"])[0].removeprefix("error: ")[:300]


def _main() -> None:
    import numpy as np

    from edgellm.config import LoadParams
    from edgellm.native.context import Context
    from edgellm.native.model import NativeModel

    request = json.loads(sys.stdin.buffer.read())
    try:
        model = NativeModel(Path(request["path"]), load_mode="mmap", n_gpu_layers=0)
        ids = [model.vocab.tokenize(text, special=False) for text in request["texts"]]
        params = LoadParams(n_ctx=64, n_batch=_N_PROBED)
        context = Context(model, params, n_outputs=_N_PROBED, embeddings=model.is_embedder)
        tokens = [7919 * i % model.vocab.size for i in range(1, _N_PROBED + 1)]
        output = context.embedding(tokens) if model.is_embedder else context.logits(tokens)
    except EdgeLLMError as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(json.dumps({"ids": ids, "logits_finite": bool(np.isfinite(output).all() and np.ptp(output) > 0)}))


if __name__ == "__main__":
    _main()

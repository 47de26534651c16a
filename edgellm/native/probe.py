"""Load a GGUF in a process of its own and say what it does: `python -m edgellm.native.probe`.

Native code aborts the process on some damaged files, so a file nobody has loaded yet is tried here first.
Input on stdin, one JSON object: {"path", "texts"}. Output on stdout: {"ids": [[…] per text], "logits_finite"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import ModelFileError

_N_PROBED = 8  # tokens decoded: enough to run every tensor once


@dataclass(frozen=True)
class Probe:
    """What a child process saw: token ids of each text (no special tokens added or parsed), and of the logits."""

    ids: list[list[int]]
    logits_finite: bool


def probe(path: Path, texts: Sequence[str], timeout: float = 600) -> Probe:
    """Load the model in a child process; ModelFileError with llama.cpp's reason where it can't be."""
    request = json.dumps({"path": str(path), "texts": list(texts)})
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edgellm.native.probe"],
            input=request.encode("utf-8", "surrogatepass"),
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
    return (telling or lines or [f"its process ended with {code}"])[0][:300]


def _tokenize(api: Any, vocab: Any, text: str) -> list[int]:
    raw = text.encode("utf-8", "surrogatepass")
    buffer = (api.llama_token * (len(raw) + 16))()
    n = api.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, False)
    if n < 0:
        raise SystemExit(f"error: tokenizing needs {-n} tokens for {len(raw)} bytes")
    return list(buffer[:n])


def _is_embedder(api: Any, model: Any) -> bool:
    """Whether the model is made for embeddings: some of these have no logits."""

    def value(key: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(128)
        return buffer.value if api.llama_model_meta_val_str(model, key, buffer, len(buffer)) >= 0 else b""

    arch = value(b"general.architecture")
    return any(value(arch + key) for key in (b".pooling_type", b".attention.causal"))


def _output_finite(api: Any, model: Any, vocab: Any) -> bool:
    """Decode a few tokens and look at the last one's logits, or at its embedding."""
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 64, _N_PROBED, _N_PROBED
    params.embeddings = embedder = _is_embedder(api, model)
    params.pooling_type = 0 if embedder else params.pooling_type  # one embedding for each token
    context = api.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("error: no context can be made")
    n_vocab = api.llama_vocab_n_tokens(vocab)
    tokens = (api.llama_token * _N_PROBED)(*[(7919 * i) % n_vocab for i in range(1, _N_PROBED + 1)])
    if api.llama_decode(context, api.llama_batch_get_one(tokens, _N_PROBED)) != 0:
        raise SystemExit("error: decoding failed")
    if embedder:
        output = api.llama_get_embeddings_ith(context, -1)[: api.llama_model_n_embd(model)]
    else:
        output = api.llama_get_logits_ith(context, -1)[:n_vocab]
    # x - x is 0 for finite numbers only
    finite = all(x - x == 0.0 for x in output) and any(x != output[0] for x in output)
    api.llama_free(context)
    return finite


def _main() -> None:
    request = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    from llama_cpp import llama_cpp as api

    params = api.llama_model_default_params()
    params.use_extra_bufts = False
    params.n_gpu_layers = 0
    errors: list[bytes] = []

    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text)

    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(request["path"].encode(), params)
    if not model:
        raise SystemExit("error: " + (b" ".join(errors[:2]).decode("utf-8", "replace").strip() or "no model"))
    vocab = api.llama_model_get_vocab(model)
    ids = [_tokenize(api, vocab, text) for text in request["texts"]]
    finite = _output_finite(api, model, vocab)
    api.llama_model_free(model)
    print(json.dumps({"ids": ids, "logits_finite": finite}))


if __name__ == "__main__":
    _main()

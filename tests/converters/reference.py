"""Independent readings of what the converter makes: gguf's own reader, llama.cpp's own quantizer and forward pass."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray


@api.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → (type, shape rows first, bytes), as gguf's reader sees it."""
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data.tobytes())
        for t in gguf.GGUFReader(path).tensors
    }


def float_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Name → float32 values, dequantized by gguf."""
    out = {}
    for t in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type)
        out[t.name] = np.asarray(values, dtype=np.float32).reshape([int(n) for n in reversed(t.shape)])
    return out


def llama_quantize(source: Path, out: Path, file_type: int) -> None:
    """llama.cpp's `llama_model_quantize`, without an importance matrix."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = api.llama_model_quantize_default_params()
    params.ftype = file_type
    assert api.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0


def llama_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """llama.cpp's logits for every position, float32 (n_tokens, n_vocab)."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = max(len(tokens), 32), len(tokens), len(tokens)
    params.n_outputs_max = params.n_outputs_max_per_seq = len(tokens)
    params.type_k = params.type_v = 0  # float32: the KV cache isn't under test
    params.flash_attn_type = 0
    context = api.llama_init_from_model(model, params)
    assert context
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert api.llama_decode(context, batch) == 0
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(len(tokens))]
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return np.stack(rows)


def llama_embeddings(path: Path, tokens: list[int], pooled: bool = False) -> NDArray[np.float32]:
    """llama.cpp's embedding of every token (n_tokens, n_embd), or of the text, as the file says to pool (n_embd,)."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = len(tokens), len(tokens), len(tokens)
    params.n_outputs_max = params.n_outputs_max_per_seq = len(tokens)
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    params.embeddings = True
    params.pooling_type = -1 if pooled else 0
    context = api.llama_init_from_model(model, params)
    assert context
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert api.llama_decode(context, batch) == 0
    n_embd = api.llama_model_n_embd(model)
    if pooled:
        found = np.ctypeslib.as_array(api.llama_get_embeddings_seq(context, 0), (n_embd,)).copy()
    else:
        rows = [np.ctypeslib.as_array(api.llama_get_embeddings_ith(context, i), (n_embd,)) for i in range(len(tokens))]
        found = np.stack([row.copy() for row in rows])
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return found


def llama_ids(path: Path, texts: list[str], add_special: bool = False) -> list[list[int]]:
    """llama.cpp's token ids of each text, no control tokens parsed."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), params)
    vocab = api.llama_model_get_vocab(model)
    out = []
    for text in texts:
        raw = text.encode()
        buffer = (api.llama_token * (len(raw) + 16))()
        n = api.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), add_special, False)
        out.append(list(buffer[:n]))
    api.llama_model_free(model)
    return out

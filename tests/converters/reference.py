"""Independent readings of what the converter makes: gguf's own reader, llama.cpp's own quantizer and forward pass."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray


@api.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


# type, shape rows first, bytes
Stored: TypeAlias = tuple[str, tuple[int, ...], bytes]


def tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a GGUF, as gguf's reader sees it."""
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


def llama_quantize(
    source: Path,
    out: Path,
    file_type: int,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    allow_requantize: bool = False,
) -> None:
    """llama.cpp's `llama_model_quantize`. importance: name → means (matrices, columns). overrides: (pattern, type)."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = api.llama_model_quantize_default_params()
    params.ftype = file_type
    params.allow_requantize = allow_requantize
    table = (api.llama_model_tensor_override * (len(overrides) + 1))()  # the last one's pattern stays null
    for entry, (pattern, type_name) in zip(table, overrides, strict=False):
        entry.pattern, entry.type = pattern.encode(), int(gguf.GGMLQuantizationType[type_name])
    if overrides:
        params.tt_overrides = table
    entries = importance or {}
    means = (api.llama_model_imatrix_data * (len(entries) + 1))()
    for found, (name, values) in zip(means, entries.items(), strict=False):
        found.name, found.size = name.encode(), values.size
        found.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if entries:
        params.imatrix = means
    assert api.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0


@contextmanager
def context(
    path: Path, n_ctx: int, n_sequences: int = 1, lora: Sequence[tuple[Path, float]] = ()
) -> Iterator[tuple[Any, int]]:
    """A float32 context for batches of up to n_ctx tokens, and the size of the vocabulary. lora: adapters, scales."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
    params.n_seq_max, params.kv_unified = n_sequences, True
    params.n_outputs_max = params.n_outputs_max_per_seq = n_ctx
    # one: where other processes want the cores too, several threads spend their time waiting for each other
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # float32: the KV cache isn't under test
    params.flash_attn_type = 0
    made = api.llama_init_from_model(model, params)
    assert made
    adapters = [api.llama_adapter_lora_init(model, str(adapter).encode()) for adapter, _ in lora]
    assert all(adapters)
    pointers = (api.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in lora))
    assert api.llama_set_adapters_lora(made, pointers, len(adapters), scales) == 0
    try:
        yield made, api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    finally:
        api.llama_free(made)
        api.llama_model_free(model)


def _decode(context: Any, n_vocab: int, rows: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
    """Logits after every one of `rows`: (token, position, sequence)."""
    batch = api.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, position, sequence) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    assert api.llama_decode(context, batch) == 0
    logits = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(len(rows))]
    api.llama_batch_free(batch)
    return np.stack(logits)


def llama_logits(path: Path, tokens: list[int], lora: Sequence[tuple[Path, float]] = ()) -> NDArray[np.float32]:
    """llama.cpp's logits for every position, float32 (n_tokens, n_vocab)."""
    with context(path, max(len(tokens), 32), lora=lora) as (made, n_vocab):
        return _decode(made, n_vocab, [(token, i, 0) for i, token in enumerate(tokens)])


def llama_greedy(path: Path, prompts: list[list[int]], n: int, stop: int) -> list[list[int]]:
    """The likeliest token after each prompt, n times or up to and with `stop`; all prompts side by side."""
    answers: list[list[int]] = [[] for _ in prompts]
    with context(path, sum(map(len, prompts)) + n * len(prompts), len(prompts)) as (made, n_vocab):
        for i, prompt in enumerate(prompts):
            logits = _decode(made, n_vocab, [(token, at, i) for at, token in enumerate(prompt)])
            answers[i].append(int(logits[-1].argmax()))
        while going := [i for i, answer in enumerate(answers) if len(answer) < n and answer[-1] != stop]:
            rows = [(answers[i][-1], len(prompts[i]) + len(answers[i]) - 1, i) for i in going]
            for i, logits in zip(going, _decode(made, n_vocab, rows), strict=True):
                answers[i].append(int(logits.argmax()))
    return answers


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


@contextmanager
def vocabulary(path: Path) -> Iterator[Any]:
    """llama.cpp's vocabulary of a GGUF, without its weights."""
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), params)
    assert model
    try:
        yield api.llama_model_get_vocab(model)
    finally:
        api.llama_model_free(model)


def llama_ids(path: Path, texts: list[str], add_special: bool = False, parse_special: bool = False) -> list[list[int]]:
    """llama.cpp's token ids of each text."""
    out = []
    with vocabulary(path) as vocab:
        for text in texts:
            raw = text.encode()
            buffer = (api.llama_token * (len(raw) + 16))()
            n = api.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), add_special, parse_special)
            assert n >= 0
            out.append(list(buffer[:n]))
    return out


def llama_texts(path: Path, ids: list[list[int]], special: bool = True) -> list[str]:
    """llama.cpp's text of each list of ids; special: control tokens are shown."""
    out = []
    with vocabulary(path) as vocab:
        for row in ids:
            tokens = (api.llama_token * len(row))(*row)
            buffer = ctypes.create_string_buffer(64 + 256 * len(row))
            n = api.llama_detokenize(vocab, tokens, len(row), buffer, len(buffer), False, special)
            assert n >= 0
            out.append(buffer.raw[:n].decode("utf-8", "replace"))
    return out


def metadata(path: Path) -> dict[str, Any]:
    """A GGUF's metadata as gguf's own reader sees it."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}

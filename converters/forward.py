"""A forward pass of our own over a checkpoint, to hold llama.cpp's answers to.

It knows nothing of GGUF, specs or ops: it reads the checkpoint's tensors and config.json by their Hugging Face names,
so a mistake on the way to the GGUF (rows in another order, another theta, two matrices exchanged) shows as another
answer.
Plain decoders only: rms norm, rotary positions in half-split layout, grouped heads, a gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import Source

Array = NDArray[np.float32]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_KINDS = (None, "default")


def can_run(source: Source, n_tokens: int) -> bool:
    """Whether `forward` knows this checkpoint's family and settings."""
    config = source.config
    rope = _rope(config)
    return (
        source.kind != "gguf"
        and all(config.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        and int(config.get("sliding_window") or n_tokens) >= n_tokens
        and config.get("model_type") in _FAMILIES
        and config.get("hidden_act", "silu") == "silu"
        and rope.get("rope_type", rope.get("type")) in _ROPE_KINDS
        and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        and "model.embed_tokens.weight" in source.tensors
    )


def forward(source: Source, tokens: Sequence[int]) -> Array:
    """Logits after every token: float32 (n_tokens, n_vocab). Holds one layer's weights at a time.

    Formulas: RMSNorm, Zhang & Sennrich 2019; rotary positions, Su et al. 2021; SwiGLU, Shazeer 2020.
    """
    config = source.config
    eps = float(config.get("rms_norm_eps", 1e-6))
    embedding = _read(source, "model.embed_tokens.weight")
    assert embedding is not None
    x = embedding[np.asarray(tokens)]
    rotation = _rotation(config, len(tokens))
    for i in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{i}."
        x = x + _attention(source, layer, _norm(x, _read(source, f"{layer}input_layernorm.weight"), eps), rotation)
        x = x + _feed_forward(source, layer, _norm(x, _read(source, f"{layer}post_attention_layernorm.weight"), eps))
    x = _norm(x, _read(source, "model.norm.weight"), eps)
    head = _read(source, "lm_head.weight")
    logits: Array = x @ (embedding if head is None else head).T
    return logits


def _read(source: Source, name: str) -> Array | None:
    tensor = source.tensors.get(name)
    return None if tensor is None else tensor.read()


def _linear(source: Source, name: str, x: Array) -> Array:
    weight, bias = _read(source, f"{name}.weight"), _read(source, f"{name}.bias")
    assert weight is not None
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def _norm(x: Array, weight: Array | None, eps: float) -> Array:
    scaled: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps))
    return scaled if weight is None else scaled * weight


def _attention(source: Source, layer: str, x: Array, rotation: tuple[Array, Array]) -> Array:
    config, n = source.config, len(x)
    n_head = int(config["num_attention_heads"])
    n_head_kv = int(config.get("num_key_value_heads") or n_head)
    q, k, v = (_linear(source, f"{layer}self_attn.{name}_proj", x) for name in "qkv")
    q, k, v = q.reshape(n, n_head, -1), k.reshape(n, n_head_kv, -1), v.reshape(n, n_head_kv, -1)
    eps = float(config.get("rms_norm_eps", 1e-6))
    for_heads = [_read(source, f"{layer}self_attn.{name}_norm.weight") for name in "qk"]
    if for_heads[0] is not None:
        q, k = _norm(q, for_heads[0], eps), _norm(k, for_heads[1], eps)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    k, v = (np.repeat(heads, n_head // n_head_kv, axis=1) for heads in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(np.float32(q.shape[-1]))
    scores = np.where(np.tri(n, dtype=np.bool_), scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
    return _linear(source, f"{layer}self_attn.o_proj", mixed)


def _feed_forward(source: Source, layer: str, x: Array) -> Array:
    gate, up = (_linear(source, f"{layer}mlp.{name}_proj", x) for name in ("gate", "up"))
    silu: Array = gate / (1 + np.exp(-np.clip(gate, -80, 80)))
    return _linear(source, f"{layer}mlp.down_proj", silu * up)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 keeps rope's settings in rope_parameters, 4 in rope_scaling and rope_theta."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **found}


def _rotation(config: Mapping[str, Any], n: int) -> tuple[Array, Array]:
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    theta = float(_rope(config)["rope_theta"])
    angles = np.arange(n)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    angles = np.concatenate([angles, angles], axis=1)[:, None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotated(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = rotation
    half = x.shape[-1] // 2
    turned: Array = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin

"""A forward pass of our own over a checkpoint, to hold llama.cpp's answers to.

It knows nothing of GGUF, specs or ops: it reads the checkpoint's tensors and config.json by their Hugging Face names,
so a mistake on the way to the GGUF (rows in another order, another theta, two matrices exchanged) shows as another
answer.
Decoders of the common build only: rms norm, rotary positions in half-split layout, grouped heads, a gated
feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import Source

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Family:
    """How a family differs from Llama. norm_offset: what is added to a stored norm. post_norms: attention and
    feed-forward are normalized on both sides. is_fused: q, k and v are one tensor, gate and up another. needs: settings
    that must be in config.json. full_every: every how manieth block sees further than the window (0: all alike).
    """

    activation: str = "silu"
    norm_offset: float = 0.0
    scales_embedding: bool = False
    post_norms: bool = False
    is_fused: bool = False
    needs: tuple[str, ...] = ()
    full_every: int = 0


_LLAMA = _Family()
_GEMMA = _Family("gelu", 1.0, scales_embedding=True, needs=("head_dim",))
_GEMMA2_NEEDS = ("head_dim", "query_pre_attn_scalar", "sliding_window")
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": replace(_LLAMA, is_fused=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, post_norms=True, needs=_GEMMA2_NEEDS, full_every=2),
    "gemma3_text": replace(_GEMMA, post_norms=True, needs=_GEMMA2_NEEDS, full_every=6),
}
_ACTIVATIONS = {"silu": (None, "silu"), "gelu": (None, "gelu", "gelu_pytorch_tanh")}  # Gemma's "gelu" is the tanh one
_ROPE_KINDS = (None, "default")


def can_run(source: Source, n_tokens: int) -> bool:
    """Whether `forward` knows this checkpoint's family and settings."""
    config = source.config
    family = _FAMILIES.get(config.get("model_type", ""))
    if source.kind == "gguf" or family is None or "model.embed_tokens.weight" not in source.tensors:
        return False
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", *family.needs)
    rope = _rope(config, is_local=False)
    return (
        all(config.get(key) for key in needed)
        and (family.full_every > 0 or int(config.get("sliding_window") or n_tokens) >= n_tokens)
        and (config.get("hidden_activation") or config.get("hidden_act")) in _ACTIVATIONS[family.activation]
        and rope.get("rope_type", rope.get("type")) in _ROPE_KINDS
        and float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) == 1.0
    )


def forward(source: Source, tokens: Sequence[int]) -> Array:
    """Logits after every token: float32 (n_tokens, n_vocab). Holds one layer's weights at a time.

    Formulas: RMSNorm, Zhang & Sennrich 2019; rotary positions, Su et al. 2021; SwiGLU, Shazeer 2020; Gemma 2, Riviere
    et al. 2024.
    """
    config, family = source.config, _FAMILIES[source.config["model_type"]]
    embedding = _read(source, "model.embed_tokens.weight")
    assert embedding is not None
    x = embedding[np.asarray(tokens)]
    if family.scales_embedding:
        x = x * np.sqrt(np.float32(config["hidden_size"]))
    after = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if family.post_norms else ()
    for i in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{i}."
        y = _attention(source, layer, _norm(source, f"{layer}input_layernorm", x), family, _is_local(family, i))
        if family.post_norms:
            y = _norm(source, f"{layer}post_attention_layernorm", y)
        x = x + y
        y = _feed_forward(source, layer, _norm(source, layer + (after or ("post_attention_layernorm",))[0], x), family)
        x = x + (_norm(source, layer + after[1], y) if after else y)
    x = _norm(source, "model.norm", x)
    head = _read(source, "lm_head.weight")
    logits: Array = x @ (embedding if head is None else head).T
    return _capped(logits, config.get("final_logit_softcapping"))


def _is_local(family: _Family, i: int) -> bool:
    return family.full_every > 0 and (i + 1) % family.full_every != 0


def _read(source: Source, name: str) -> Array | None:
    tensor = source.tensors.get(name)
    return None if tensor is None else tensor.read()


def _linear(source: Source, name: str, x: Array) -> Array:
    weight, bias = _read(source, f"{name}.weight"), _read(source, f"{name}.bias")
    assert weight is not None
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def _norm(source: Source, name: str, x: Array) -> Array:
    """RMSNorm over the last axis, with the weight of that name if there is one."""
    eps, weight = np.float32(source.config.get("rms_norm_eps", 1e-6)), _read(source, f"{name}.weight")
    scaled: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    offset = np.float32(_FAMILIES[source.config["model_type"]].norm_offset)
    return scaled if weight is None else scaled * (weight + offset)


def _capped(x: Array, cap: float | None) -> Array:
    return x if not cap else np.float32(cap) * np.tanh(x / np.float32(cap))


def _attention(source: Source, layer: str, x: Array, family: _Family, is_local: bool) -> Array:
    config, n = source.config, len(x)
    n_head = int(config["num_attention_heads"])
    n_head_kv = int(config.get("num_key_value_heads") or n_head)
    if family.is_fused:
        size = len(source.tensors[f"{layer}self_attn.qkv_proj.weight"].read()) // (n_head + 2 * n_head_kv)
        fused = _linear(source, f"{layer}self_attn.qkv_proj", x)
        q, k, v = np.split(fused, [n_head * size, (n_head + n_head_kv) * size], axis=1)
    else:
        q, k, v = (_linear(source, f"{layer}self_attn.{name}_proj", x) for name in "qkv")
    q, k, v = q.reshape(n, n_head, -1), k.reshape(n, n_head_kv, -1), v.reshape(n, n_head_kv, -1)
    if f"{layer}self_attn.q_norm.weight" in source.tensors:
        q, k = _norm(source, f"{layer}self_attn.q_norm", q), _norm(source, f"{layer}self_attn.k_norm", k)
    rotation = _rotation(config, n, q.shape[-1], is_local)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    k, v = (np.repeat(heads, n_head // n_head_kv, axis=1) for heads in (k, v))
    scale = np.float32(config.get("query_pre_attn_scalar") or q.shape[-1])
    scores = _capped(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(scale), config.get("attn_logit_softcapping"))
    seen = np.tri(n, dtype=np.bool_)
    if is_local:
        seen &= ~np.tri(n, k=-int(config["sliding_window"]), dtype=np.bool_)
    scores = np.where(seen, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
    return _linear(source, f"{layer}self_attn.o_proj", mixed)


def _feed_forward(source: Source, layer: str, x: Array, family: _Family) -> Array:
    if family.is_fused:
        gate, up = np.split(_linear(source, f"{layer}mlp.gate_up_proj", x), 2, axis=1)
    else:
        gate, up = (_linear(source, f"{layer}mlp.{name}_proj", x) for name in ("gate", "up"))
    if family.activation == "gelu":  # the tanh approximation, Hendrycks & Gimpel 2016
        inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
        active: Array = np.float32(0.5) * gate * (1 + np.tanh(inner))
    else:
        active = gate / (1 + np.exp(-np.clip(gate, -80, 80)))
    return _linear(source, f"{layer}mlp.down_proj", active * up)


def _rope(config: Mapping[str, Any], is_local: bool) -> Mapping[str, Any]:
    """transformers 5 keeps rope's settings in rope_parameters, for kinds of layers apart where they differ; 4 in
    rope_scaling, rope_theta and rope_local_base_freq.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = "sliding_attention" if is_local else "full_attention"
    theta = config.get("rope_theta", 10000.0)
    if is_local and kind not in found:
        found = {}  # a scaling in the older form is for the full layers
        theta = config.get("rope_local_base_freq", theta)
    return {"rope_theta": theta, **found.get(kind, found)}


def _rotation(config: Mapping[str, Any], n: int, size: int, is_local: bool) -> tuple[Array, Array]:
    theta = float(_rope(config, is_local)["rope_theta"])
    angles = np.arange(n)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    angles = np.concatenate([angles, angles], axis=1)[:, None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotated(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = rotation
    half = x.shape[-1] // 2
    turned: Array = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin

"""A forward pass of our own over a checkpoint, to hold llama.cpp's answers to.

It knows nothing of GGUF, specs' weights or ops: it reads the checkpoint's tensors and config.json by their Hugging Face
names, so a mistake on the way to the GGUF (rows in another order, another theta, two matrices exchanged) shows as
another answer. Only what a config.json leaves out comes from the specs: the defaults of transformers' classes.
Decoders of the common builds: rms or layer norm, rotary positions, grouped heads, a feed-forward with or without a gate
and experts, short convolutions. Not: state spaces, linear attention, attention sinks, learned positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.architectures import find_architecture
from converters.forward.families import FAMILIES, Family, Scales
from converters.forward.rotation import KINDS, query_scale, rope_of, rotated, rotated_size, rotation
from converters.sources import Source

Array = NDArray[np.float32]

_EMBEDDING = "embed_tokens.weight"
_ACTIVATIONS = {  # Gemma's and Starcoder's "gelu" is the tanh one
    "silu": (None, "silu", "swish"), "gelu": (None, "gelu", "gelu_pytorch_tanh"), "relu2": (None, "relu2"),
}  # fmt: skip


def can_run(source: Source, n_tokens: int) -> bool:
    """Whether `forward` knows this checkpoint's family and settings."""
    if source.kind == "gguf":
        return False
    config = find_architecture(source.config).complete_config(source.config)
    family = FAMILIES.get(str(config.get("model_type", "")))
    if family is None or _prefix(source) is None:
        return False
    is_mixed = bool(family.full_every or config.get("layer_types"))  # else a window is every block's
    return (
        all(config.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        and (is_mixed or int(config.get("sliding_window") or n_tokens) >= n_tokens)
        and (config.get("hidden_activation") or config.get("hidden_act")) in _ACTIVATIONS[family.activation]
        and all(rope_of(config, is_local)["kind"] in KINDS for is_local in (False, True))
    )


def forward(source: Source, tokens: Sequence[int], n_ctx: int | None = None) -> Array:
    """Logits after every token: float32 (n_tokens, n_vocab). Holds one layer's weights at a time, of experts one's.

    n_ctx: the context that longrope's factors are chosen for, by default as long as the text.
    Formulas: RMSNorm, Zhang & Sennrich 2019; SwiGLU, Shazeer 2020; Gemma 2, Riviere et al. 2024.
    """
    config = find_architecture(source.config).complete_config(source.config)
    family, prefix = FAMILIES[config["model_type"]], _prefix(source)
    assert prefix is not None
    scales = family.scales(config)
    model = _Part(source, config, family, prefix, n_ctx or len(tokens))
    embedding = model.read(_EMBEDDING)
    x = embedding[np.asarray(tokens)] * np.float32(scales.embedding)
    for i in range(int(config["num_hidden_layers"])):
        x = _block(replace(model, prefix=f"{prefix}layers.{i}."), i, x, scales)
    x = model.norm(family.final_norm, x)
    outer = replace(model, prefix=prefix.removesuffix("model."))
    if outer.has("lm_head.weight") and not config.get("tie_word_embeddings"):
        embedding = outer.read("lm_head.weight")
    return _capped(x @ embedding.T * np.float32(scales.logits), config.get("final_logit_softcapping"))


def _prefix(source: Source) -> str | None:
    """What stands before the names of the text model's tensors."""
    names = [name for name in source.tensors if name.endswith(_EMBEDDING) and "vision" not in name]
    return names[0].removesuffix(_EMBEDDING) if len(names) == 1 else None


@dataclass(frozen=True)
class _Part:
    """A part of the model, whose tensors' names begin alike."""

    source: Source
    config: Mapping[str, Any]
    family: Family
    prefix: str
    n_ctx: int

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.source.tensors

    def read(self, name: str, *part: int) -> Array:
        return self.source.tensors[f"{self.prefix}{name}"].read(*part)

    def linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self.read(f"{name}.weight").T
        return y + self.read(f"{name}.bias") if self.has(f"{name}.bias") else y

    def norm(self, name: str, x: Array) -> Array:
        """Over the last axis; nothing where the family has no such norm."""
        if not name:
            return x
        if self.family.centers:
            x = x - x.mean(axis=-1, keepdims=True)
        eps = np.float32(self.config[self.family.eps])
        y: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
        y = y * (self.read(f"{name}.weight") + np.float32(self.family.norm_offset))
        return y + self.read(f"{name}.bias") if self.has(f"{name}.bias") else y


def _block(block: _Part, i: int, x: Array, scales: Scales) -> Array:
    before, after, before_feed_forward, after_feed_forward = block.family.norms
    seen = block.norm(before, x)
    y = _convolution(block, seen) if block.has("conv.conv.weight") else _attention(block, i, seen, scales)
    branch = np.float32(scales.branch)
    mixed = x + block.norm(after, y) * branch
    if not block.family.parallel(block.config):
        seen = block.norm(before_feed_forward, mixed)
    out: Array = mixed + block.norm(after_feed_forward, _feed_forward(block, seen)) * branch
    return out


def _capped(x: Array, cap: float | None) -> Array:
    return x if not cap else np.float32(cap) * np.tanh(x / np.float32(cap))


def _attention(block: _Part, i: int, x: Array, scales: Scales) -> Array:
    config, family, n = block.config, block.family, len(x)
    n_head = int(config["num_attention_heads"])
    n_head_kv = int(config.get("num_key_value_heads") or n_head)
    q, k, v = _projections(block, x, n_head, n_head_kv)
    is_local = family.is_local(config, i)
    if family.has_rope(config, i):
        turns = rotation(config, n, rotated_size(config, q.shape[-1]), is_local, block.n_ctx)
        q, k = (rotated(heads, turns, family.neighbours) for heads in (q, k))
    growth = query_scale(config, n)
    q = q if growth is None else q * growth
    k, v = (np.repeat(heads, n_head // n_head_kv, axis=1) for heads in (k, v))
    scale = np.float32(scales.scores or q.shape[-1] ** -0.5)
    scores = _capped(np.einsum("qhd,khd->hqk", q, k, optimize=True) * scale, config.get("attn_logit_softcapping"))
    seen = np.tri(n, dtype=np.bool_)
    if is_local:
        seen &= ~np.tri(n, k=-int(config["sliding_window"]), dtype=np.bool_)
    weights = _softmax(np.where(seen, scores, np.float32(-np.inf)))
    return block.linear(family.output, np.einsum("hqk,khd->qhd", weights, v, optimize=True).reshape(n, -1))


def _projections(block: _Part, x: Array, n_head: int, n_head_kv: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, (positions, heads, size) each, normalized where the family does, whole or by head."""
    if block.has("self_attn.qkv_proj.weight"):
        fused = block.linear("self_attn.qkv_proj", x)
        size = fused.shape[1] // (n_head + 2 * n_head_kv)
        parts = np.split(fused, [n_head * size, (n_head + n_head_kv) * size], axis=1)
    else:
        parts = [block.linear(f"self_attn.{name}_proj", x) for name in "qkv"]
    n_heads = (n_head, n_head_kv, n_head_kv)
    for k, name in enumerate(block.family.qk_norms):
        if block.has(f"{name}.weight"):
            width = block.read(f"{name}.weight").size
            parts[k] = block.norm(name, parts[k].reshape(len(x), -1, width))
    q, k_, v = (part.reshape(len(x), heads, -1) for part, heads in zip(parts, n_heads, strict=True))
    return q, k_, v


def _convolution(block: _Part, x: Array) -> Array:
    """LFM2's: two gates around a causal convolution of each column."""
    before, after, inner = np.split(block.linear("conv.in_proj", x), 3, axis=1)
    kernel = block.read("conv.conv.weight").reshape(x.shape[1], -1)  # (columns, taps), the last one for now
    n_taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((n_taps - 1, x.shape[1]), np.float32), before * inner])
    mixed = sum(padded[k : k + len(x)] * kernel[:, k] for k in range(n_taps))
    return block.linear("conv.out_proj", after * mixed)


def _feed_forward(block: _Part, x: Array) -> Array:
    family, (where, _) = block.family, block.family.experts
    for router in ("gate", "router.layer"):
        if block.has(f"{where}{router}.weight"):
            return _experts(block, f"{where}{router}", x)
    gate, up, down = family.feed_forward
    if block.has("mlp.gate_up_proj.weight"):
        a, b = np.split(block.linear("mlp.gate_up_proj", x), 2, axis=1)
        inner = _active(a, family) * b
    elif gate:
        inner = _active(block.linear(gate, x), family) * block.linear(up, x)
    else:
        inner = _active(block.linear(up, x), family)
    return block.linear(down, inner)


def _experts(block: _Part, router: str, x: Array) -> Array:
    """The best experts of each token, weighed, and where there is one the expert that all share."""
    config, family, (where, _) = block.config, block.family, block.family.experts
    scores = block.linear(router, x)
    weights = _sigmoid(scores) if family.sigmoid else _softmax(scores)
    bias = f"{where}expert_bias"  # for choosing only
    ranked = weights + block.read(bias) if block.has(bias) else weights
    chosen = np.argsort(-ranked, axis=1, kind="stable")[:, : int(config["num_experts_per_tok"])]
    shares = np.take_along_axis(weights, chosen, axis=1)
    if family.renormalizes or (family.renormalizes is None and config.get("norm_topk_prob")):
        shares = shares / shares.sum(axis=1, keepdims=True)
    y = np.zeros_like(x)
    for e in np.unique(chosen):
        rows, place = np.nonzero(chosen == e)
        gate, up, down = _expert(block, int(e), scores.shape[1])
        inner = _active(x[rows] @ gate.T, family) * (x[rows] @ up.T)
        y[rows] += shares[rows, place, None] * (inner @ down.T)
    y *= np.float32(config.get("routed_scaling_factor") or 1.0)
    if block.has("mlp.shared_expert.up_proj.weight"):
        shared = replace(block, prefix=f"{block.prefix}mlp.shared_expert.")
        inner = _active(shared.linear("gate_proj", x), family) * shared.linear("up_proj", x)
        y += _sigmoid(block.linear("mlp.shared_expert_gate", x)) * shared.linear("down_proj", inner)
    return y


def _expert(block: _Part, e: int, n: int) -> tuple[Array, Array, Array]:
    """Gate, up and down matrix of one of n experts, however they are stored."""
    where, names = block.family.experts
    for fused, last in (("experts.gate_up_proj", "experts.down_proj"), ("input_linear.weight", "output_linear.weight")):
        if block.has(f"{where}{fused}"):
            both, down = (block.read(f"{where}{name}", e, n)[0] for name in (fused, last))
            gate, up = np.split(both, 2)
            return gate, up, down
    gate, up, down = (block.read(f"{where}experts.{e}.{name}.weight") for name in names)
    return gate, up, down


def _active(x: Array, family: Family) -> Array:
    if family.activation == "gelu":  # the tanh approximation, Hendrycks & Gimpel 2016
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
        y: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
        return y
    if family.activation == "relu2":
        return np.maximum(x, np.float32(0)) ** 2
    return x * _sigmoid(x)


def _sigmoid(x: Array) -> Array:
    y: Array = np.exp(-np.clip(x, -80, 80), dtype=np.float32)
    return np.reciprocal(1 + y)


def _softmax(x: Array) -> Array:
    weights: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights

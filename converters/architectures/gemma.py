"""Gemma 1, 2 and 3 (text), from 270M to 27B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.common import (
    BARE_NAMES,
    BASE_METADATA,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    gated_mlp,
    norm,
    standard_sizes,
)
from converters.architectures.ops import add
from converters.architectures.rope import layer_rope
from converters.architectures.spec import KV, Arch, Config, Sizes, Weight, config_float, config_int, hf_class, require
from edgellm.errors import UnsupportedArchitecture

_EMBEDDER = "Gemma3TextModel"
_ONE = (add(1.0),)  # Gemma's norms are stored as their distance from one
_GEMMA = {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
}  # fmt: skip
_METADATA = BASE_METADATA + HEAD_DIM + RMS_EPS
_CAPS = (
    KV("{arch}.attn_logit_softcapping", "attn_logit_softcapping", "float32", optional=True),
    KV("{arch}.final_logit_softcapping", "final_logit_softcapping", "float32", optional=True),
    KV("{arch}.attention.sliding_window", "sliding_window", optional=True),
)
_POST_NORMS = (
    *norm("post_attention_layernorm", "post_attention_norm", ops=_ONE),
    *norm("pre_feedforward_layernorm", "ffn_norm", ops=_ONE),
    *norm("post_feedforward_layernorm", "post_ffw_norm", ops=_ONE),
)


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graphs compute otherwise."""
    require(config, "attention_bias", False)
    require(config, "use_bidirectional_attention", *((True,) if hf_class(config) == _EMBEDDER else (None, False)))
    for name in ("hidden_act", "hidden_activation"):
        require(config, name, None, "gelu", "gelu_pytorch_tanh")
    return []


def _weights(*more: Weight) -> tuple[Weight, ...]:
    final_norm = Weight("model.norm.weight", "output_norm.weight", ("n_embd",), _ONE)
    table, _, head = embeddings()
    return table, final_norm, head, *norm("input_layernorm", "attn_norm", ops=_ONE), *attention(), *gated_mlp(), *more


def _check_scale(config: Config, period: int) -> list[str]:
    """The query scale and the sliding pattern are built into llama.cpp's graphs."""
    head_dim, scalar = config_int(config, "head_dim"), config_float(config, "query_pre_attn_scalar")
    big = config_int(config, "hidden_size") // config_int(config, "num_attention_heads")
    n_layer = config_int(config, "num_hidden_layers")
    if scalar != (big if n_layer in ((46,) if period == 2 else (62,)) else head_dim):
        raise UnsupportedArchitecture(f"query_pre_attn_scalar = {scalar} isn't supported: llama.cpp has {head_dim}")
    kinds = config.get("layer_types") or []
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n_layer)]
    if kinds and list(kinds) != expected:
        raise UnsupportedArchitecture(
            f"layer_types other than full attention in each {period}th block: llama.cpp lacks that"
        )
    return check(config)


def _local_rope(config: Config, sizes: Sizes) -> dict[str, Any]:
    local = layer_rope(config, "sliding_attention").get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    return {"rope.freq_base_swa": float(local)}


def _dense(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The dense layers that sentence-transformers puts after the pooling."""
    if not sizes["n_dense"]:
        return {}
    wide, narrow = sizes["n_dense"], sizes["n_embd"]
    ends = {"dense_2_feat_in": narrow, "dense_2_feat_out": wide, "dense_3_feat_in": wide, "dense_3_feat_out": narrow}
    return {key: int(value) for key, value in ends.items()}


def _embedder_config(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    if metadata.get("gemma-embedding.dense_2_feat_out"):
        raise UnsupportedArchitecture("an embedding model with dense layers can't be written as a checkpoint yet")
    return {
        "rope_local_base_freq": metadata.get("gemma-embedding.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": sizes["head_dim"],
        "use_bidirectional_attention": True,
    }


GEMMA = Arch(
    "gemma", {"GemmaForCausalLM": "gemma"}, {"GemmaForCausalLM": _GEMMA}, _METADATA,
    _weights(*norm("post_attention_layernorm", "ffn_norm", ops=_ONE)), standard_sizes, check, head="tied only",
)  # fmt: skip
GEMMA2 = Arch(
    "gemma2", {"Gemma2ForCausalLM": "gemma2"}, {"Gemma2ForCausalLM": _GEMMA2}, _METADATA + _CAPS,
    _weights(*_POST_NORMS), standard_sizes, lambda config: _check_scale(config, 2), head="tied only",
    config_from=lambda metadata, sizes: {"query_pre_attn_scalar": sizes["head_dim"]},
)  # fmt: skip
GEMMA3 = Arch(
    "gemma3",
    {"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
    dict.fromkeys(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _GEMMA3),
    _METADATA + _CAPS,
    _weights(
        *_POST_NORMS,
        *norm("self_attn.q_norm", "attn_q_norm", "head_dim", _ONE),
        *norm("self_attn.k_norm", "attn_k_norm", "head_dim", _ONE),
    ),
    standard_sizes,
    lambda config: _check_scale(config, 6),
    extra=_local_rope,
    config_from=lambda metadata, sizes: {
        "rope_local_base_freq": metadata.get("gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": sizes["head_dim"],
    },
    renames=(("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", "")),
    ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
)
EMBEDDING_GEMMA = replace(
    GEMMA3,
    name="gemma-embedding",
    model_types={_EMBEDDER: "gemma3_text"},
    defaults={_EMBEDDER: _GEMMA3},
    sizes=lambda config: standard_sizes(config) | {"n_dense": int(config.get("dense_features") or 0)},
    extra=lambda config, sizes: _local_rope(config, sizes) | _dense(config, sizes),
    config_from=_embedder_config,
    weights=(
        *(weight for weight in GEMMA3.weights if not weight.tied),
        Weight("2_Dense.linear.weight", "dense_2.weight", ("n_dense", "n_embd"), optional=True),
        Weight("3_Dense.linear.weight", "dense_3.weight", ("n_embd", "n_dense"), optional=True),
    ),
    renames=BARE_NAMES,
)

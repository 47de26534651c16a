"""OLMo 2 and 3, OLMoE (Ai2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.architectures.common import (
    BASE_METADATA,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    experts,
    gated_mlp,
    linear,
    norm,
    sliding_config,
    sliding_layers,
    standard_sizes,
)
from converters.architectures.spec import Arch, Config, Sizes, require

_OLMO2 = {
    "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
_OLMOE = _OLMO2 | {
    "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
}  # fmt: skip
_QK_NORMS = (*norm("self_attn.q_norm", "attn_q_norm", "n_q"), *norm("self_attn.k_norm", "attn_k_norm", "n_kv"))


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graphs compute otherwise."""
    require(config, "hidden_act", "silu")
    require(config, "attention_bias", False)
    require(config, "clip_qkv", None)
    if str(config.get("model_type")) == "olmoe":
        require(config, "num_key_value_heads", None, config.get("num_attention_heads"))
    require(config, "norm_topk_prob", False, None)
    return []


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A model with windows is OLMo 3."""
    windows = sliding_config(metadata, "olmo2")
    return windows and {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", **windows}


OLMO2 = Arch(
    name="olmo2",
    model_types={"Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3"},
    defaults={"Olmo2ForCausalLM": _OLMO2, "Olmo3ForCausalLM": _OLMO2 | {"sliding_window": 4096}},
    sizes=standard_sizes,
    check=check,
    extra=lambda config, sizes: sliding_layers(config, sizes, 4),
    config_from=config_from,
    head="copy",
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *attention(),
        *_QK_NORMS,
        *norm("post_attention_layernorm", "post_attention_norm"),
        *norm("post_feedforward_layernorm", "post_ffw_norm"),
        *gated_mlp(),
    ),
)
OLMOE = Arch(
    name="olmoe",
    model_types={"OlmoeForCausalLM": "olmoe"},
    defaults={"OlmoeForCausalLM": _OLMOE},
    sizes=standard_sizes,
    check=check,
    head="copy",
    metadata=BASE_METADATA + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention(),
        *_QK_NORMS,
        *norm("post_attention_layernorm", "ffn_norm"),
        *linear("mlp.gate", "ffn_gate_inp", "n_expert", "n_embd"),
        *experts(),
    ),
)

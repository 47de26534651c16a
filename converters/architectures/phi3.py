"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B): fused projections, long-rope factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.architectures.common import (
    BASE_METADATA,
    RMS_EPS,
    embeddings,
    linear,
    norm,
    standard_sizes,
    window_context_length,
)
from converters.architectures.spec import Arch, Config, Sizes, config_int, require

_DEFAULTS = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    return []


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The window (0 tells llama.cpp that this is Phi-4) and the context that long rope's factors part at."""
    return {
        "attention.sliding_window": int(config.get("sliding_window") or 0),
        "rope.scaling.original_context_length": config_int(config, "original_max_position_embeddings"),
    }


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The original context length (the factors are tensors of the GGUF)."""
    return {"original_max_position_embeddings": metadata.get("phi3.rope.scaling.original_context_length", 4096)}


PHI3 = Arch(
    name="phi3",
    model_types={"Phi3ForCausalLM": "phi3"},
    defaults={"Phi3ForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    context_length=window_context_length,
    extra=extra,
    config_from=config_from,
    rope=("default", "longrope"),
    metadata=BASE_METADATA + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *linear("self_attn.qkv_proj", "attn_qkv", "n_qkv", "n_embd"),
        *linear("self_attn.o_proj", "attn_output", "n_embd", "n_q"),
        *norm("post_attention_layernorm", "ffn_norm"),
        *linear("mlp.gate_up_proj", "ffn_up", "n_ff_fused", "n_embd"),
        *linear("mlp.down_proj", "ffn_down", "n_embd", "n_ff"),
    ),
)

"""GLM-4 (0414): fused gate and up, norms before and after, half of each head rotated, neighbour by neighbour."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    linear,
    norm,
    standard_sizes,
)
from converters.architectures.spec import Arch, Config, require

_DEFAULTS = {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "tie_word_embeddings": False,
    "attention_bias": True, "partial_rotary_factor": 0.5,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    return []


GLM4 = Arch(
    name="glm4",
    model_types={"Glm4ForCausalLM": "glm4"},
    defaults={"Glm4ForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention("attention_bias"),
        *norm("post_self_attn_layernorm", "post_attention_norm"),
        *norm("post_attention_layernorm", "ffn_norm"),
        *linear("mlp.gate_up_proj", "ffn_up", "n_ff_fused", "n_embd"),
        *linear("mlp.down_proj", "ffn_down", "n_embd", "n_ff"),
        *norm("post_mlp_layernorm", "post_ffw_norm"),
    ),
)

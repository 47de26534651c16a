"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama and their fine-tunes."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    FACTOR_ROPES,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    gated_mlp,
    norm,
    partial_rotary_factor,
    standard_sizes,
    window_context_length,
)
from converters.architectures.ops import permute_rope
from converters.architectures.spec import Arch, Config, require
from edgellm.errors import UnsupportedArchitecture

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_DEFAULTS = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's llama graph computes otherwise."""
    require(config, "hidden_act", "silu", "swish")
    if partial_rotary_factor(config) != 1:
        raise UnsupportedArchitecture("a partial rotary embedding isn't supported for Llama-type models")
    return []


LLAMA = Arch(
    name="llama",
    model_types={"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
    defaults={"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": MISTRAL_DEFAULTS},
    sizes=standard_sizes,
    check=check,
    context_length=window_context_length,
    rope=FACTOR_ROPES,
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention("attention_bias", "attention_bias", (permute_rope("n_head"),), (permute_rope("n_head_kv"),)),
        *norm("post_attention_layernorm", "ffn_norm"),
        *gated_mlp("mlp_bias"),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

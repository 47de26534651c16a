"""Arcee AFM (4.5B): Llama's attention, a feed-forward without a gate and with a squared ReLU."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    FACTOR_ROPES,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    linear,
    norm,
    standard_sizes,
)
from converters.architectures.ops import permute_rope
from converters.architectures.spec import Arch, Config, require

_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "relu2")
    return []


ARCEE = Arch(
    name="arcee",
    model_types={"ArceeForCausalLM": "arcee"},
    defaults={"ArceeForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    rope=FACTOR_ROPES,
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention("attention_bias", False, (permute_rope("n_head"),), (permute_rope("n_head_kv"),)),
        *norm("post_attention_layernorm", "ffn_norm"),
        *linear("mlp.up_proj", "ffn_up", "n_ff", "n_embd"),
        *linear("mlp.down_proj", "ffn_down", "n_embd", "n_ff"),
    ),
)

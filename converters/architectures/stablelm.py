"""StableLM 3B and StableLM 2."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    BLOCK,
    LAYER_EPS,
    attention,
    embeddings,
    gated_mlp,
    norm,
    standard_sizes,
)
from converters.architectures.spec import KV, Arch, Config, Weight, require

_DEFAULTS = {
    "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_qkv_bias": False, "qk_layernorm": False,
    "use_parallel_residual": False, "partial_rotary_factor": 0.25,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    require(config, "qk_layernorm", False)
    return []


STABLELM = Arch(
    name="stablelm",
    model_types={"StableLmForCausalLM": "stablelm"},
    defaults={"StableLmForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    head="copy",
    metadata=(
        *BASE_METADATA,
        KV(LAYER_EPS, "layer_norm_eps", "float32"),
        KV("{arch}.use_parallel_residual", "use_parallel_residual", "bool"),
    ),
    weights=(
        *embeddings(),
        Weight("model.norm.bias", "output_norm.bias", ("n_embd",)),
        *norm("input_layernorm", "attn_norm", bias=True),
        *attention("use_qkv_bias"),
        Weight(f"{BLOCK}post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", ("n_embd",), optional=True),
        Weight(f"{BLOCK}post_attention_layernorm.bias", "blk.{i}.ffn_norm.bias", ("n_embd",), optional=True),
        *gated_mlp(),
    ),
)

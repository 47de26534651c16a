"""Granite 3 and 4, dense and mixture of experts (IBM)."""

from __future__ import annotations

from dataclasses import replace

from converters.architectures.common import (
    BASE_METADATA,
    BLOCK,
    FACTOR_ROPES,
    RMS_EPS,
    attention,
    embeddings,
    gated_mlp,
    linear,
    norm,
    standard_sizes,
)
from converters.architectures.ops import part, permute_rope
from converters.architectures.spec import KV, Arch, Config, Weight, require

_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_multiplier": 1.0, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_SCALES = (
    KV("{arch}.attention.scale", "attention_multiplier", "float32"),
    KV("{arch}.embedding_scale", "embedding_multiplier", "float32"),
    KV("{arch}.residual_scale", "residual_multiplier", "float32"),
    KV("{arch}.logit_scale", "logits_scaling", "float32"),
)
_EXPERT = ("n_expert", "n_ff_exp", "n_embd")
_ATTENTION = (
    *embeddings(),
    *norm("input_layernorm", "attn_norm"),
    *attention("attention_bias", "attention_bias", (permute_rope("n_head"),), (permute_rope("n_head_kv"),)),
    *norm("post_attention_layernorm", "ffn_norm"),
)


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    return []


GRANITE = Arch(
    name="granite",
    model_types={"GraniteForCausalLM": "granite"},
    defaults={"GraniteForCausalLM": _DEFAULTS},
    sizes=lambda config: standard_sizes({**config, "head_dim": None}),
    check=check,
    rope=FACTOR_ROPES,
    metadata=BASE_METADATA + RMS_EPS + _SCALES,
    weights=(*_ATTENTION, *gated_mlp("mlp_bias")),
)
GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    model_types={"GraniteMoeForCausalLM": "granitemoe"},
    defaults={"GraniteMoeForCausalLM": _DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2}},
    weights=(
        *_ATTENTION,
        *linear("block_sparse_moe.router.layer", "ffn_gate_inp", "n_expert", "n_embd"),
        Weight(f"{BLOCK}block_sparse_moe.input_linear.weight", "blk.{i}.ffn_gate_exps.weight", _EXPERT, (part(0, 2),)),
        Weight(f"{BLOCK}block_sparse_moe.input_linear.weight", "blk.{i}.ffn_up_exps.weight", _EXPERT, (part(1, 2),)),
        Weight(f"{BLOCK}block_sparse_moe.output_linear.weight", "blk.{i}.ffn_down_exps.weight",
               ("n_expert", "n_embd", "n_ff_exp")),
    ),
    module_names=(("experts.gate_up_proj", "input_linear.weight"), ("experts.down_proj", "output_linear.weight"),
                  ("moe.router.weight", "moe.router.layer.weight")),
)  # fmt: skip

"""LFM2 and LFM2-MoE (Liquid AI): short convolutions in most blocks, attention in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.common import (
    BASE_METADATA,
    BLOCK,
    attention,
    embeddings,
    experts,
    linear,
    norm,
    only,
    standard_sizes,
)
from converters.architectures.ops import part, squeeze
from converters.architectures.spec import KV, Arch, Config, Sizes, Weight, config_float, config_int, require

_DEFAULTS = {
    "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000, "norm_eps": 1e-5,
    "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3, "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "rope_theta": 1_000_000.0,
}  # fmt: skip
_MOE = _DEFAULTS | {
    "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2,
    "num_experts": 32, "num_experts_per_tok": 4, "use_expert_bias": True, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True, "block_auto_adjust_ff_dim": False,
}  # fmt: skip
_SIGMOID = 2  # GGUF's number of the gating function


def _has_attention(config: Config, i: int) -> bool:
    kinds = config.get("layer_types")
    return kinds[i] == "full_attention" if kinds else i in (config.get("full_attn_idxs") or range(1 << 20))


def _is_dense(config: Config, i: int) -> bool:
    return i < int(config.get("num_dense_layers", 1 << 20))


def sizes(config: Config) -> dict[str, int]:
    """As usual; the feed-forward width may be given before a factor and rounding, as in Lfm2MLP."""
    n_ff = config_int(config, "intermediate_size")
    if config["block_auto_adjust_ff_dim"]:
        n_ff = 2 * n_ff // 3
        if config.get("block_ffn_dim_multiplier") is not None:
            multiple = config_int(config, "block_multiple_of")
            n_ff = -(-int(config_float(config, "block_ffn_dim_multiplier") * n_ff) // multiple) * multiple
    found = standard_sizes({**config, "intermediate_size": n_ff, "head_dim": None})
    return found | {"n_conv": config_int(config, "conv_L_cache"), "n_in": 3 * found["n_embd"]}


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graphs compute otherwise."""
    require(config, "conv_bias", False)
    require(config, "head_dim", None, config["hidden_size"] // config["num_attention_heads"])
    for name, value in (("use_expert_bias", True), ("routed_scaling_factor", 1), ("norm_topk_prob", True)):
        require(config, name, None, value)
    return []


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """No key-value heads tell llama.cpp that a block has a convolution instead."""
    heads = [sizes["n_head_kv"] if _has_attention(config, i) else 0 for i in range(sizes["n_layer"])]
    moe = {"expert_gating_func": _SIGMOID} if "n_expert" in sizes else {}
    return {"feed_forward_length": sizes["n_ff"], "attention.head_count_kv": heads, **moe}


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Which blocks have attention; the width is written as it is."""
    heads = next(value for key, value in metadata.items() if key.endswith(".attention.head_count_kv"))
    kinds = ["full_attention" if n else "conv" for n in heads]
    return {"layer_types": kinds, "block_auto_adjust_ff_dim": False}


_table, _norm, _head = embeddings()
_MIXERS = (
    _table,
    Weight("model.embedding_norm.weight", "token_embd_norm.weight", ("n_embd",)),  # the final norm, for all its name
    _head,
    *norm("operator_norm", "attn_norm"),
    *only(
        _has_attention,
        *attention(o="out_proj"),
        *norm("self_attn.q_layernorm", "attn_q_norm", "head_dim"),
        *norm("self_attn.k_layernorm", "attn_k_norm", "head_dim"),
    ),
    *only(
        lambda config, i: not _has_attention(config, i),
        *linear("conv.conv", "shortconv.conv", "n_embd", "n_conv", (squeeze(1),)),
        *linear("conv.in_proj", "shortconv.in_proj", "n_in", "n_embd"),
        *linear("conv.out_proj", "shortconv.out_proj", "n_embd", "n_embd"),
    ),
    *norm("ffn_norm", "ffn_norm"),
    *only(
        _is_dense,
        *linear("feed_forward.w1", "ffn_gate", "n_ff", "n_embd"),
        *linear("feed_forward.w3", "ffn_up", "n_ff", "n_embd"),
        *linear("feed_forward.w2", "ffn_down", "n_embd", "n_ff"),
    ),
)
_FF = "feed_forward."
_EXPERT = ("n_expert", "n_ff_exp", "n_embd")

LFM2 = Arch(
    name="lfm2",
    model_types={"Lfm2ForCausalLM": "lfm2"},
    defaults={"Lfm2ForCausalLM": _DEFAULTS},
    aliases={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
    sizes=sizes,
    check=check,
    extra=extra,
    config_from=config_from,
    metadata=(
        *BASE_METADATA,
        KV("{arch}.attention.layer_norm_rms_epsilon", "norm_eps", "float32"),
        KV("{arch}.shortconv.l_cache", "conv_L_cache"),
    ),
    weights=_MIXERS,
)
LFM2_MOE = replace(
    LFM2,
    name="lfm2moe",
    model_types={"Lfm2MoeForCausalLM": "lfm2_moe"},
    defaults={"Lfm2MoeForCausalLM": _MOE},
    aliases={"tie_embedding": "tie_word_embeddings"},
    metadata=(*LFM2.metadata, KV("{arch}.leading_dense_block_count", "num_dense_layers")),
    weights=(
        *_MIXERS,
        *only(
            lambda config, i: not _is_dense(config, i),
            *linear(f"{_FF}gate", "ffn_gate_inp", "n_expert", "n_embd"),
            Weight(f"{BLOCK}{_FF}expert_bias", "blk.{i}.exp_probs_b.bias", ("n_expert",)),
            *experts(f"{_FF}experts.{{e}}.", "w1", "w3", "w2"),
            Weight(f"{BLOCK}{_FF}experts.gate_up_proj", "blk.{i}.ffn_gate_exps.weight", _EXPERT, (part(0, 2),)),
            Weight(f"{BLOCK}{_FF}experts.gate_up_proj", "blk.{i}.ffn_up_exps.weight", _EXPERT, (part(1, 2),)),
            Weight(f"{BLOCK}{_FF}experts.down_proj", "blk.{i}.ffn_down_exps.weight",
                   ("n_expert", "n_embd", "n_ff_exp")),
        ),
    ),
)  # fmt: skip

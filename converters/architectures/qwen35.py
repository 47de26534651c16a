"""Qwen3.5, dense, text: gated delta-net mixers in most blocks, gated attention in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.architectures.common import (
    BASE_METADATA,
    BLOCK,
    HEAD_DIM,
    RMS_EPS,
    embeddings,
    gated_mlp,
    linear,
    norm,
    only,
    standard_sizes,
)
from converters.architectures.ops import add, minus_exp, squeeze, tile_heads
from converters.architectures.rope import rope_parameters
from converters.architectures.spec import KV, Arch, Config, Sizes, Weight, config_int, require
from edgellm.errors import CheckpointError, UnsupportedArchitecture

_DEFAULTS = {
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
}  # fmt: skip
_CLASSES = {"Qwen3_5ForCausalLM": "qwen3_5_text", "Qwen3_5ForConditionalGeneration": "qwen3_5"}
_MROPE = [11, 11, 10]  # of t, h and w; text has the same position in all three
_ONE = (add(1.0),)
_LINEAR = f"{BLOCK}linear_attn."


def _is_linear(config: Config, i: int) -> bool:
    kinds = config.get("layer_types")
    return kinds[i] == "linear_attention" if kinds else (i + 1) % config_int(config, "full_attention_interval") != 0


def sizes(config: Config) -> dict[str, Any]:
    """As usual, with the delta-net's heads."""
    n_k, n_v = config_int(config, "linear_num_key_heads"), config_int(config, "linear_num_value_heads")
    k_dim, v_dim = config_int(config, "linear_key_head_dim"), config_int(config, "linear_value_head_dim")
    if n_v % n_k:
        raise CheckpointError(f"config.json has {n_v} linear value heads over {n_k} key heads, which doesn't divide")
    found = standard_sizes(config)
    return found | {
        "n_gated_q": 2 * found["n_q"],
        "n_group": n_k,
        "n_per_group": n_v // n_k,
        "n_v_head": n_v,
        "v_dim": v_dim,
        "n_values": n_v * v_dim,
        "n_keys": 2 * n_k * k_dim,
        "n_mixed": 2 * n_k * k_dim + n_v * v_dim,
        "n_conv": config_int(config, "linear_conv_kernel_dim"),
    }


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    require(config, "attention_bias", False)
    require(config, "linear_value_head_dim", config["linear_key_head_dim"])
    sections, n_pairs = _sections(config), standard_sizes(config)["n_rot"] // 2
    if len(sections) != 3 or any(pair >= 3 * sections[pair % 3] for pair in range(n_pairs)):
        raise UnsupportedArchitecture(f"mrope_section = {sections} isn't supported: llama.cpp wouldn't rotate the rest")
    return []


def _sections(config: Config) -> list[int]:
    return list(rope_parameters(config).get("mrope_section") or _MROPE)


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The delta-net's width, which blocks have it, and the parts of the rope."""
    return {
        "ssm.inner_size": sizes["n_values"],
        "attention.recurrent_layers": [_is_linear(config, i) for i in range(sizes["n_layer"])],
        "rope.dimension_sections": [*_sections(config), 0],
    }


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The blocks' kinds, as an array or as an interval."""
    interval = metadata.get("qwen35.full_attention_interval", 4)
    linear_blocks = metadata.get("qwen35.attention.recurrent_layers") or [
        (i + 1) % interval != 0 for i in range(sizes["n_layer"])
    ]
    return {
        "linear_value_head_dim": metadata["qwen35.ssm.inner_size"] // metadata["qwen35.ssm.time_step_rank"],
        "layer_types": ["linear_attention" if linear else "full_attention" for linear in linear_blocks],
    }


_table, _, _head = embeddings()

QWEN35 = Arch(
    name="qwen35",
    model_types=_CLASSES,
    defaults=dict.fromkeys(_CLASSES, _DEFAULTS),
    sizes=sizes,
    check=check,
    extra=extra,
    config_from=config_from,
    metadata=(
        *BASE_METADATA,
        *HEAD_DIM,
        *RMS_EPS,
        KV("{arch}.ssm.conv_kernel", "linear_conv_kernel_dim"),
        KV("{arch}.ssm.state_size", "linear_key_head_dim"),
        KV("{arch}.ssm.group_count", "linear_num_key_heads"),
        KV("{arch}.ssm.time_step_rank", "linear_num_value_heads"),
    ),
    weights=(
        _table,
        Weight("model.norm.weight", "output_norm.weight", ("n_embd",), _ONE),
        _head,
        *norm("input_layernorm", "attn_norm", ops=_ONE),
        *norm("post_attention_layernorm", "post_attention_norm", ops=_ONE),
        *gated_mlp(),
        *only(
            lambda config, i: not _is_linear(config, i),
            *linear("self_attn.q_proj", "attn_q", "n_gated_q", "n_embd"),
            *linear("self_attn.k_proj", "attn_k", "n_kv", "n_embd"),
            *linear("self_attn.v_proj", "attn_v", "n_kv", "n_embd"),
            *linear("self_attn.o_proj", "attn_output", "n_embd", "n_q"),
            *norm("self_attn.q_norm", "attn_q_norm", "head_dim", _ONE),
            *norm("self_attn.k_norm", "attn_k_norm", "head_dim", _ONE),
        ),
        *only(
            _is_linear,
            *linear("linear_attn.in_proj_qkv", "attn_qkv", "n_mixed", "n_embd", (tile_heads("v_dim", "n_keys"),)),
            *linear("linear_attn.in_proj_z", "attn_gate", "n_values", "n_embd", (tile_heads("v_dim"),)),
            *linear("linear_attn.in_proj_a", "ssm_alpha", "n_v_head", "n_embd", (tile_heads(),)),
            *linear("linear_attn.in_proj_b", "ssm_beta", "n_v_head", "n_embd", (tile_heads(),)),
            *linear("linear_attn.conv1d", "ssm_conv1d", "n_mixed", "n_conv",
                    (squeeze(1), tile_heads("v_dim", "n_keys"))),
            Weight(f"{_LINEAR}dt_bias", "blk.{i}.ssm_dt.bias", ("n_v_head",), (tile_heads(),)),
            Weight(f"{_LINEAR}A_log", "blk.{i}.ssm_a", ("n_v_head",), (minus_exp(), tile_heads())),
            *norm("linear_attn.norm", "ssm_norm", "v_dim"),
            *linear("linear_attn.out_proj", "ssm_out", "n_embd", "n_values", (tile_heads("v_dim", columns=True),)),
        ),
    ),
    renames=(("model.language_model.", "model."),),
    ignored=(r"(model\.)?visual\..*", r"(model\.)?mtp\..*"),  # images, and layers that draft tokens
)  # fmt: skip

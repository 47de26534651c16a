"""Falcon-H1 (TII): attention and a Mamba-2 mixer side by side in each block; its multipliers go into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.architectures.common import BASE_METADATA, BLOCK, HEAD_DIM, RMS_EPS, linear, standard_sizes
from converters.architectures.ops import flat, minus_exp, scale, squeeze
from converters.architectures.spec import KV, Arch, Config, Sizes, Weight, config_float, config_int, require
from edgellm.errors import CheckpointError

_FACTORS = (
    "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
    "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip
_ONES = dict.fromkeys(_FACTORS, 1.0) | {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
_DEFAULTS = _ONES | {
    "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "mamba_d_ssm": 1024, "mamba_n_heads": 128,
    "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    "mamba_norm_before_gate": True, "mamba_rms_norm": False,
}  # fmt: skip
_M = f"{BLOCK}mamba."


def sizes(config: Config) -> dict[str, Any]:
    """As usual, with the mixer's sizes and all multipliers."""
    d_inner = config.get("mamba_d_ssm") or config_int(config, "mamba_expand") * config_int(config, "hidden_size")
    n_group, n_state = config_int(config, "mamba_n_groups"), config_int(config, "mamba_d_state")
    n_heads = config_int(config, "mamba_n_heads")
    if d_inner % n_heads or d_inner % n_group:
        raise CheckpointError(f"config.json has {n_heads} heads and {n_group} groups in a mixer of {d_inner}")
    # the rows of in_proj are z, x, B, C and dt
    rows = (d_inner, d_inner, n_group * n_state, n_group * n_state, n_heads)
    return {
        **standard_sizes(config),
        **{name: config_float(config, name) for name in _FACTORS},
        **dict(zip(("gate_multiplier", "down_multiplier"), _list(config, "mlp_multipliers", 2), strict=True)),
        "ssm_rows": np.repeat(np.asarray(_list(config, "ssm_multipliers", 5), np.float32), rows)[:, None],
        "d_inner": d_inner,
        "d_group": d_inner // n_group,
        "n_group": n_group,
        "n_mamba_head": n_heads,
        "n_conv": config_int(config, "mamba_d_conv"),
        "n_conv_rows": d_inner + 2 * n_group * n_state,
        "n_in": sum(rows),
    }


def _list(config: Config, name: str, n: int) -> list[float]:
    values = config[name] if config[name] is not None else [1.0] * n
    if not isinstance(values, list | tuple) or len(values) != n:
        raise CheckpointError(f"config.json has {name} = {values!r}, expected {n} numbers")
    return [config_float({name: value}, name) for value in values]


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"):
        require(config, name, None, False)
    require(config, "mamba_conv_bias", True)
    if config["mamba_rms_norm"]:
        require(config, "mamba_norm_before_gate", False)
    infinity = float("inf"), {"__float__": "Infinity"}  # as Python's JSON and as transformers 5 write it
    require(config, "time_step_limit", None, *([0.0, value] for value in infinity))
    return []


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The mixer's width, which may be given as a factor."""
    return {"ssm.inner_size": sizes["d_inner"]}


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The multipliers stay in the weights."""
    return _ONES | {"mamba_d_head": sizes["d_inner"] // sizes["n_mamba_head"], "mamba_norm_before_gate": False}


def _scaled(hf: str, gguf: str, rows: str, columns: str, *factors: str) -> tuple[Weight, ...]:
    return linear(hf, gguf, rows, columns, (scale(*factors),) if factors else ())


FALCON_H1 = Arch(
    name="falcon-h1",
    model_types={"FalconH1ForCausalLM": "falcon_h1"},
    defaults={"FalconH1ForCausalLM": _DEFAULTS},
    sizes=sizes,
    check=check,
    extra=extra,
    config_from=config_from,
    head="copy",  # with a multiplier of its own
    metadata=(
        *BASE_METADATA,
        *HEAD_DIM,
        *RMS_EPS,
        KV("{arch}.ssm.conv_kernel", "mamba_d_conv"),
        KV("{arch}.ssm.inner_size", "mamba_d_ssm", optional=True),
        KV("{arch}.ssm.state_size", "mamba_d_state"),
        KV("{arch}.ssm.time_step_rank", "mamba_n_heads"),
        KV("{arch}.ssm.group_count", "mamba_n_groups"),
    ),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd"),
               (scale("embedding_multiplier"),)),
        Weight("model.final_layernorm.weight", "output_norm.weight", ("n_embd",)),
        Weight("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), (scale("lm_head_multiplier"),), tied=True),
        Weight(f"{BLOCK}input_layernorm.weight", "blk.{i}.attn_norm.weight", ("n_embd",)),
        *_scaled("self_attn.q_proj", "attn_q", "n_q", "n_embd", "attention_in_multiplier"),
        *_scaled("self_attn.k_proj", "attn_k", "n_kv", "n_embd", "attention_in_multiplier", "key_multiplier"),
        *_scaled("self_attn.v_proj", "attn_v", "n_kv", "n_embd", "attention_in_multiplier"),
        *_scaled("self_attn.o_proj", "attn_output", "n_embd", "n_q", "attention_out_multiplier"),
        *_scaled("mamba.in_proj", "ssm_in", "n_in", "n_embd", "ssm_in_multiplier", "ssm_rows"),
        *linear("mamba.conv1d", "ssm_conv1d", "n_conv_rows", "n_conv", (squeeze(1),)),
        Weight(f"{_M}conv1d.bias", "blk.{i}.ssm_conv1d.bias", ("n_conv_rows",)),
        Weight(f"{_M}dt_bias", "blk.{i}.ssm_dt.bias", ("n_mamba_head",)),
        Weight(f"{_M}A_log", "blk.{i}.ssm_a", ("n_mamba_head", "1"), (minus_exp(), flat())),
        Weight(f"{_M}D", "blk.{i}.ssm_d", ("n_mamba_head", "1"), (flat(),)),
        Weight(f"{_M}norm.weight", "blk.{i}.ssm_norm.weight", ("n_group", "d_group"), (flat(),), flag="mamba_rms_norm"),
        *_scaled("mamba.out_proj", "ssm_out", "n_embd", "d_inner", "ssm_out_multiplier"),
        # without ".weight", as llama.cpp has it
        Weight(f"{BLOCK}pre_ff_layernorm.weight", "blk.{i}.ffn_norm", ("n_embd",)),
        *_scaled("feed_forward.gate_proj", "ffn_gate", "n_ff", "n_embd", "gate_multiplier"),
        *_scaled("feed_forward.up_proj", "ffn_up", "n_ff", "n_embd"),
        *_scaled("feed_forward.down_proj", "ffn_down", "n_embd", "n_ff", "down_multiplier"),
    ),
)  # fmt: skip

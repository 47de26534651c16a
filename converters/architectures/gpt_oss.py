"""gpt-oss (OpenAI): attention sinks, biases everywhere, experts with gate and up interleaved and transposed."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    BLOCK,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    linear,
    norm,
    sliding_config,
    sliding_layers,
    standard_sizes,
)
from converters.architectures.ops import part, transpose
from converters.architectures.rope import UNTRUNCATED
from converters.architectures.spec import Arch, Config, Weight, require

_DEFAULTS = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True,
    "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0, "rope_theta": 150_000.0, "rope_parameters": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
_E = f"{BLOCK}mlp.experts."


def _half(k: int) -> tuple[Weight, Weight]:
    name = ("ffn_gate_exps", "ffn_up_exps")[k]
    rows = (transpose(), part(k, 2, interleaved=True))
    return (
        Weight(f"{_E}gate_up_proj", f"blk.{{i}}.{name}.weight", ("n_expert", "n_ff_exp", "n_embd"), rows),
        Weight(f"{_E}gate_up_proj_bias", f"blk.{{i}}.{name}.bias", ("n_expert", "n_ff_exp"),
               (part(k, 2, -1, interleaved=True),)),
    )  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    for name, value in (("hidden_act", "silu"), ("attention_bias", True), ("swiglu_alpha", 1.702), ("swiglu_limit", 7)):
        require(config, name, value)
    return []


GPT_OSS = Arch(
    name="gpt-oss",
    model_types={"GptOssForCausalLM": "gpt_oss"},
    defaults={"GptOssForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    rope=("default", "linear", "yarn", "dynamic", UNTRUNCATED),
    extra=lambda config, sizes: {"expert_feed_forward_length": sizes["n_ff_exp"]} | sliding_layers(config, sizes, 2),
    config_from=lambda metadata, sizes: sliding_config(metadata, "gpt-oss"),
    head="copy",
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention(True, True),
        Weight(f"{BLOCK}self_attn.sinks", "blk.{i}.attn_sinks.weight", ("n_head",)),
        *norm("post_attention_layernorm", "post_attention_norm"),
        *linear("mlp.router", "ffn_gate_inp", "n_expert", "n_embd", (), True),
        *_half(0),
        *_half(1),
        Weight(f"{_E}down_proj", "blk.{i}.ffn_down_exps.weight", ("n_expert", "n_embd", "n_ff_exp"), (transpose(),)),
        Weight(f"{_E}down_proj_bias", "blk.{i}.ffn_down_exps.bias", ("n_expert", "n_embd")),
    ),
)

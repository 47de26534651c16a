"""EXAONE 4 (LG): norms after attention and feed-forward; the 32B has windows, and rope only in their blocks."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    gated_mlp,
    norm,
    sliding_config,
    sliding_layers,
    standard_sizes,
)
from converters.architectures.spec import Arch, Config, require
from edgellm.errors import UnsupportedArchitecture

_DEFAULTS = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 4096, "sliding_window_pattern": 4,
}  # fmt: skip
_WINDOWED_LAYERS = 64  # llama.cpp applies windows to models of this depth only


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "silu")
    require(config, "head_dim", None, config["hidden_size"] // config["num_attention_heads"])
    if config.get("sliding_window"):
        if config["num_hidden_layers"] != _WINDOWED_LAYERS:
            raise UnsupportedArchitecture(
                f"a sliding window isn't supported here: llama.cpp has it for {_WINDOWED_LAYERS} layers only"
            )
        if not config.get("layer_types"):
            require(config, "sliding_window_pattern", 4, "LLLG")
    return []


EXAONE4 = Arch(
    name="exaone4",
    model_types={"Exaone4ForCausalLM": "exaone4"},
    defaults={"Exaone4ForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    rope=("default", "linear", "yarn", "dynamic", "llama3"),
    extra=lambda config, sizes: sliding_layers(config, sizes, 4),
    config_from=lambda metadata, sizes: (
        sliding_config(metadata, "exaone4")
        or {"sliding_window": None, "layer_types": ["full_attention"] * sizes["n_layer"]}
    ),
    metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
    weights=(
        *embeddings(),
        *attention(),
        *norm("self_attn.q_norm", "attn_q_norm", "head_dim"),
        *norm("self_attn.k_norm", "attn_k_norm", "head_dim"),
        *norm("post_attention_layernorm", "post_attention_norm"),
        *norm("post_feedforward_layernorm", "post_ffw_norm"),
        *gated_mlp(),
    ),
)

"""SmolLM3: llama with every fourth block free of rope, which llama.cpp's graph has built in."""

from __future__ import annotations

from dataclasses import replace

from converters.architectures.llama import LLAMA, check
from converters.architectures.spec import Config, require
from edgellm.errors import UnsupportedArchitecture

_DEFAULTS = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 2_000_000.0, "attention_bias": False,
    "mlp_bias": False, "no_rope_layer_interval": 4,
}  # fmt: skip


def check_smollm3(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "use_sliding_window", False, None)
    kinds = config.get("no_rope_layers")
    n_layer = int(config["num_hidden_layers"])
    if kinds and list(kinds) != [int((i + 1) % 4 != 0) for i in range(n_layer)]:
        raise UnsupportedArchitecture("no_rope_layers other than each fourth isn't supported by llama.cpp")
    require(config, "no_rope_layer_interval", 4, None)
    return check(config)


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_types={"SmolLM3ForCausalLM": "smollm3"},
    defaults={"SmolLM3ForCausalLM": _DEFAULTS},
    check=check_smollm3,
    rope=("default", "linear", "yarn", "dynamic"),
)

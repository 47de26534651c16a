"""StarCoder2."""

from __future__ import annotations

from converters.architectures.common import (
    BASE_METADATA,
    LAYER_EPS,
    attention,
    embeddings,
    linear,
    norm,
    standard_sizes,
    window_context_length,
)
from converters.architectures.spec import KV, Arch, Config, Weight, require

_DEFAULTS = {
    "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "use_bias": True,
    "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "gelu_pytorch_tanh", "gelu_new")
    require(config, "use_bias", True)
    return []


STARCODER2 = Arch(
    name="starcoder2",
    model_types={"Starcoder2ForCausalLM": "starcoder2"},
    defaults={"Starcoder2ForCausalLM": _DEFAULTS},
    sizes=standard_sizes,
    check=check,
    context_length=window_context_length,
    metadata=(*BASE_METADATA, KV(LAYER_EPS, "norm_epsilon", "float32")),
    weights=(
        *embeddings(),
        Weight("model.norm.bias", "output_norm.bias", ("n_embd",)),
        *norm("input_layernorm", "attn_norm", bias=True),
        *attention(True, True),
        *norm("post_attention_layernorm", "ffn_norm", bias=True),
        *linear("mlp.c_fc", "ffn_up", "n_ff", "n_embd", (), True),
        *linear("mlp.c_proj", "ffn_down", "n_embd", "n_ff", (), True),
    ),
)

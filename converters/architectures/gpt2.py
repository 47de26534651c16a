"""GPT-2."""

from __future__ import annotations

from converters.architectures.common import LAYER_EPS, linear, norm, standard_sizes
from converters.architectures.ops import transpose
from converters.architectures.spec import KV, Arch, Config, Weight, config_int, require

_DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
_ALIASES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
}  # fmt: skip
_H = "transformer.h.{i}."
_T = (transpose(),)


def sizes(config: Config) -> dict[str, int]:
    """As usual, with a feed-forward width of four times the embedding where none is given."""
    n_ff = config.get("intermediate_size") or 4 * config_int(config, "hidden_size")
    n_ctx = config_int(config, "max_position_embeddings")
    return standard_sizes({**config, "intermediate_size": n_ff}) | {"n_ctx": n_ctx}


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    return []


GPT2 = Arch(
    name="gpt2",
    model_types={"GPT2LMHeadModel": "gpt2"},
    defaults={"GPT2LMHeadModel": {_ALIASES.get(key, key): value for key, value in _DEFAULTS.items()}},
    aliases=_ALIASES,
    sizes=sizes,
    check=check,
    rope=(),
    extra=lambda config, sizes: {"feed_forward_length": sizes["n_ff"]},
    config_from=lambda metadata, sizes: {"intermediate_size": metadata["gpt2.feed_forward_length"]},
    metadata=(
        KV("{arch}.block_count", "num_hidden_layers"),
        KV("{arch}.embedding_length", "hidden_size"),
        KV("{arch}.attention.head_count", "num_attention_heads"),
        KV(LAYER_EPS, "layer_norm_epsilon", "float32"),
    ),
    weights=(
        Weight("transformer.wte.weight", "token_embd.weight", ("n_vocab", "n_embd")),
        Weight("transformer.wpe.weight", "position_embd.weight", ("n_ctx", "n_embd")),
        Weight("transformer.ln_f.weight", "output_norm.weight", ("n_embd",)),
        Weight("transformer.ln_f.bias", "output_norm.bias", ("n_embd",)),
        Weight("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), tied=True),
        *norm("ln_1", "attn_norm", bias=True, block=_H),
        *linear("attn.c_attn", "attn_qkv", "n_qkv", "n_embd", _T, True, _H),
        *linear("attn.c_proj", "attn_output", "n_embd", "n_embd", _T, True, _H),
        *norm("ln_2", "ffn_norm", bias=True, block=_H),
        *linear("mlp.c_fc", "ffn_up", "n_ff", "n_embd", _T, True, _H),
        *linear("mlp.c_proj", "ffn_down", "n_embd", "n_ff", _T, True, _H),
    ),
    renames=tuple((prefix, f"transformer.{prefix}") for prefix in ("wte.", "wpe.", "h.", "ln_f.")),
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

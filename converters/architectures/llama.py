"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama and their fine-tunes."""

from __future__ import annotations

from converters.architectures.ops import permute_rope
from converters.architectures.rope import rope_parameters
from converters.architectures.spec import KV, Arch, Config, Weight, config_int
from edgellm.errors import CheckpointError, UnsupportedArchitecture

_BLOCK = "model.layers.{i}."
_Q, _K = (permute_rope("n_head"),), (permute_rope("n_head_kv"),)
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip


def sizes(config: Config) -> dict[str, int]:
    """The numbers shapes and ops are written in."""
    n_embd, n_head = config_int(config, "hidden_size"), config_int(config, "num_attention_heads")
    n_head_kv = config_int(config, "num_key_value_heads") if config.get("num_key_value_heads") else n_head
    head_dim = config_int(config, "head_dim") if config.get("head_dim") else n_embd // n_head
    if n_head % n_head_kv or head_dim % 2:
        raise CheckpointError(
            f"config.json has {n_head} heads of {head_dim} over {n_head_kv} key-value heads, which doesn't divide"
        )
    return {
        "n_layer": config_int(config, "num_hidden_layers"),
        "n_embd": n_embd,
        "n_ff": config_int(config, "intermediate_size"),
        "n_vocab": config_int(config, "vocab_size"),
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_q": n_head * head_dim,
        "n_kv": n_head_kv * head_dim,
    }


def check(config: Config) -> None:
    """Refuses what llama.cpp's llama graph computes otherwise."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedArchitecture(f"hidden_act {config['hidden_act']!r} isn't supported here: llama.cpp has silu")
    if any(part.get("partial_rotary_factor") not in (None, 1) for part in (config, rope_parameters(config))):
        raise UnsupportedArchitecture("a partial rotary embedding isn't supported for Llama-type models")


def context_length(config: Config) -> tuple[int, list[str]]:
    """As far as llama.cpp computes the same: its llama graph has no sliding window."""
    trained, window = config_int(config, "max_position_embeddings"), config.get("sliding_window")
    if not window or window >= trained:
        return trained, []
    return window, [f"context limited to the sliding window of {window} tokens, which llama.cpp doesn't apply here"]


LLAMA = Arch(
    name="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    model_types={"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
    defaults={"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _MISTRAL},
    sizes=sizes,
    check=check,
    context_length=context_length,
    metadata=(
        KV("{arch}.block_count", "num_hidden_layers"),
        KV("{arch}.embedding_length", "hidden_size"),
        KV("{arch}.feed_forward_length", "intermediate_size"),
        KV("{arch}.attention.head_count", "num_attention_heads"),
        KV("{arch}.attention.head_count_kv", "num_key_value_heads", optional=True),
        KV("{arch}.attention.key_length", "head_dim", optional=True),
        KV("{arch}.attention.value_length", "head_dim", optional=True),
        KV("{arch}.attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"),
        KV("{arch}.vocab_size", "vocab_size"),
    ),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd")),
        Weight("model.norm.weight", "output_norm.weight", ("n_embd",)),
        Weight("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), tied=True),
        Weight(_BLOCK + "input_layernorm.weight", "blk.{i}.attn_norm.weight", ("n_embd",)),
        Weight(_BLOCK + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", ("n_q", "n_embd"), _Q),
        Weight(_BLOCK + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", ("n_q",), _Q, flag="attention_bias"),
        Weight(_BLOCK + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", ("n_kv", "n_embd"), _K),
        Weight(_BLOCK + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", ("n_kv",), _K, flag="attention_bias"),
        Weight(_BLOCK + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", ("n_kv", "n_embd")),
        Weight(_BLOCK + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", ("n_kv",), flag="attention_bias"),
        Weight(_BLOCK + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", ("n_embd", "n_q")),
        Weight(_BLOCK + "self_attn.o_proj.bias", "blk.{i}.attn_output.bias", ("n_embd",), flag="attention_bias"),
        Weight(_BLOCK + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", ("n_embd",)),
        Weight(_BLOCK + "mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", ("n_ff", "n_embd")),
        Weight(_BLOCK + "mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", ("n_ff",), flag="mlp_bias"),
        Weight(_BLOCK + "mlp.up_proj.weight", "blk.{i}.ffn_up.weight", ("n_ff", "n_embd")),
        Weight(_BLOCK + "mlp.up_proj.bias", "blk.{i}.ffn_up.bias", ("n_ff",), flag="mlp_bias"),
        Weight(_BLOCK + "mlp.down_proj.weight", "blk.{i}.ffn_down.weight", ("n_embd", "n_ff")),
        Weight(_BLOCK + "mlp.down_proj.bias", "blk.{i}.ffn_down.bias", ("n_embd",), flag="mlp_bias"),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

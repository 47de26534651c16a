"""Embedding models: BERT, RoBERTa, XLM-RoBERTa (BGE, E5, GTE, MiniLM, …) and nomic-bert."""

from __future__ import annotations

from typing import Any

from converters.architectures.common import BASE_METADATA, LAYER_EPS, linear, norm, standard_sizes
from converters.architectures.ops import skip_rows
from converters.architectures.spec import KV, Arch, Config, Weight, config_int, hf_class, require

_BERT = {
    "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
_ROBERTA = _BERT | {"vocab_size": 50265, "pad_token_id": 1}
_NOMIC = _BERT | {
    "vocab_size": 30528, "hidden_act": "silu", "max_position_embeddings": 2048, "rope_theta": 1000.0,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "prenorm": False, "activation_function": "swiglu",
    "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
}  # fmt: skip
_MODEL_TYPES = {
    "BertModel": "bert", "BertForMaskedLM": "bert", "RobertaModel": "roberta", "RobertaForMaskedLM": "roberta",
    "XLMRobertaModel": "xlm-roberta", "XLMRobertaForMaskedLM": "xlm-roberta",
}  # fmt: skip
_LAYER = "encoder.layer.{i}."
_NOMIC_LAYER = "encoder.layers.{i}."
_METADATA = (
    *(kv for kv in BASE_METADATA if kv.field != "num_key_value_heads"),
    KV(LAYER_EPS, "layer_norm_eps", "float32"),
    KV("tokenizer.ggml.token_type_count", "type_vocab_size"),
)


def _n_skipped(config: Config) -> int:
    """RoBERTa counts positions from behind the padding token's id."""
    return int(config.get("pad_token_id") or 0) + 1 if "Roberta" in hf_class(config) else 0


def sizes(config: Config) -> dict[str, Any]:
    """As usual, with the tables of positions and token types."""
    n_skipped = _n_skipped(config)
    n_ctx = config_int(config, "max_position_embeddings") - n_skipped
    return standard_sizes(config) | {
        "n_ctx": n_ctx,
        "n_skipped": n_skipped,
        "n_token_type": config_int(config, "type_vocab_size"),
    }


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise."""
    require(config, "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    require(config, "position_embedding_type", None, "absolute")
    require(config, "is_decoder", None, False)
    return []


def check_nomic(config: Config) -> list[str]:
    """The activation and what the older config.json says besides."""
    require(config, "hidden_act", "silu")
    for name in ("rotary_emb_fraction", "rotary_emb_interleaved", "prenorm", "activation_function"):
        require(config, name, _NOMIC[name])
    for name in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
        require(config, name, False)
    return []


def _tables(norm_name: str) -> tuple[Weight, ...]:
    return (
        Weight("embeddings.word_embeddings.weight", "token_embd.weight", ("n_vocab", "n_embd")),
        Weight("embeddings.token_type_embeddings.weight", "token_types.weight", ("n_token_type", "n_embd")),
        Weight(f"{norm_name}.weight", "token_embd_norm.weight", ("n_embd",)),
        Weight(f"{norm_name}.bias", "token_embd_norm.bias", ("n_embd",)),
    )


BERT = Arch(
    name="bert",
    model_types=_MODEL_TYPES,
    defaults={name: _BERT if kind == "bert" else _ROBERTA for name, kind in _MODEL_TYPES.items()},
    sizes=sizes,
    check=check,
    context_length=lambda config: (config_int(config, "max_position_embeddings") - _n_skipped(config), []),
    rope=(),
    extra=lambda config, sizes: {"attention.causal": False},
    metadata=_METADATA,
    weights=(
        *_tables("embeddings.LayerNorm"),
        Weight("embeddings.position_embeddings.weight", "position_embd.weight", ("n_ctx", "n_embd"),
               (skip_rows("n_skipped"),)),
        *linear("attention.self.query", "attn_q", "n_embd", "n_embd", (), True, _LAYER),
        *linear("attention.self.key", "attn_k", "n_embd", "n_embd", (), True, _LAYER),
        *linear("attention.self.value", "attn_v", "n_embd", "n_embd", (), True, _LAYER),
        *linear("attention.output.dense", "attn_output", "n_embd", "n_embd", (), True, _LAYER),
        *norm("attention.output.LayerNorm", "attn_output_norm", bias=True, block=_LAYER),
        *linear("intermediate.dense", "ffn_up", "n_ff", "n_embd", (), True, _LAYER),
        *linear("output.dense", "ffn_down", "n_embd", "n_ff", (), True, _LAYER),
        *norm("output.LayerNorm", "layer_output_norm", bias=True, block=_LAYER),
    ),
    renames=(("bert.", ""), ("roberta.", "")),
    ignored=(r"pooler\..*", r"cls\..*", r"lm_head\..*", r"embeddings\.position_ids"),  # not for embeddings
)  # fmt: skip
NOMIC_BERT = Arch(
    name="nomic-bert",
    model_types={"NomicBertModel": "nomic_bert"},
    defaults={"NomicBertModel": _NOMIC},
    aliases={
        "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "max_trained_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta",
    },
    sizes=lambda config: standard_sizes(config) | {"n_token_type": config_int(config, "type_vocab_size")},
    check=check_nomic,
    extra=lambda config, sizes: {"attention.causal": False},
    metadata=_METADATA,
    weights=(
        *_tables("emb_ln"),
        *linear("attn.Wqkv", "attn_qkv", "n_qkv", "n_embd", block=_NOMIC_LAYER),
        *linear("attn.out_proj", "attn_output", "n_embd", "n_embd", block=_NOMIC_LAYER),
        *norm("norm1", "attn_output_norm", bias=True, block=_NOMIC_LAYER),
        *linear("mlp.fc11", "ffn_up", "n_ff", "n_embd", block=_NOMIC_LAYER),
        *linear("mlp.fc12", "ffn_gate", "n_ff", "n_embd", block=_NOMIC_LAYER),
        *linear("mlp.fc2", "ffn_down", "n_embd", "n_ff", block=_NOMIC_LAYER),
        *norm("norm2", "layer_output_norm", bias=True, block=_NOMIC_LAYER),
    ),
)  # fmt: skip

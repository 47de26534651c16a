"""Qwen2, Qwen2.5, Qwen3 and their mixture-of-experts models, DeepSeek-R1-Distill-Qwen, Qwen3-Embedding."""

from __future__ import annotations

from converters.architectures.common import (
    BARE_NAMES,
    BASE_METADATA,
    BLOCK,
    HEAD_DIM,
    RMS_EPS,
    attention,
    embeddings,
    experts,
    gated_mlp,
    linear,
    norm,
    standard_sizes,
)
from converters.architectures.ops import part
from converters.architectures.spec import Arch, Config, Weight, require
from edgellm.errors import UnsupportedArchitecture

_QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
_MOE = _QWEN2 | {
    "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
_QWEN3_MOE = _MOE | {
    "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "shared_expert_intermediate_size": None,
    "attention_bias": False,
}  # fmt: skip
_NORMS = (*norm("input_layernorm", "attn_norm"), *norm("post_attention_layernorm", "ffn_norm"))
_QK_NORMS = (*norm("self_attn.q_norm", "attn_q_norm", "head_dim"), *norm("self_attn.k_norm", "attn_k_norm", "head_dim"))
_FUSED_EXPERTS = (  # transformers 5 may store all experts of a block in two tensors
    Weight(f"{BLOCK}mlp.experts.gate_up_proj", "blk.{i}.ffn_gate_exps.weight", ("n_expert", "n_ff_exp", "n_embd"),
           (part(0, 2),)),
    Weight(f"{BLOCK}mlp.experts.gate_up_proj", "blk.{i}.ffn_up_exps.weight", ("n_expert", "n_ff_exp", "n_embd"),
           (part(1, 2),)),
    Weight(f"{BLOCK}mlp.experts.down_proj", "blk.{i}.ffn_down_exps.weight", ("n_expert", "n_embd", "n_ff_exp")),
)  # fmt: skip
_ROUTED = (*linear("mlp.gate", "ffn_gate_inp", "n_expert", "n_embd"), *experts(), *_FUSED_EXPERTS)
_SHARED = (
    *gated_mlp(prefix="mlp.shared_expert.", n_ff="n_ff_shexp", suffix="_shexp"),
    Weight(f"{BLOCK}mlp.shared_expert_gate.weight", "blk.{i}.ffn_gate_inp_shexp.weight", ("1", "n_embd")),
)


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graphs compute otherwise."""
    require(config, "hidden_act", "silu")
    require(config, "use_sliding_window", False, None)
    require(config, "attention_bias", False, None)
    return []


def check_moe(config: Config) -> list[str]:
    """Every block must route, with the normalization the graph has."""
    require(config, "decoder_sparse_step", 1, None)
    if config.get("mlp_only_layers"):
        raise UnsupportedArchitecture("mlp_only_layers isn't supported here: llama.cpp routes in every block")
    require(config, "norm_topk_prob", "qwen3_moe" in str(config.get("model_type")), None)
    return check(config)


def _arch(
    name: str, hf: tuple[str, ...], model_type: str, defaults: dict[str, object], weights: tuple[Weight, ...]
) -> Arch:
    moe = "n_expert" in str(weights)
    return Arch(
        name=name,
        model_types=dict.fromkeys(hf, model_type),
        defaults=dict.fromkeys(hf, defaults),
        sizes=standard_sizes,
        check=check_moe if moe else check,
        metadata=BASE_METADATA + HEAD_DIM + RMS_EPS,
        weights=(*embeddings(), *_NORMS, *weights),
        renames=BARE_NAMES,
        head="copy" if name == "qwen2moe" else "omit",
        config_from=lambda metadata, sizes: {"norm_topk_prob": True} if name == "qwen3moe" else {},
    )


QWEN2 = _arch("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), "qwen2", _QWEN2, (*attention(qkv_bias=True), *gated_mlp()))
QWEN3 = _arch(
    "qwen3",
    ("Qwen3ForCausalLM", "Qwen3Model"),
    "qwen3",
    _QWEN2 | {"head_dim": 128, "attention_bias": False},
    (*attention(), *_QK_NORMS, *gated_mlp()),
)
QWEN2_MOE = _arch(
    "qwen2moe", ("Qwen2MoeForCausalLM",), "qwen2_moe", _MOE, (*attention(qkv_bias=True), *_ROUTED, *_SHARED)
)
QWEN3_MOE = _arch(
    "qwen3moe",
    ("Qwen3MoeForCausalLM",),
    "qwen3_moe",
    _QWEN3_MOE,
    (*attention(), *_QK_NORMS, *_ROUTED),
)

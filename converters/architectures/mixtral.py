"""Mixtral: llama's graph with experts."""

from __future__ import annotations

from dataclasses import replace

from converters.architectures.common import attention, embeddings, experts, linear, norm
from converters.architectures.llama import LLAMA, MISTRAL_DEFAULTS
from converters.architectures.ops import permute_rope

_DEFAULTS = MISTRAL_DEFAULTS | {
    "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 1_000_000.0,
}  # fmt: skip
_HF = "block_sparse_moe."

MIXTRAL = replace(
    LLAMA,
    model_types={"MixtralForCausalLM": "mixtral"},
    defaults={"MixtralForCausalLM": _DEFAULTS},
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *attention(q_ops=(permute_rope("n_head"),), k_ops=(permute_rope("n_head_kv"),)),
        *norm("post_attention_layernorm", "ffn_norm"),
        *linear(f"{_HF}gate", "ffn_gate_inp", "n_expert", "n_embd"),
        *experts(f"{_HF}experts.{{e}}.", gate="w1", up="w3", down="w2"),
    ),
    module_names=((".mlp.", f".{_HF}"),),
)

"""The models every family is verified with: config class, model class and what is particular about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DROP = object()  # the config class doesn't have this field
_BASE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "long_factor": [1 + 0.2 * i for i in range(16)], "short_factor": [1 + 0.05 * i for i in range(16)],
}  # fmt: skip
_EXACT, _GELU = 2e-3, 4e-3  # llama.cpp's GELU is a table of 16-bit floats
_PLUS_ONE = {r"norm": 2.4e-7}  # w + 1 - 1
_DECAY = {r"A_log": 4e-6}
_NO_HEADS = frozenset({"pooler.dense.weight", "pooler.dense.bias"})


@dataclass(frozen=True)
class Case:
    """family: general.architecture. softened: a pattern of weights to make a third of what they'd be. edit: changes
    to config.json after saving. bound: of the deviation. lossy: patterns of tensors that don't come back bit for bit
    → how far they may be off; lost: those that don't come back. pooling: an embedding model, and how it pools.
    """

    name: str
    family: str
    config_class: str
    model_class: str
    what: str
    config: Mapping[str, Any]
    edit: Mapping[str, Any] = field(default_factory=dict)
    bound: float = _EXACT
    lossy: Mapping[str, float] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    pooling: str = ""
    softened: str = ""

    @property
    def converted_class(self) -> str:
        return str(self.edit.get("architectures", [self.model_class])[0])


CASES: list[Case] = []


def _add(family: str, classes: str, what: str, options: Mapping[str, Any] | None = None, **config: Any) -> None:
    config_class, model_class = classes.split()
    merged = {key: value for key, value in (_BASE | config).items() if value is not _DROP}
    n_before = sum(case.family == family for case in CASES)
    CASES.append(Case(f"{family}-{n_before + 1}", family, config_class, model_class, what, merged, **(options or {})))


_TIED = {"tie_word_embeddings": True}

_C = "LlamaConfig LlamaForCausalLM"
_add("llama", _C, "grouped heads, biases", attention_bias=True, mlp_bias=True)
_add("llama", _C, "tied, llama3 rope, head_dim", **_TIED, rope_parameters=_LLAMA3, head_dim=48)
_add("llama", _C, "longrope", rope_parameters=_LONG)
_add("llama", _C, "linear rope", rope_parameters=_LINEAR)
_add("llama", "MistralConfig MistralForCausalLM", "Mistral, yarn", rope_parameters=_YARN, sliding_window=None)
_C = "MixtralConfig MixtralForCausalLM"
_add("llama", _C, "4 experts", num_local_experts=4, num_experts_per_tok=2)
_add("llama", _C, "8 experts, 3 used, tied", **_TIED, num_local_experts=8, num_experts_per_tok=3)
_C = "SmolLM3Config SmolLM3ForCausalLM"
_add("smollm3", _C, "tied, 5 layers", num_hidden_layers=5)
_add("smollm3", _C, "untied, yarn", tie_word_embeddings=False, num_hidden_layers=4, rope_parameters=_YARN)
_C = "Qwen2Config Qwen2ForCausalLM"
_add("qwen2", _C, "biases")
_add("qwen2", _C, "tied, yarn", **_TIED, rope_parameters=_YARN)
_C = "Qwen3Config Qwen3ForCausalLM"
_add("qwen3", _C, "head_dim 48", head_dim=48)
_add("qwen3", _C, "tied, yarn", **_TIED, head_dim=32, rope_parameters=_YARN)
_C, _M = "Qwen3Config Qwen3Model", {"pooling": "lasttoken"}
_add("qwen3", _C, "embedding, last token", _M, head_dim=32)
_add("qwen3", _C, "embedding, mean, tied", {"pooling": "mean"}, **_TIED, head_dim=48)
_C, _E = "Qwen2MoeConfig Qwen2MoeForCausalLM", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_add("qwen2moe", _C, "6 experts and a shared one", **_E, shared_expert_intermediate_size=160)
_add("qwen2moe", _C, "tied, 4 used", **_TIED, **(_E | {"num_experts_per_tok": 4}), shared_expert_intermediate_size=64)
_C = "Qwen3MoeConfig Qwen3MoeForCausalLM"
_add("qwen3moe", _C, "6 experts", **_E, head_dim=32, norm_topk_prob=True)
_add("qwen3moe", _C, "tied, 4 used", **_TIED, **(_E | {"num_experts_per_tok": 4}), head_dim=48, norm_topk_prob=True)
_C, _G = "GemmaConfig GemmaForCausalLM", {"bound": _GELU, "lossy": _PLUS_ONE}
_add("gemma", _C, "grouped heads", _G, head_dim=32)
_add("gemma", _C, "one key-value head", _G, head_dim=48, num_key_value_heads=1)
_C = "Gemma2Config Gemma2ForCausalLM"
_add("gemma2", _C, "window 64, soft caps", _G, head_dim=32, query_pre_attn_scalar=32, sliding_window=64)
_add("gemma2", _C, "window 24", _G, head_dim=48, query_pre_attn_scalar=48, sliding_window=24, num_hidden_layers=3)
_C = "Gemma3TextConfig Gemma3ForCausalLM"
_L = {"query_pre_attn_scalar": 32, "head_dim": 32}
_add("gemma3", _C, "window 64, 7 layers", _G, **_L, sliding_window=64, num_hidden_layers=7)
_FULL = {
    "full_attention": _LINEAR | {"rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_add("gemma3", _C, "window 24, linear rope", _G, **_L, sliding_window=24, num_hidden_layers=6, rope_parameters=_FULL)
_C = "Gemma3TextConfig Gemma3TextModel"
_L = _L | {"use_bidirectional_attention": True}
_add("gemma-embedding", _C, "window 64, mean", _G | {"pooling": "mean"}, **_L, sliding_window=64, num_hidden_layers=7)
_add(
    "gemma-embedding",
    _C,
    "window 33, first token",
    _G | {"pooling": "cls"},
    **_L,
    sliding_window=33,
    num_hidden_layers=6,
)
_C = "Phi3Config Phi3ForCausalLM"
_add("phi3", _C, "fused projections")
_add("phi3", _C, "longrope, tied", **_TIED, rope_parameters=_LONG, original_max_position_embeddings=64)
_C, _G = "GPT2Config GPT2LMHeadModel", {"bound": _GELU}
_OWN = dict.fromkeys(list(_BASE)[1:7], _DROP)
_add("gpt2", _C, "3 layers", _G, **_OWN, n_embd=128, n_layer=3, n_head=4, n_positions=512)
_add(
    "gpt2",
    _C,
    "untied, n_inner",
    _G,
    **_OWN,
    n_embd=96,
    n_layer=2,
    n_head=6,
    n_positions=256,
    n_inner=160,
    tie_word_embeddings=False,
)
_C = "Starcoder2Config Starcoder2ForCausalLM"
_add("starcoder2", _C, "tied", _G)
_add("starcoder2", _C, "untied, yarn", _G, tie_word_embeddings=False, rope_parameters=_YARN)
_C = "StableLmConfig StableLmForCausalLM"
_add("stablelm", _C, "biases", use_qkv_bias=True)
_add("stablelm", _C, "parallel residual, half rotated", use_parallel_residual=True, partial_rotary_factor=0.5)
_C = "Olmo2Config Olmo2ForCausalLM"
_add("olmo2", _C, "grouped heads")
_add("olmo2", _C, "tied, yarn", **_TIED, rope_parameters=_YARN)
_C = "Olmo3Config Olmo3ForCausalLM"
_add("olmo2", _C, "OLMo 3, window 64", sliding_window=64, num_hidden_layers=4)
_add("olmo2", _C, "OLMo 3, window 24, 5 layers", sliding_window=24, num_hidden_layers=5)
_C = "OlmoeConfig OlmoeForCausalLM"
_add("olmoe", _C, "6 experts", num_key_value_heads=4, num_experts=6, num_experts_per_tok=2)
_add("olmoe", _C, "tied, 3 used", **_TIED, num_key_value_heads=4, num_experts=8, num_experts_per_tok=3)
_C = "GraniteConfig GraniteForCausalLM"
_S = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
_add("granite", _C, "four scales", **_S)
_add(
    "granite",
    _C,
    "tied, biases, llama3 rope",
    **_S,
    **_TIED,
    attention_bias=True,
    mlp_bias=True,
    rope_parameters=_LLAMA3,
)
_C = "GraniteMoeConfig GraniteMoeForCausalLM"
_add("granitemoe", _C, "4 experts", **_S, num_local_experts=4, num_experts_per_tok=2)
_add("granitemoe", _C, "tied, 8 experts", **_S, **_TIED, num_local_experts=8, num_experts_per_tok=3)
_C = "Glm4Config Glm4ForCausalLM"
_add("glm4", _C, "biases, half rotated", head_dim=32)
_add(
    "glm4",
    _C,
    "tied, no biases, yarn",
    **_TIED,
    head_dim=48,
    attention_bias=False,
    rope_parameters=_YARN | {"partial_rotary_factor": 0.5},
)
_C, _F = "Exaone4Config Exaone4ForCausalLM", {"sliding_window": None, "layer_types": ["full_attention"] * 2}
_add("exaone4", _C, "llama3 rope", **_F, rope_parameters=_LLAMA3)
_add("exaone4", _C, "tied", **_F, **_TIED)
_add(
    "exaone4", _C, "64 layers, window 48", sliding_window=48, num_hidden_layers=64, hidden_size=64, intermediate_size=64
)
_C, _T = "Lfm2Config Lfm2ForCausalLM", ["conv", "full_attention", "conv", "full_attention"]
_add("lfm2", _C, "tied", layer_types=_T, num_hidden_layers=4)
_add(
    "lfm2",
    _C,
    "untied, kernel 4",
    layer_types=_T[::-1],
    num_hidden_layers=4,
    block_auto_adjust_ff_dim=False,
    tie_word_embeddings=False,
    conv_L_cache=4,
)
_C, _E = "Lfm2MoeConfig Lfm2MoeForCausalLM", {"layer_types": _T, "num_hidden_layers": 4}
_add(
    "lfm2moe",
    _C,
    "6 experts, tied",
    **_E,
    num_dense_layers=1,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
)
_add(
    "lfm2moe",
    _C,
    "8 experts, untied",
    **_E,
    num_dense_layers=2,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    tie_word_embeddings=False,
)
_C = "Ministral3Config Ministral3ForCausalLM"
_R = _YARN | {"original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_add("mistral3", _C, "yarn, scaled queries", head_dim=32, rope_parameters=_R)
_add("mistral3", _C, "tied, other mscale", **_TIED, head_dim=48, rope_parameters=_R | {"mscale_all_dim": 0.5})
_C = "GptOssConfig GptOssForCausalLM"
_E = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 48, "num_hidden_layers": 3}
_add("gpt-oss", _C, "window 48, yarn", **_E, head_dim=32, rope_parameters=_YARN | {"truncate": True})
_add(
    "gpt-oss",
    _C,
    "tied, plain rope",
    **_E,
    **_TIED,
    head_dim=64,
    rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
)
_O = {"rope_theta": 150000.0, "truncate": False, "original_max_position_embeddings": 4096, "factor": 32.0}
_add(
    "gpt-oss",
    _C,
    "unrounded yarn",
    {"bound": 3e-2},
    **(_E | {"num_experts_per_tok": 6}),  # all: a small difference can't choose others
    head_dim=64,
    max_position_embeddings=131072,
    rope_parameters=_YARN | _O,
)
_C = "FalconH1Config FalconH1ForCausalLM"
_E = {
    "mamba_d_ssm": 192,
    "mamba_n_heads": 12,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "head_dim": 32,
    "mamba_chunk_size": 32,
}
_add(
    "falcon-h1", _C, "gated norm, 2 groups", {"lossy": _DECAY}, **_E, mamba_rms_norm=True, mamba_norm_before_gate=False
)
_X = {
    "mlp_multipliers": [0.9, 0.3], "ssm_multipliers": [0.3, 0.25, 0.5, 0.8, 0.7], "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.04, "key_multiplier": 0.4, "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.3,
}  # fmt: skip
_add("falcon-h1", _C, "tied, all multipliers", {"lossy": {"": 10.0}}, **(_E | {"mamba_n_groups": 1}), **_TIED, **_X)
_C, _G = "Qwen3_5TextConfig Qwen3_5ForCausalLM", {"lossy": _PLUS_ONE | _DECAY}
_E = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
}
_R = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
_add("qwen35", _C, "2 value heads for each key head", _G, **_E)
_add(
    "qwen35",
    _C,
    "tied, 3 for each, kernel 3, other blocks",
    _G,
    **_TIED,
    **(_E | {"linear_num_value_heads": 6, "linear_conv_kernel_dim": 3}),
    layer_types=["full_attention", "linear_attention"] * 2,
    rope_parameters=_R,
)
# transformers has no MiniCPM; Granite's class with the same scales computes the same
_C = "GraniteConfig GraniteForCausalLM"
_S = {
    "attention_multiplier": 32**-0.5,
    "embedding_multiplier": 12,
    "residual_multiplier": 1.4 / 2**0.5,
    "logits_scaling": 4.0,
}
_M = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 32,
}
_add("minicpm", _C, "against Granite's class with these scales", {"edit": _M}, **_S)
_add("minicpm", _C, "tied, one key-value head", {"edit": _M}, **_S, **_TIED, num_key_value_heads=1)
_D = {"num_key_value_heads": _DROP}
_G = {"bound": _GELU, "lost": _NO_HEADS}
_add("bert", "BertConfig BertModel", "first token", _G | {"pooling": "cls"}, **_D)
_add(
    "bert",
    "BertConfig BertModel",
    "mean, one token type",
    _G | {"pooling": "mean"},
    **_D,
    num_attention_heads=2,
    type_vocab_size=1,
)
_G = _G | {"lossy": {"position_embeddings": float("inf")}}
_add("bert", "XLMRobertaConfig XLMRobertaModel", "XLM-R, mean", _G | {"pooling": "mean"}, **_D, pad_token_id=1)
_add("bert", "RobertaConfig RobertaModel", "RoBERTa, first token", _G | {"pooling": "cls"}, **_D, pad_token_id=5)
_C = "NomicBertConfig NomicBertModel"
_R = {"rope_type": "default", "rope_theta": 5000.0}
_add("nomic-bert", _C, "mean", {"pooling": "mean"}, **_D)
_add(
    "nomic-bert",
    _C,
    "first token, other rope base",
    {"pooling": "cls"},
    **_D,
    num_attention_heads=2,
    rope_parameters=_R,
)
# queries times keys aren't divided by anything: with norms near one, attention is all but discrete and magnifies
# the error of the GELU table without end
_C, _G = "Gemma4TextConfig Gemma4ForCausalLM", {"bound": 8e-3, "softened": "[qk]_norm"}
_E = {
    "head_dim": 32, "global_head_dim": 64, "sliding_window": 48, "vocab_size_per_layer_input": 1024,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_add("gemma4", _C, "per-layer inputs, 2 blocks sharing keys, wide feed-forward, soft cap", _G, **_E,
     hidden_size_per_layer_input=16, num_kv_shared_layers=2, use_double_wide_mlp=True,
     final_logit_softcapping=30.0)  # fmt: skip
_add("gemma4", _C, "values that are keys, one key-value head in full attention", _G, **_E,
     hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1)  # fmt: skip
_C = "ArceeConfig ArceeForCausalLM"
_add("arcee", _C, "untied, yarn, grouped heads", rope_parameters=_YARN, head_dim=32)
_add("arcee", _C, "tied, llama3 rope", **_TIED, rope_parameters=_LLAMA3, head_dim=32, num_key_value_heads=4)

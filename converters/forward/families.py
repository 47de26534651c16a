"""How the families that `forward` knows differ from Llama, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Scales:
    """What the embedding, attention's scores, each residual branch and the logits are multiplied by."""

    embedding: float = 1.0
    scores: float | None = None  # None: one over the root of a head's width
    branch: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Family:
    """norms: before and after attention, before and after the feed-forward, "" where there is none. norm_offset: what
    is added to a stored norm. centers: LayerNorm in place of RMSNorm; eps: its field of config.json. parallel: whether
    attention and feed-forward see the same input.

    output, qk_norms, feed_forward (gate or "", up, down): names in a block. experts: where they are in a block, and
    what a single expert's matrices are called. renormalizes: whether the chosen experts' weights are made to sum to 1;
    None: as config.json says. sigmoid: experts are weighed by it, not by a softmax.

    has_rope: whether a block rotates queries and keys; neighbours: pairs for that are next to each other. full_every:
    every how manieth block sees further than the window, where config.json has no layer_types.
    """

    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    final_norm: str = "norm"
    norm_offset: float = 0.0
    centers: bool = False
    eps: str = "rms_norm_eps"
    parallel: Callable[[Config], bool] = lambda config: False
    activation: str = "silu"
    scales: Callable[[Config], Scales] = lambda config: Scales()
    output: str = "self_attn.o_proj"
    qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    feed_forward: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    experts: tuple[str, tuple[str, str, str]] = ("mlp.", ("gate_proj", "up_proj", "down_proj"))
    renormalizes: bool | None = None
    sigmoid: bool = False
    has_rope: Callable[[Config, int], bool] = lambda config, i: True
    neighbours: bool = False
    full_every: int = 0

    def is_local(self, config: Config, i: int) -> bool:
        """Whether the i-th block's attention stops at the sliding window."""
        kinds = config.get("layer_types")
        if kinds:
            return bool(kinds[i] == "sliding_attention")
        return bool(self.full_every and config.get("sliding_window") and (i + 1) % self.full_every)


def _gemma_scales(config: Config) -> Scales:
    scalar = config.get("query_pre_attn_scalar")
    return Scales(float(np.sqrt(np.float32(config["hidden_size"]))), scalar and float(scalar) ** -0.5)


def _granite_scales(config: Config) -> Scales:
    return Scales(
        config["embedding_multiplier"],
        config["attention_multiplier"],
        config["residual_multiplier"],
        1 / config["logits_scaling"],
    )


def _minicpm_scales(config: Config) -> Scales:
    return Scales(
        config["scale_emb"],
        None,
        config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        config["dim_model_base"] / config["hidden_size"],
    )


def _smollm3_rope(config: Config, i: int) -> bool:
    kinds = config.get("no_rope_layers")  # 1 where there is rope
    return bool(kinds[i]) if kinds else (i + 1) % int(config["no_rope_layer_interval"]) != 0


_LLAMA = Family()
_POST = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ONLY_POST = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_GEMMA = Family(activation="gelu", norm_offset=1.0, scales=_gemma_scales)
_GEMMA2 = replace(_GEMMA, norms=("input_layernorm", *_POST), full_every=2)
_OLMO2 = replace(_LLAMA, norms=_ONLY_POST, full_every=4)
_GRANITE = replace(_LLAMA, scales=_granite_scales)
_LAYER_NORM = replace(_LLAMA, centers=True, eps="layer_norm_eps")
_W_NAMES = ("w1", "w3", "w2")
_LFM2 = replace(
    _LLAMA,
    norms=("operator_norm", "", "ffn_norm", ""),
    final_norm="embedding_norm",
    eps="norm_eps",
    output="self_attn.out_proj",
    qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    feed_forward=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    experts=("feed_forward.", _W_NAMES),
    sigmoid=True,
)
FAMILIES: Mapping[str, Family] = {  # by config.json's model_type
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("phi3", "qwen2_moe", "qwen3_moe", "olmoe"), _LLAMA),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    **dict.fromkeys(("gemma3", "gemma3_text"), replace(_GEMMA2, full_every=6)),
    "smollm3": replace(_LLAMA, has_rope=_smollm3_rope),
    "arcee": replace(_LLAMA, activation="relu2", feed_forward=("", "mlp.up_proj", "mlp.down_proj")),
    "granite": replace(_LLAMA, scales=_granite_scales),
    "granitemoe": replace(
        _LLAMA, scales=_granite_scales, experts=("block_sparse_moe.", ("", "", "")), renormalizes=True
    ),
    "minicpm": replace(_LLAMA, scales=_minicpm_scales),
    "mixtral": replace(_LLAMA, experts=("block_sparse_moe.", _W_NAMES), renormalizes=True),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    "exaone4": replace(
        _OLMO2, has_rope=lambda config, i: not config.get("sliding_window") or _OLMO2.is_local(config, i)
    ),
    "glm4": replace(
        _LLAMA,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        neighbours=True,
    ),
    "stablelm": replace(_LAYER_NORM, parallel=lambda config: bool(config["use_parallel_residual"])),
    "starcoder2": replace(
        _LAYER_NORM, eps="norm_epsilon", activation="gelu", feed_forward=("", "mlp.c_fc", "mlp.c_proj")
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _LFM2),
}

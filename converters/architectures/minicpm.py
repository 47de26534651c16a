"""MiniCPM 1, 2 and 4 (OpenBMB): llama with scaled embeddings, residuals and logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.llama import LLAMA
from converters.architectures.rope import shortest
from converters.architectures.spec import KV, Config, Sizes, config_float

_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "scale_emb": 1, "dim_model_base": 1, "scale_depth": 1,
}  # fmt: skip


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The depth and the width that two of the scales are relative to are the model's own."""
    return {
        "residual_scale": config_float(config, "scale_depth") / math.sqrt(sizes["n_layer"]),
        "logit_scale": sizes["n_embd"] / config_float(config, "dim_model_base"),
    }


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """`extra` backwards, to the precision of a float32."""
    return {
        "scale_depth": shortest(metadata["minicpm.residual_scale"] * math.sqrt(sizes["n_layer"])),
        "dim_model_base": shortest(sizes["n_embd"] / metadata["minicpm.logit_scale"]),
    }


MINICPM = replace(
    LLAMA,
    name="minicpm",
    model_types={"MiniCPMForCausalLM": "minicpm"},
    defaults={"MiniCPMForCausalLM": _DEFAULTS},
    extra=extra,
    config_from=config_from,
    metadata=(*LLAMA.metadata, KV("{arch}.embedding_scale", "scale_emb", "float32")),
)

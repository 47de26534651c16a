"""Ministral 3, and the text of Mistral Small 3: llama, with yarn and queries scaled by their position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.llama import LLAMA, MISTRAL_DEFAULTS, check
from converters.architectures.rope import number, rope_parameters
from converters.architectures.spec import Config, Sizes
from edgellm.errors import UnsupportedArchitecture

_DEFAULTS = MISTRAL_DEFAULTS | {
    "vocab_size": 131072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1_000_000.0,
}  # fmt: skip
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def check_scale(config: Config) -> list[str]:
    """llama.cpp takes the period of the queries' scale from yarn's original context."""
    if config.get("model_type") == "ministral3" and rope_parameters(config)["rope_type"] != "yarn":
        raise UnsupportedArchitecture("Ministral 3 without yarn rope parameters isn't supported by llama.cpp")
    return check(config)


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """How fast the scale of the queries grows with the position."""
    params = rope_parameters(config)
    if not params.get("llama_4_scaling_beta"):
        return {}
    return {"attention.temperature_scale": number(params, "llama_4_scaling_beta")}


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Without that scale it is Mistral Small 3."""
    if "mistral3.attention.temperature_scale" in metadata:
        return {}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


MINISTRAL3 = replace(
    LLAMA,
    name="mistral3",
    model_types={"Ministral3ForCausalLM": "ministral3", "Mistral3ForConditionalGeneration": "mistral3"},
    defaults={
        "Ministral3ForCausalLM": _DEFAULTS | {"rope_parameters": _ROPE},
        "Mistral3ForConditionalGeneration": _DEFAULTS,
    },
    check=check_scale,
    extra=extra,
    config_from=config_from,
    renames=(("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", "")),
    ignored=(*LLAMA.ignored, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
)

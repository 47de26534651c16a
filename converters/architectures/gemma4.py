"""Gemma 4, text, without experts: E2B, E4B and 31B.

Blocks with full attention have heads of another size than those with a window, the last blocks use the keys and
values of earlier ones, and each block may have a small embedding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converters.architectures.common import (
    BASE_METADATA,
    RMS_EPS,
    embeddings,
    gated_mlp,
    linear,
    norm,
    only,
    sliding_layers,
    standard_sizes,
)
from converters.architectures.rope import layer_rope, number, shortest
from converters.architectures.spec import Arch, Array, Config, Sizes, Weight, config_float, config_int, require
from edgellm.errors import UnsupportedArchitecture

_PERIOD = 6
_UNROTATED = 1e30  # a divisor that makes an angle zero
_DEFAULTS = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "enable_moe_block": False, "use_double_wide_mlp": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
}  # fmt: skip
_CLASSES = {"Gemma4ForCausalLM": "gemma4_text", "Gemma4ForConditionalGeneration": "gemma4"}
_OWN_INPUT = "hidden_size_per_layer_input"


def _is_full(config: Config, i: int) -> bool:
    kinds = config.get("layer_types")
    return kinds[i] == "full_attention" if kinds else (i + 1) % _PERIOD == 0 or i + 1 == config["num_hidden_layers"]


def _is_shared(config: Config, i: int) -> bool:
    return i >= int(config["num_hidden_layers"]) - int(config.get("num_kv_shared_layers") or 0)


def _is_wide(config: Config, i: int) -> bool:
    return bool(config.get("use_double_wide_mlp")) and _is_shared(config, i)


def _full(config: Config, name: str, field: str, default: int) -> int:
    """A size of the full-attention blocks, in either place it is kept."""
    own = (config.get("per_layer_config") or {}).values()
    values = [config.get(name), *(entry.get(field) for entry in own)]
    return int(next((value for value in values if value is not None), default))


def sizes(config: Config) -> dict[str, Any]:
    """As usual for blocks with a window; `…_full` for those without."""
    found, n_own = standard_sizes(config), int(config.get(_OWN_INPUT) or 0)
    head_dim = _full(config, "global_head_dim", "head_dim", 512)
    n_kv = _full(config, "num_global_key_value_heads", "num_key_value_heads", found["n_head_kv"])
    n_head_kv = n_kv if config["attention_k_eq_v"] else found["n_head_kv"]
    return found | {
        "head_dim_full": head_dim,
        "n_head_kv_full": n_head_kv,
        "n_q_full": found["n_head"] * head_dim,
        "n_kv_full": n_head_kv * head_dim,
        "n_ff_wide": 2 * found["n_ff"],
        "n_own": n_own,
        "n_all_own": n_own * found["n_layer"],
    }


def check(config: Config) -> list[str]:
    """Refuses what llama.cpp's graph computes otherwise, and experts, which aren't done here yet."""
    require(config, "enable_moe_block", False)
    require(config, "attention_bias", False)
    require(config, "hidden_activation", "gelu_pytorch_tanh")
    require(config, "use_bidirectional_attention", None, "vision")
    if config.get(_OWN_INPUT):
        require(config, "vocab_size_per_layer_input", config["vocab_size"])
    full, local = layer_rope(config, "full_attention"), layer_rope(config, "sliding_attention")
    if full.get("rope_type") != "proportional" or full.get("factor", 1) != 1 or local.get("rope_type") != "default":
        raise UnsupportedArchitecture("Gemma 4 with other than proportional and plain rope isn't supported here")
    first = config_int(config, "num_hidden_layers") - int(config.get("num_kv_shared_layers") or 0)
    if config.get("num_kv_shared_layers") and (
        first < 2 or not _is_full(config, first - 1) or _is_full(config, first - 2)
    ):
        raise UnsupportedArchitecture(
            "num_kv_shared_layers must begin behind one block with a window and one without: llama.cpp shares those"
        )
    return []


def extra(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The sizes of both kinds of blocks, block by block where they differ."""
    blocks = range(sizes["n_layer"])
    full, local = layer_rope(config, "full_attention"), layer_rope(config, "sliding_attention")
    heads = [sizes["n_head_kv_full"] if _is_full(config, i) else sizes["n_head_kv"] for i in blocks]
    kinds = ["full_attention" if _is_full(config, i) else "sliding_attention" for i in blocks]
    return {
        "attention.key_length": sizes["head_dim_full"],
        "attention.value_length": sizes["head_dim_full"],
        "attention.key_length_swa": sizes["head_dim"],
        "attention.value_length_swa": sizes["head_dim"],
        "attention.head_count_kv": heads,
        "attention.shared_kv_layers": int(config.get("num_kv_shared_layers") or 0),
        "embedding_length_per_layer_input": sizes["n_own"],
        "feed_forward_length": [sizes["n_ff_wide"] if _is_wide(config, i) else sizes["n_ff"] for i in blocks],
        "final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),  # absent would mean 30
        "rope.freq_base": number(full, "rope_theta"),
        "rope.freq_base_swa": number(local, "rope_theta"),
        "rope.dimension_count": sizes["head_dim_full"],
        "rope.dimension_count_swa": sizes["head_dim"],
        **sliding_layers({**config, "layer_types": kinds}, sizes, _PERIOD),
    }


def tensors(config: Config, sizes: Sizes) -> dict[str, Array]:
    """Which angles the full-attention blocks turn, as divisors of the frequencies, float32 (head_dim_full/2,)."""
    share = config_float(layer_rope(config, "full_attention"), "partial_rotary_factor")
    divisors = np.full(sizes["head_dim_full"] // 2, _UNROTATED, dtype=np.float32)
    divisors[: int(share * sizes["head_dim_full"] // 2)] = 1.0
    return {"rope_freqs.weight": divisors}


def config_from(metadata: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """`extra` backwards; the share that is rotated isn't kept and is the class's default."""

    def get(key: str) -> Any:
        return metadata[f"gemma4.{key}"]

    windows = get("attention.sliding_window_pattern")
    heads, widths = get("attention.head_count_kv"), get("feed_forward_length")
    n_shared = get("attention.shared_kv_layers")
    by_kind = [{n for n, window in zip(heads, windows, strict=True) if window == kind} for kind in (True, False)]
    local, full = (next(iter(found), 1) for found in by_kind)
    rope = _DEFAULTS["rope_parameters"]
    assert isinstance(rope, dict)
    return {
        "head_dim": get("attention.key_length_swa"),
        "global_head_dim": get("attention.key_length"),
        "num_key_value_heads": local,
        "num_global_key_value_heads": full if full != local else None,
        "attention_k_eq_v": full != local,
        "num_kv_shared_layers": n_shared,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "sliding_window": get("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "final_logit_softcapping": shortest(get("final_logit_softcapping")) or None,
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": sizes["n_vocab"],
        "rope_parameters": {
            "sliding_attention": rope["sliding_attention"] | {"rope_theta": shortest(get("rope.freq_base_swa"))},
            "full_attention": rope["full_attention"] | {"rope_theta": shortest(get("rope.freq_base"))},
        },
    }


def _attention(suffix: str, layers: Callable[[Config, int], bool]) -> tuple[Weight, ...]:
    """A kind of blocks' attention: those that share keys and values need none of their own."""

    def keys(shared: bool) -> tuple[Weight, ...]:
        weights = (
            *linear("self_attn.k_proj", "attn_k", f"n_kv{suffix}", "n_embd"),
            *norm("self_attn.k_norm", "attn_k_norm", f"head_dim{suffix}"),
        )
        values = linear("self_attn.v_proj", "attn_v", f"n_kv{suffix}", "n_embd")

        def here(config: Config, i: int) -> bool:
            return layers(config, i) and _is_shared(config, i) == shared

        # without a projection of their own, values are the keys
        return only(here, *(_optional(weights) if shared else weights), *_optional(values))

    return (
        *only(
            layers,
            *linear("self_attn.q_proj", "attn_q", f"n_q{suffix}", "n_embd"),
            *linear("self_attn.o_proj", "attn_output", "n_embd", f"n_q{suffix}"),
            *norm("self_attn.q_norm", "attn_q_norm", f"head_dim{suffix}"),
        ),
        *keys(False),
        *keys(True),
    )


def _optional(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    return tuple(replace(weight, optional=True) for weight in weights)


GEMMA4 = Arch(
    name="gemma4",
    model_types=_CLASSES,
    defaults=dict.fromkeys(_CLASSES, _DEFAULTS),
    sizes=sizes,
    check=check,
    rope=(),
    extra=extra,
    tensors=tensors,
    config_from=config_from,
    metadata=BASE_METADATA + RMS_EPS,
    weights=(
        *embeddings(),
        *norm("input_layernorm", "attn_norm"),
        *_attention("", lambda config, i: not _is_full(config, i)),
        *_attention("_full", _is_full),
        *norm("post_attention_layernorm", "post_attention_norm"),
        *norm("pre_feedforward_layernorm", "ffn_norm"),
        *norm("post_feedforward_layernorm", "post_ffw_norm"),
        *only(lambda config, i: not _is_wide(config, i), *gated_mlp()),
        *only(_is_wide, *gated_mlp(n_ff="n_ff_wide")),
        Weight("model.layers.{i}.layer_scalar", "blk.{i}.layer_output_scale.weight", ("1",)),
        Weight("model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight", ("n_vocab", "n_all_own"),
               flag=_OWN_INPUT),
        Weight("model.per_layer_model_projection.weight", "per_layer_model_proj.weight", ("n_all_own", "n_embd"),
               flag=_OWN_INPUT),
        Weight("model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", ("n_own",), flag=_OWN_INPUT),
        Weight("model.layers.{i}.per_layer_input_gate.weight", "blk.{i}.inp_gate.weight", ("n_own", "n_embd"),
               flag=_OWN_INPUT),
        Weight("model.layers.{i}.per_layer_projection.weight", "blk.{i}.proj.weight", ("n_embd", "n_own"),
               flag=_OWN_INPUT),
        Weight("model.layers.{i}.post_per_layer_input_norm.weight", "blk.{i}.post_norm.weight", ("n_embd",),
               flag=_OWN_INPUT),
    ),
    renames=(("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", "")),
    ignored=(r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\..*",),
)  # fmt: skip

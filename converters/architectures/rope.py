"""Rotary position embeddings: both dialects of config.json to GGUF metadata, and back.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`. The formulas are those
of transformers' modeling_rope_utils (llama3: Llama 3.1; yarn: Peng et al. 2023; longrope: Ding et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from converters.architectures.spec import Array, Config
from edgellm.errors import CheckpointError, UnsupportedArchitecture

# as GGUF keeps only the resulting factors, these are tried when a GGUF is turned back into a checkpoint
_YARN_BETAS = (32.0, 1.0)  # this llama.cpp reads others for a few families only
UNTRUNCATED = "yarn with truncate=false"  # in a family's list of scalings: an approximation that it accepts
_LLAMA3_ORIGINAL_CONTEXTS = (8192, 4096, 16384, 32768)


def rope_parameters(config: Config) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the type's own fields, whichever dialect the config is written in.

    Where kinds of attention have ropes of their own, it is full attention's.
    """
    params = layer_rope(config, "full_attention")
    if not params:
        name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        stated = config.get(name) or {}
        if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
            raise CheckpointError(f"config.json has {name} = {str(stated)[:60]!r}, expected one table of numbers")
        params = dict(stated)
    kind = str(params.get("rope_type") or params.get("type") or "default")
    params["rope_type"] = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    params.pop("type", None)
    if params.get("rope_theta") is None:
        params["rope_theta"] = config.get("rope_theta") or 10000.0
    return params


def layer_rope(config: Config, kind: str) -> dict[str, Any]:
    """The rope of one kind of attention ("sliding_attention", …), empty where all kinds share one."""
    params = config.get("rope_parameters")
    nested = params.get(kind) if isinstance(params, dict) else None
    return dict(nested) if isinstance(nested, dict) else {}


def rope_metadata(config: Config, kinds: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """GGUF entries (without the `{arch}.rope.` prefix) and notes.

    kinds: the scalings the family's graph computes; UnsupportedArchitecture for others.
    """
    params = rope_parameters(config)
    kind, notes = params["rope_type"], []
    if kind not in kinds:
        raise UnsupportedArchitecture(
            f"rope scaling {kind!r} isn't supported for this family; supported: {', '.join(kinds)}"
        )
    entries: dict[str, Any] = {"freq_base": number(params, "rope_theta")}
    if kind == "linear":
        entries |= {"scaling.type": "linear", "scaling.factor": number(params, "factor")}
    elif kind == "yarn":
        entries |= _yarn_metadata(params, config)
        if not params.get("truncate", True):
            if UNTRUNCATED not in kinds:
                raise UnsupportedArchitecture("yarn rope scaling with truncate=false can't be expressed in llama.cpp")
            notes.append("llama.cpp rounds the ends of yarn's ramp, which this model doesn't: logits differ a little")
    elif kind == "longrope":
        entries |= _longrope_metadata(params, config)
    elif kind == "dynamic":
        notes.append("dynamic rope scaling only acts beyond the trained context, which the GGUF keeps as its limit")
    return entries, notes


def _longrope_metadata(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    trained = float(config["max_position_embeddings"])
    original = number({**params, **config}, "original_max_position_embeddings")
    if number(params, "original_max_position_embeddings", original) != original:
        raise CheckpointError("config.json has two different values of original_max_position_embeddings; correct one")
    factor = number(params, "factor", trained / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "scaling.type": "longrope",
        "scaling.original_context_length": int(original),
        "scaling.attn_factor": number(params, "attention_factor", default),
    }


def _yarn_metadata(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    trained = float(config["max_position_embeddings"])
    original = number(params, "original_max_position_embeddings", trained)
    factor = number(params, "factor", trained / original)
    betas = number(params, "beta_fast", 32.0), number(params, "beta_slow", 1.0)
    if betas != _YARN_BETAS:
        raise UnsupportedArchitecture(f"yarn rope scaling with beta_fast, beta_slow = {betas}: llama.cpp has 32 and 1")
    default = _yarn_mscale(factor, 1.0)
    attention = params.get("attention_factor")
    if attention is None:
        m, m_all = params.get("mscale"), params.get("mscale_all_dim")
        attention = _yarn_mscale(factor, m) / _yarn_mscale(factor, m_all) if m and m_all else default
    entries = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": int(original),
    }
    if attention != default:  # llama.cpp multiplies by the default itself
        entries["scaling.attn_factor"] = attention / default
    return entries


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def rope_tensors(config: Config, n_rot: int) -> dict[str, Array]:
    """Divisors of the frequencies, float32 (n_rot/2,) each, for the scalings that GGUF keeps as tensors."""
    params = rope_parameters(config)
    if params["rope_type"] == "longrope":
        return {f"rope_factors_{kind}.weight": _longrope_factors(params, kind, n_rot) for kind in ("long", "short")}
    if params["rope_type"] != "llama3":
        return {}
    factor = number(params, "factor", 8.0)
    low, high = number(params, "low_freq_factor", 1.0), number(params, "high_freq_factor", 4.0)
    original = number(params, "original_max_position_embeddings", 8192)
    return {"rope_freqs.weight": llama3_factors(number(params, "rope_theta"), n_rot, factor, low, high, original)}


def _longrope_factors(params: Mapping[str, Any], kind: str, n_rot: int) -> Array:
    values = np.asarray(params.get(f"{kind}_factor"), dtype=np.float32)
    if values.shape != (n_rot // 2,):
        raise CheckpointError(f"config.json has {values.size} {kind}_factor values for {n_rot} rotated dimensions")
    return values


def llama3_factors(theta: float, n_rot: int, factor: float, low: float, high: float, original: float) -> Array:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    frequencies = theta ** -(np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    long, short = wavelengths > original / low, wavelengths < original / high
    return np.where(long, factor, np.where(short, 1.0, blended)).astype(np.float32)


def rope_config(
    metadata: Mapping[str, Any], arch: str, kinds: Sequence[str], n_rot: int, factors: Array | None
) -> dict[str, Any]:
    """`rope_parameters` of a config.json for a GGUF's metadata; `factors` is its rope_freqs tensor if it has one."""
    prefix = f"{arch}.rope."
    get = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}.get
    theta = shortest(get("freq_base", 10000.0))
    kind = get("scaling.type", "none")
    if factors is not None:
        return {"rope_type": "llama3", "rope_theta": theta} | _llama3_config(theta, n_rot, factors)
    if kind == "linear" and get("scaling.factor"):
        return {"rope_type": "linear", "rope_theta": theta, "factor": shortest(get("scaling.factor"))}
    if kind == "yarn":
        factor = float(get("scaling.factor", 1.0))
        attention = get("scaling.attn_factor")
        params = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": shortest(factor),
            "original_max_position_embeddings": get("scaling.original_context_length"),
            "beta_fast": _YARN_BETAS[0],
            "beta_slow": _YARN_BETAS[1],
        }
        if get("scaling.yarn_log_multiplier"):  # as llama.cpp's own converter writes it for Ministral 3
            params |= {"mscale": 1.0, "mscale_all_dim": shortest(get("scaling.yarn_log_multiplier"))}
        if UNTRUNCATED in kinds:
            params["truncate"] = False
        if f"{arch}.attention.temperature_scale" in metadata:
            params["llama_4_scaling_beta"] = shortest(metadata[f"{arch}.attention.temperature_scale"])
        if attention is not None:
            params["attention_factor"] = shortest(attention * _yarn_mscale(factor, 1.0))
        return params
    if kind == "longrope":
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "original_max_position_embeddings": get("scaling.original_context_length"),
            "attention_factor": shortest(get("scaling.attn_factor", 1.0)),
        }
    if kind not in ("none", "linear"):
        raise UnsupportedArchitecture(f"rope scaling {kind!r} can't be written as a checkpoint of this family")
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_config(theta: float, n_rot: int, factors: Array) -> dict[str, Any]:
    factor = float(factors.max())
    for original in _LLAMA3_ORIGINAL_CONTEXTS:
        if np.allclose(llama3_factors(theta, n_rot, factor, 1.0, 4.0, original), factors, rtol=1e-5):
            return {
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError("the GGUF's rope_freqs don't come from a known llama3 scaling; they can't be written back")


def number(params: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive finite number among rope parameters; CheckpointError otherwise."""
    value = params.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json has {name} = {value!r} for its rope, expected a positive number")
    return float(value)


def shortest(value: Any) -> Any:
    """The shortest decimal that is the same float32: GGUF's 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value

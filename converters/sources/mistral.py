"""Mistral's own format: params.json and consolidated.safetensors, shown in the words of Hugging Face.

Field and tensor names are those of mistral-inference (https://github.com/mistralai/mistral-inference: args.py,
transformer_layers.py). Its rotary embedding turns neighbouring rows of a head, Hugging Face's turns the first half
against the second; q and k come here in Hugging Face's order, which the families' specs start from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from edgellm.errors import CheckpointError

# params.json → config.json
_FIELDS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size", "rope_theta": "rope_theta", "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
_NEEDED = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size")
_DEFAULT_CONTEXT = 32768  # what transformers' conversion assumes where params.json doesn't say
_NAMES = (
    (r"tok_embeddings\.(.*)", r"model.embed_tokens.\1"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"output\.(.*)", r"lm_head.\1"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.attention\.w([qkvo])\.(.*)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"layers\.(\d+)\.feed_forward\.w1\.(.*)", r"model.layers.\1.mlp.gate_proj.\2"),
    (r"layers\.(\d+)\.feed_forward\.w2\.(.*)", r"model.layers.\1.mlp.down_proj.\2"),
    (r"layers\.(\d+)\.feed_forward\.w3\.(.*)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"layers\.(\d+)\.feed_forward\.(gate|experts)\.(.*)", r"model.layers.\1.block_sparse_moe.\2.\3"),
)


def read_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json as a config.json; CheckpointError where it lacks what a model needs."""
    lacking = [field for field in _NEEDED if field not in params]
    if lacking:
        raise CheckpointError(f"params.json lacks {', '.join(lacking)}; copy it again from the model's page")
    config: dict[str, Any] = {"sliding_window": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
    config |= {ours: params[theirs] for theirs, ours in _FIELDS.items() if theirs in params}
    config["max_position_embeddings"] = (
        params.get("max_position_embeddings") or params.get("max_seq_len") or _DEFAULT_CONTEXT
    )
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
    try:
        if params.get("moe"):
            config |= _experts(params["moe"])
        if params.get("yarn"):
            config |= _yarn(params)
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"params.json has a moe or yarn entry that isn't whole ({exc}); copy it again") from exc
    if params.get("quantization"):
        config["quantization_config"] = {"quant_method": "fp8"}
    return config


def _experts(moe: Mapping[str, Any]) -> dict[str, Any]:
    counts = {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return counts | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def _yarn(params: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's `beta` turns are yarn's fast limit, `alpha` its slow one."""
    yarn = params["yarn"]
    rope = {
        "rope_type": "yarn", "rope_theta": params.get("rope_theta", 10000.0), "factor": float(yarn["factor"]),
        "original_max_position_embeddings": yarn["original_max_position_embeddings"],
        "beta_fast": float(yarn["beta"]), "beta_slow": float(yarn["alpha"]), "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    scaling = params.get("llama_4_scaling")
    if not scaling:
        return {"rope_parameters": rope}
    rope["llama_4_scaling_beta"] = float(scaling["beta"])
    return {"rope_parameters": rope, "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}


def rename_tensors(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Hugging Face's names; unknown ones stay for the family's spec to refuse."""
    return {new: replace(tensor, name=new) for name, tensor in tensors.items() if (new := _name(name))}


def to_halves(tensors: Mapping[str, SourceTensor], config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """q and k with each head's rows in Hugging Face's order."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    ordered = dict(tensors)
    for name, tensor in tensors.items():
        kind = re.fullmatch(r".*\.([qk])_proj\.(weight|bias)", name)
        if kind:
            n_heads = heads[kind[1]]
            if type(n_heads) is not int or n_heads < 1 or tensor.shape[0] % (2 * n_heads):
                raise CheckpointError(f"tensor {name} has {tensor.shape[0]} rows, which {n_heads!r} heads don't divide")
            ordered[name] = replace(tensor, read=partial(_halves, tensor, n_heads), read_stored=None)
    return ordered


def _name(name: str) -> str:
    name = name.replace(".qscale_weight", ".weight_scale").replace(".qscale_act", ".input_scale")
    for pattern, replacement in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _halves(tensor: SourceTensor, n_heads: int, k: int = 0, n: int = 1) -> NDArray[np.float32]:
    """Each head's rows from (x_0, y_0, x_1, y_1, …) to (x_0 … x_{d/2-1}, y_0 …)."""
    rows = tensor.read()
    pairs = rows.reshape(n_heads, len(rows) // n_heads // 2, 2, *rows.shape[1:])
    return np.split(pairs.swapaxes(1, 2).reshape(rows.shape), n)[k]

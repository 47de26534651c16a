"""A GGUF's metadata in the words of config.json."""

from __future__ import annotations

from typing import Any

from converters.architectures.rope import rope_config, shortest
from converters.architectures.spec import Arch, blocks, gguf_name
from converters.sources import Source
from edgellm.errors import CheckpointError

_TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def gguf_config(arch: Arch, source: Source, dtype: str = "f32") -> dict[str, Any]:
    """config.json for a GGUF, in words that transformers 4 and 5 both read; CheckpointError where keys are missing."""
    metadata = source.metadata
    hf_class = arch.hf_classes[0]
    config: dict[str, Any] = {"architectures": [hf_class], "model_type": arch.model_types[hf_class]}
    config |= {key: value for key, value in arch.defaults[hf_class].items() if not isinstance(value, int | float)}
    for kv in arch.metadata:
        key = kv.key.format(arch=arch.name)
        if key in metadata:
            value = metadata[key]  # a list has a value for each block: the family's config_from reads it
            config[kv.field] = max(value) if isinstance(value, list) else shortest(value)
        elif not kv.optional and kv.field != "vocab_size":
            raise CheckpointError(f"{source.path} lacks {key}; it can't be written as a checkpoint")
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source.path} has no token_embd.weight; it can't be written as a checkpoint")
    config["max_position_embeddings"] = int(metadata.get(f"{arch.name}.context_length", 0)) or 2048
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = _is_tied(arch, source)
    config |= _expert_fields(arch, source)
    sizes = arch.sizes(arch.complete_config(config))
    config |= arch.config_from(metadata, sizes)
    n_rot = metadata.get(f"{arch.name}.rope.dimension_count", sizes["n_rot"])
    if arch.rope and (n_rot != sizes["head_dim"] or n_rot != sizes["n_rot"]):
        config["partial_rotary_factor"] = n_rot / sizes["head_dim"]
    sizes = arch.sizes(arch.complete_config(config))
    for weight in arch.weights:
        if weight.flag:
            there = any(gguf_name(weight, i) in source.tensors for i in blocks(weight, config, sizes))
            config[weight.flag] = config.get(weight.flag) or there or config.get(weight.flag, False)
    if arch.rope:
        factors = source.tensors.get("rope_freqs.weight")
        divisors = None if factors is None else factors.read()
        rope = rope_config(metadata, arch.name, arch.rope, sizes["n_rot"], divisors)
        for kind in ("long", "short"):
            if f"rope_factors_{kind}.weight" in source.tensors:
                values = source.tensors[f"rope_factors_{kind}.weight"].read()
                rope |= {"rope_type": "longrope", f"{kind}_factor": [shortest(float(value)) for value in values]}
        config["rope_theta"] = rope.pop("rope_theta")
        scaled_by_default = config.pop("rope_parameters", None)
        config["rope_scaling"] = rope if rope["rope_type"] != "default" or scaled_by_default else None
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{name}_token_id"] = int(metadata[f"tokenizer.ggml.{key}_token_id"])
    own_names = {own: config[usual] for own, usual in arch.aliases.items() if usual in config}
    return config | own_names | {"torch_dtype": _TORCH_DTYPES[dtype]}


def _is_tied(arch: Arch, source: Source) -> bool:
    """Tied, unless there is a head that says otherwise."""
    head, embedding = source.tensors.get("output.weight"), source.tensors["token_embd.weight"]
    if head is None:
        return True
    if arch.head != "copy" or head.dtype != embedding.dtype:
        return False
    return bool((head.read() == embedding.read()).all())


def _expert_fields(arch: Arch, source: Source) -> dict[str, Any]:
    def number(key: str) -> Any:
        return source.metadata.get(f"{arch.name}.{key}")

    if not number("expert_count"):
        return {}
    default = arch.defaults[arch.hf_classes[0]]
    count = next((name for name in ("num_local_experts", "n_routed_experts") if name in default), "num_experts")
    fields = {
        count: number("expert_count"),
        "num_experts_per_tok": number("expert_used_count"),
        "moe_intermediate_size": number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": number("expert_shared_feed_forward_length"),
    }
    return {key: value for key, value in fields.items() if value is not None}

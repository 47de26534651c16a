"""What can't be merged, and why; bases an adapter doesn't belong to; adapters that are broken in themselves."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from converters.adapters.read import Adapter
from converters.architectures import find_architecture
from converters.architectures.spec import hf_class
from converters.sources import Source
from edgellm.errors import AdapterError, UnsupportedArchitecture

_MERGED = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"}
_PROMPTS = "puts trained vectors in front of the input: there is no weight to merge them into"
_REASONS = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "CPT": _PROMPTS,
    "CARTRIDGE": "puts trained keys and values in front of every layer's: there is no weight to merge them into",
    "PREFIX_TUNING": "puts trained keys and values in front of every layer's: there is no weight to merge them into",
    "ADAPTION_PROMPT": "adds gated attention to trained vectors: there is no weight to merge it into",
    "XLORA": "mixes several adapters differently for each token: no single weight does that",
    "POLY": "mixes several adapters differently for each task: no single weight does that",
}
_NONLINEAR = re.compile(r"loda|lora_act|nonlinear|activation", re.IGNORECASE)
# variants of LoRA whose weight isn't W + s·B·A
_VARIANTS = {
    "alora_invocation_tokens": "is an activated LoRA: it works from its invocation tokens on, so it can't be merged; "
    "export it with --adapter-only and use it with --lora",
    "arrow_config": "routes between several adapters for each token, so it can't be merged",
    "use_qalora": "is a QA-LoRA, which isn't supported; merge it with peft",
    "use_bdlora": "is a block-diagonal LoRA, which isn't supported; merge it with peft",
    "kasa_config": "is a KaSA, which changes the base weights as well; merge it with peft",
    "monteclora_config": "is a MonteCLoRA, which isn't supported; merge it with peft",
    "layer_replication": "repeats layers of the base, which isn't supported; merge it with peft",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_adapter(adapter: Adapter, *, for_run_time: bool = False) -> None:
    """AdapterError for a method that has no merged weight, with the reason."""
    config, where = adapter.config, adapter.path
    if adapter.method in _REASONS:
        raise AdapterError(f"{where} can't be merged: {adapter.method} {_REASONS[adapter.method]}")
    unknown = [name for name in (*adapter.shared, *adapter.modules) if _NONLINEAR.search(name)]
    if unknown or _NONLINEAR.search(adapter.method):
        raise AdapterError(f"{where} can't be merged: it isn't linear in its input ({adapter.method or unknown[0]})")
    if adapter.method not in _MERGED:
        raise AdapterError(
            f"{where} is of method {adapter.method}, which isn't supported ({', '.join(sorted(_MERGED))} are); "
            "merge it with peft's merge_and_unload and convert the merged folder"
        )
    for field, reason in _VARIANTS.items():
        if config.get(field) and not (for_run_time and field == "alora_invocation_tokens"):
            raise AdapterError(f"{where} {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{where} was started with init_lora_weights={start!r}, which changes the base's weights; save it again "
            "with peft's path_initial_model_for_weight_conversion, or merge it with peft"
        )
    stray = [name for name in adapter.shared if name not in ("vera_A", "vera_B") and "original_module" not in name]
    if stray:
        raise AdapterError(f"{where} has tensors that no known method stores: {', '.join(sorted(stray)[:3])}")


def check_base(adapter: Adapter, source: Source) -> None:
    """AdapterError where the adapter says it was trained on something else: another class, another model."""
    mapping = adapter.config.get("auto_mapping")
    trained_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    own_class = hf_class(source.config)
    if isinstance(trained_class, str) and trained_class != own_class and not _same_family(trained_class, own_class):
        raise AdapterError(f"{adapter.path} was trained on a {trained_class}, but {source.path} is a {own_class}")
    theirs, ours = adapter.config.get("base_model_name_or_path"), _recorded_name(source)
    if isinstance(theirs, str) and ours and "/" in theirs and _model_name(theirs) != _model_name(ours):
        raise AdapterError(
            f"{adapter.path} was trained on {theirs}, but {source.path} is {ours}; if they are the same weights, "
            "correct base_model_name_or_path in adapter_config.json"
        )


def _same_family(one: str, other: str) -> bool:
    def family(name: str) -> Any:
        try:
            return find_architecture({"architectures": [name]})
        except UnsupportedArchitecture:
            return None

    known = family(one)
    return known is None or known is family(other)


def _recorded_name(source: Source) -> str:
    """What the base calls itself: its config, or the name of its folder in the Hugging Face cache."""
    recorded = source.config.get("_name_or_path")
    if isinstance(recorded, str) and recorded.count("/") == 1 and not recorded.startswith((".", "/")):
        return recorded
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", str(source.path))
    return f"{cached[1]}/{cached[2]}" if cached else ""


def _model_name(name: str) -> str:
    """Without the owner, and without what names a copy in other numbers."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[-_.](?:unsloth|bnb|4bit|8bit|bf16|fp16|f16|gguf|gptq|awq|int4|int8|hf)(?=$|[-_.])", "", last)


def check_finite(adapter: Adapter) -> None:
    """AdapterError naming the first tensor that holds NaN or infinity."""
    for tensor in [*adapter.shared.values(), *(t for parts in adapter.modules.values() for t in parts.values())]:
        if tensor.dtype.startswith(("F", "BF")) and not np.isfinite(tensor.read()).all():
            raise AdapterError(f"{adapter.path}: {tensor.name} has values that are not finite; the training diverged")

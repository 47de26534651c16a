"""Adapters merged into a checkpoint: a `Source` whose tensors come out changed, one at a time, in float32.

Everything is found, compared and read once before any work: names, shapes, the recorded base, finite values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from converters.adapters.experts import expert_changes
from converters.adapters.methods import Change, bias_changes, ia3_bias, weight_changes
from converters.adapters.nf4 import quantized_names, round_base, rounding_difference
from converters.adapters.read import Adapter, Parts
from converters.adapters.refuse import check_adapter, check_base, check_finite
from converters.adapters.targets import Targets, find_targets
from converters.adapters.vera import needed_inputs
from converters.architectures.spec import Array
from converters.sources import Source, SourceTensor
from converters.tokenizers.read import has_tokenizer
from edgellm.errors import AdapterError

Changes = dict[str, list[Change]]  # name of a stored tensor → what happens to it, in order


def merge_adapters(source: Source, adapters: Sequence[Adapter], merge_base: str | None = None) -> Source:
    """The checkpoint with all adapters in it, in the order given; AdapterError for one that doesn't belong to it.

    merge_base: for adapters trained with QLoRA, "fp16" (the base as it is) or "dequant" (the base as training saw it,
    rounded to 4 bits); the difference is noted for either.
    """
    targets = find_targets(source)
    for adapter in adapters:
        check_adapter(adapter)
        check_base(adapter, source)
        check_finite(adapter)
    changes, notes, untied = find_changes(targets, adapters)
    tensors = dict(targets.tensors)
    config = dict(source.config)
    if merge_base is not None:
        tensors, note = _choose_base(targets, merge_base)
        notes.append(note)
    if untied:
        tensors[targets.head] = replace(tensors[targets.embedding], name=targets.head)
        config = _with(config, "tie_word_embeddings", False)
    elif targets.tied:
        del tensors[targets.head]
    for name, list_of_changes in changes.items():
        tensors[name] = changed_tensor(tensors[name], list_of_changes, name in targets.transposed)
    n_vocab = tensors[targets.embedding].shape[0] if targets.embedding in tensors else 0
    if n_vocab and n_vocab != source.tensors.get(targets.embedding, tensors[targets.embedding]).shape[0]:
        config = _with(config, "vocab_size", n_vocab)
    tokenizer = next((adapter.path for adapter in reversed(adapters) if has_tokenizer(adapter.path)), None)
    if tokenizer:
        notes.append(f"tokenizer and chat template are those beside the adapter {tokenizer.name}")
    return replace(source, config=config, tensors=tensors, notes=(*source.notes, *notes), tokenizer=tokenizer)


def _choose_base(targets: Targets, merge_base: str) -> tuple[dict[str, SourceTensor], str]:
    source, names = targets.source, quantized_names(targets)
    if source.config.get("quantization_config"):
        raise AdapterError(f"{source.path} is quantized itself: --merge-base takes the unquantized base")
    difference = f"NF4, on which QLoRA trains, differs from it by {100 * rounding_difference(targets, names):.1f} %"
    if merge_base == "fp16":
        return dict(targets.tensors), f"merged into the base as it is; {difference} (root mean square)"
    rounded = round_base(targets.tensors, names)
    return rounded, f"merged into the base rounded to NF4, {len(names)} tensors; {difference} (root mean square)"


def find_changes(targets: Targets, adapters: Sequence[Adapter]) -> tuple[Changes, list[str], bool]:
    """Per stored tensor what happens to it, a line on each adapter, and whether a tied head becomes its own."""
    changes: Changes = {}
    notes, untied = [], False
    for adapter in adapters:
        adapter = _with_vera_inputs(adapter, targets)
        found = _changes_of(adapter, targets)
        if targets.tied:
            found, splits = _settle_tied(found, targets, adapter)
            untied = untied or splits
        methods = sorted({change.what for list_of_changes in found.values() for change in list_of_changes})
        share = "" if adapter.weight == 1 else f" × {adapter.weight:g}"
        notes.append(f"merged {adapter.path.name}{share}: {len(found)} tensors ({', '.join(methods)})")
        for name, list_of_changes in found.items():
            changes.setdefault(name, []).extend(list_of_changes)
    if untied:
        notes.append("the output head was trained apart from the embedding it was tied to: both are kept")
    return changes, notes, untied


def _changes_of(adapter: Adapter, targets: Targets) -> Changes:
    found: Changes = {}
    for module, parts in adapter.modules.items():
        experts = expert_changes(adapter, module, parts, targets)
        pairs = experts if experts is not None else _plain_changes(adapter, module, parts, targets)
        for name, change in pairs:
            _check_shape(adapter, module, name, change, targets)
            found.setdefault(name, []).append(change)
    if not found:
        raise AdapterError(f"{adapter.path} changes no weight of this base; is it empty?")
    return found


def _plain_changes(adapter: Adapter, module: str, parts: Parts, targets: Targets) -> list[tuple[str, Change]]:
    weight_parts = {part: tensor for part, tensor in parts.items() if part not in ("bias", "lora_B.bias")}
    pairs: list[tuple[str, Change]] = []
    if weight_parts:
        name = targets.find(f"{module}.weight", adapter)
        shape = targets.linear_shape(name)
        pairs += [(name, change) for change in weight_changes(adapter, module, parts, shape)]
        if not pairs:
            raise AdapterError(f"{adapter.path}: {module} has {', '.join(weight_parts)}, which no known method stores")
    biases = bias_changes(adapter, module, parts)
    if biases:
        name = targets.find(f"{module}.bias", adapter)
        pairs += [(name, change) for change in biases]
    scaled = ia3_bias(adapter, parts)
    if scaled and (bias := targets.get(f"{module}.bias")):
        pairs.append((bias, scaled))
    return pairs


def _check_shape(adapter: Adapter, module: str, name: str, change: Change, targets: Targets) -> None:
    shape = targets.linear_shape(name)
    if change.shape is not None and tuple(change.shape) != tuple(shape):
        raise AdapterError(
            f"{adapter.path} has {change.what} of shape {list(change.shape)} for {module}, but {name} of the base is "
            f"{list(shape)}: it was trained on another base"
        )


def _settle_tied(found: Changes, targets: Targets, adapter: Adapter) -> tuple[Changes, bool]:
    """What training did to a tied embedding and head: together (trained tokens, or on request), or each its own."""
    embedding, head = found.get(targets.embedding), found.get(targets.head)
    together = bool(adapter.config.get("ensure_weight_tying")) or (
        head is None and embedding is not None and all(c.what == "trained tokens" for c in embedding)
    )
    if (head is None and embedding is None) or together:
        return {name: changes for name, changes in found.items() if name != targets.head}, False
    resized = [change for change in embedding or () if change.new_shape]
    if resized and head is None:  # the head grew with its embedding
        return found, False
    return found, True


def _with_vera_inputs(adapter: Adapter, targets: Targets) -> Adapter:
    names = [f"{module}.weight" for module, parts in adapter.modules.items() if "vera_lambda_b" in parts]
    if not names:
        return adapter
    return needed_inputs(adapter, max(targets.linear_shape(targets.find(name, adapter))[-1] for name in names))


def changed_tensor(tensor: SourceTensor, changes: list[Change], transposed: bool) -> SourceTensor:
    """A stored tensor that is changed when it is read. transposed: it has inputs first."""
    shape = tensor.shape
    for change in changes:
        shape = change.new_shape or shape
    read = partial(_read_merged, tensor, changes, transposed)
    return SourceTensor(tensor.name, shape, "F32", tensor.n_bytes, read)


def _read_merged(tensor: SourceTensor, changes: list[Change], transposed: bool, k: int = 0, n: int = 1) -> Array:
    """The changed tensor, or the k-th of n parts of its rows."""
    if n > 1 and (transposed or any(change.whole for change in changes)):
        return np.split(_read_merged(tensor, changes, transposed), n)[k]
    weights = tensor.read(k, n) if n > 1 else tensor.read()
    start = k * len(weights)
    if not weights.flags.writeable:
        weights = weights.copy()
    if transposed:
        weights = weights.T
    keeps_base = len(changes) > 1 and any(change.needs_base for change in changes)
    base = weights.copy() if keeps_base else weights
    for change in changes:
        weights = change.apply(weights, base if keeps_base else weights, start)
        if change.replaces and keeps_base:
            base = weights.copy()
    return np.ascontiguousarray(weights.T if transposed else weights)


def _with(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A config with a field changed, also in the text part of a multimodal one."""
    changed = {**config, key: value}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], key: value}
    return changed

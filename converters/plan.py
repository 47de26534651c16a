"""Everything headers tell about a conversion, worked out and checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from converters.architectures import find_architecture
from converters.architectures.rope import rope_metadata, rope_tensors
from converters.architectures.spec import (
    KV,
    Arch,
    Array,
    Config,
    Op,
    Sizes,
    Weight,
    blocks,
    config_float,
    config_int,
    gguf_name,
    has_head,
    hf_names,
    stored_shape,
    weight_shape,
)
from converters.quantize.importance import Importance
from converters.quantize.recipes import Choice, ModelShape, choose_types
from converters.quantize.types import FileType, block_size, tensor_bytes
from converters.sources import Source, SourceTensor
from converters.sources.prequantized.mxfp4 import DTYPE as MXFP4
from converters.sources.sentence_transformers import POOLING_NAMES
from edgellm.errors import CheckpointError, UnsupportedArchitecture

# what a process with numpy, ggml and the tokenizer libraries takes before it holds any weight (measured)
BASE_MEMORY = 150 << 20
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    sources: the stored tensors it is made of, several where experts are stacked (each then gives its share of the
    bytes, in order). A tensor computed from the config has none, but `computed`. importance: float32 (matrices,
    columns), what the quantizer weighs errors with. packed: a file with its bytes, as numpy saves them, if they are
    made already.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    wanted_type: str  # differs from type_name where the row length forced a fallback
    n_bytes: int
    ops: tuple[Op, ...] = ()
    sources: tuple[SourceTensor, ...] = ()
    computed: Array | None = field(default=None, repr=False)
    importance: Array | None = field(default=None, repr=False)
    packed: Path | None = None

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What `convert` will write: metadata (without the vocabulary), tensors in file order, sizes, notes."""

    architecture: str
    file_type: FileType
    metadata: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...]
    sizes: Sizes
    notes: tuple[str, ...]
    source_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data; the file also holds the metadata and the vocabulary."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_parameters

    @property
    def peak_memory(self) -> int:
        """Estimated bytes: the largest piece as stored, as float32, mapped, and quantized, and the process."""
        largest = 0
        for tensor in self.tensors:
            n_pieces = max(1, len(tensor.sources))
            stored = max((source.n_bytes for source in tensor.sources), default=0)
            floats = 4 * max([tensor.n_elements // n_pieces, *(prod(source.shape) for source in tensor.sources)])
            largest = max(largest, stored + floats * (2 if tensor.ops else 1) + tensor.n_bytes // n_pieces)
        return BASE_MEMORY + largest


def make_plan(
    source: Source,
    file_type: FileType,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    importance: Importance | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint; UnsupportedArchitecture or CheckpointError before any work."""
    arch = find_architecture(source.config)
    config = arch.complete_config(source.config)
    sizes = arch.sizes(config)
    if sizes["n_layer"] > _MAX_LAYERS:
        raise UnsupportedArchitecture(f"config.json has {sizes['n_layer']} layers; llama.cpp takes {_MAX_LAYERS}")
    notes = arch.check(config)
    metadata, more_notes = _metadata(arch, config, sizes)
    found = match_tensors(arch, config, sizes, source.tensors)
    computed = _computed_tensors(arch, config, sizes)
    shapes = {name: tensor.shape for name, tensor in computed.items()}
    shapes |= {name: weight_shape(weight, sizes) for name, (_, weight) in found.items()}
    n_expert = sizes.get("n_expert", 0)
    heads_kv = metadata.get(f"{arch.name}.attention.head_count_kv")
    n_head_kv = heads_kv[0] if isinstance(heads_kv, list) else sizes["n_head_kv"]  # as llama.cpp's recipes look at it
    model = ModelShape(arch.name, sizes["n_layer"], sizes["n_head"], n_head_kv, n_expert)
    types = choose_types(shapes, file_type, model, overrides, importance is not None)
    types |= _lossless_types(found, shapes, types, overrides)
    tensors = [_planned(name, tensor.shape, types[name], computed=tensor) for name, tensor in computed.items()]
    tensors += [
        _planned(name, shapes[name], types[name], weight.ops, tuple(stored)) for name, (stored, weight) in found.items()
    ]
    notes = [*source.notes, *notes, *more_notes]
    return Plan(arch.name, file_type, metadata, weigh(tensors, importance), sizes, tuple(notes), source.n_bytes)


def weigh(tensors: Sequence[PlannedTensor], importance: Importance | None) -> tuple[PlannedTensor, ...]:
    """The tensors with their entries of the importance matrix."""
    if importance is None:
        return tuple(tensors)
    return tuple(
        tensor
        if block_size(tensor.type_name) == 1
        else replace(tensor, importance=importance.of(tensor.name, tensor.shape))
        for tensor in tensors
    )


def _lossless_types(
    found: Mapping[str, tuple[list[SourceTensor], Weight]],
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, Choice],
    overrides: Sequence[tuple[re.Pattern[str], str]],
) -> dict[str, Choice]:
    """MXFP4 for the tensors that are stored so, where the recipe's type would round them and take no fewer bytes."""
    return {
        name: Choice(MXFP4, MXFP4)
        for name, (stored, _) in found.items()
        if all(tensor.dtype == MXFP4 for tensor in stored)
        and types[name].type_name not in ("F32", "F16", "BF16")
        and shapes[name][-1] % block_size(MXFP4) == 0
        and tensor_bytes(shapes[name], types[name].type_name) >= tensor_bytes(shapes[name], MXFP4)
        and not any(pattern.search(name) for pattern, _ in overrides)
    }


def _planned(
    name: str,
    shape: tuple[int, ...],
    choice: Choice,
    ops: tuple[Op, ...] = (),
    sources: tuple[SourceTensor, ...] = (),
    computed: Array | None = None,
) -> PlannedTensor:
    n_bytes = tensor_bytes(shape, choice.type_name)
    return PlannedTensor(name, shape, choice.type_name, choice.wanted, n_bytes, ops, sources, computed)


def _metadata(arch: Arch, config: Config, sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    metadata = {
        kv.key.format(arch=arch.name): value for kv in arch.metadata if (value := _value(kv, config)) is not None
    }
    metadata[f"{arch.name}.context_length"], notes = arch.context_length(config)
    if arch.rope:
        rope, rope_notes = rope_metadata(config, arch.rope)
        metadata |= {f"{arch.name}.rope.{key}": value for key, value in rope.items()}
        metadata[f"{arch.name}.rope.dimension_count"] = sizes["n_rot"]
        notes = [*notes, *rope_notes]
    if config.get("sentence_pooling"):
        numbers = {name: number for number, name in POOLING_NAMES.items()}
        metadata[f"{arch.name}.pooling_type"] = numbers[config["sentence_pooling"]]
    if "n_expert" in sizes:
        metadata |= _expert_metadata(arch, config, sizes)
    return metadata | {f"{arch.name}.{key}": value for key, value in arch.extra(config, sizes).items()}, notes


def _expert_metadata(arch: Arch, config: Config, sizes: Sizes) -> dict[str, Any]:
    used = config_int(config, "num_experts_per_tok")
    if used > sizes["n_expert"]:
        raise CheckpointError(f"config.json uses {used} of {sizes['n_expert']} experts")
    entries = {"expert_count": sizes["n_expert"], "expert_used_count": used}
    if "moe_intermediate_size" in config:
        entries["expert_feed_forward_length"] = sizes["n_ff_exp"]
    if "n_ff_shexp" in sizes:
        entries["expert_shared_feed_forward_length"] = sizes["n_ff_shexp"]
    return {f"{arch.name}.{key}": value for key, value in entries.items()}


def _value(kv: KV, config: Config) -> int | float | bool | None:
    if kv.optional and config.get(kv.field) is None:
        return None
    if kv.kind == "bool":
        return bool(config[kv.field])
    return config_int(config, kv.field) if kv.kind == "uint32" else config_float(config, kv.field)


def _computed_tensors(arch: Arch, config: Config, sizes: Sizes) -> dict[str, Array]:
    frequencies = rope_tensors(config, sizes["n_rot"]) if arch.rope else {}
    return frequencies | arch.tensors(config, sizes)


def match_tensors(
    arch: Arch, config: Config, sizes: Sizes, stored: Mapping[str, SourceTensor]
) -> dict[str, tuple[list[SourceTensor], Weight]]:
    """GGUF name → (stored tensors, their spec), in file order; every stored tensor used, every needed one there."""
    tensors = {_usual_name(arch, name): tensor for name, tensor in stored.items()}
    found: dict[str, tuple[list[SourceTensor], Weight]] = {}
    known: set[str] = set()
    missing: dict[str, list[str]] = {}
    for weight in arch.weights:
        for i in blocks(weight, config, sizes):
            name, names = gguf_name(weight, i), hf_names(weight, i, sizes)
            lacking = [hf_name for hf_name in names if hf_name not in tensors]
            if not lacking:
                known.update(names)
                found.setdefault(name, ([tensors[hf_name] for hf_name in names], weight))
            elif _is_needed(arch, weight, config):
                missing.setdefault(name, lacking)
    lost = [hf_name for name, lacking in missing.items() if name not in found for hf_name in lacking]
    if lost:
        raise CheckpointError(f"the checkpoint lacks {_some(lost)}; save or copy it again in full")
    _check_leftovers(arch, config, sizes, tensors.keys() - known, found)
    _settle_head(arch, config, tensors, found)
    for sources, weight in found.values():
        _check_shapes(sources, weight, sizes)
    return dict(sorted(found.items(), key=lambda item: _file_order(item[0])))


def _usual_name(arch: Arch, name: str) -> str:
    for prefix, replacement in arch.renames:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _is_needed(arch: Arch, weight: Weight, config: Config) -> bool:
    if weight.tied:
        return not config.get("tie_word_embeddings") and has_head(config)
    return not weight.optional and (not weight.flag or bool(config.get(weight.flag)))


def _check_leftovers(
    arch: Arch,
    config: Config,
    sizes: Sizes,
    leftover: Iterable[str],
    found: Mapping[str, tuple[list[SourceTensor], Weight]],
) -> None:
    unknown = sorted(n for n in leftover if not any(re.fullmatch(pattern, n) for pattern in arch.ignored))
    if unknown:
        beyond = any(
            int(number) >= sizes["n_layer"] for n in unknown for number in re.findall(r"layers\.(\d{1,9})\.", n)
        )
        why = f": config.json has {sizes['n_layer']} layers" if beyond else ""
        hint = "merge the adapter first" if any("lora_" in name for name in unknown) else "is it another model's?"
        raise CheckpointError(f"the checkpoint has tensors this family doesn't know: {_some(unknown)}{why}; {hint}")
    flagged = [sources[0].name for sources, w in found.values() if w.flag and not config.get(w.flag)]
    if flagged:
        flag = next(w.flag for sources, w in found.values() if sources[0].name == flagged[0])
        raise CheckpointError(f"config.json says {flag} is off, but the checkpoint has {_some(flagged)}; correct one")


def _settle_head(
    arch: Arch,
    config: Config,
    tensors: Mapping[str, SourceTensor],
    found: dict[str, tuple[list[SourceTensor], Weight]],
) -> None:
    """Leave out a head that only repeats the embedding, or add it where llama.cpp wants it anyway."""
    if arch.head == "copy":
        tied = next(weight for weight in arch.weights if weight.tied)
        found.setdefault(tied.gguf, (found["token_embd.weight"][0], tied))
        return
    head = found.get("output.weight")
    if head is None or not config.get("tie_word_embeddings"):
        if head is not None and arch.head == "tied only":
            raise UnsupportedArchitecture(
                "an output head of its own (tie_word_embeddings = false) isn't supported here"
            )
        return
    embedding = found["token_embd.weight"][0][0]
    if embedding.shape == head[0][0].shape and np.array_equal(embedding.read(), head[0][0].read()):
        del found["output.weight"]


def _check_shapes(sources: Sequence[SourceTensor], weight: Weight, sizes: Sizes) -> None:
    shape = stored_shape(weight, sizes)
    for tensor in sources:
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)} "
                f"({' × '.join(weight.shape)} in the GGUF); weights and config don't belong together"
            )


def _file_order(gguf_tensor: str) -> tuple[int, int]:
    """Embedding, then block after block, then the final norm and the head: the order they are used in."""
    parts = gguf_tensor.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]))
    return (2, 0) if parts[0].startswith("output") else (0, 0)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

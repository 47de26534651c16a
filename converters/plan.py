"""Everything headers tell about a conversion, worked out and checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from converters.architectures import find_architecture
from converters.architectures.rope import rope_factors, rope_metadata
from converters.architectures.spec import (
    KV,
    Arch,
    Array,
    Config,
    Op,
    Weight,
    config_float,
    config_int,
    is_block_tensor,
    match_name,
)
from converters.quantize.recipes import Choice, ModelShape, choose_types
from converters.quantize.types import FileType, tensor_bytes
from converters.sources import Source, SourceTensor
from edgellm.errors import CheckpointError, UnsupportedArchitecture

# what a process with numpy, ggml and the tokenizer libraries takes before it holds any weight (measured)
BASE_MEMORY = 150 << 20
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output. `source` is None for a tensor computed from the config (`computed`)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    wanted_type: str  # differs from type_name where the row length forced a fallback
    n_bytes: int
    ops: tuple[Op, ...] = ()
    source: SourceTensor | None = None
    computed: Array | None = field(default=None, repr=False)

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Plan:
    """What `convert` will write: metadata (without the vocabulary), tensors in file order, sizes, notes."""

    architecture: str
    file_type: FileType
    metadata: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...]
    sizes: Mapping[str, int]
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
        """Estimated bytes: the largest tensor as stored, as float32, permuted, and quantized, and the process."""
        largest = 0
        for tensor in self.tensors:
            stored = tensor.source.n_bytes if tensor.source else 0
            largest = max(largest, stored + 4 * tensor.n_elements * (2 if tensor.ops else 1) + tensor.n_bytes)
        return BASE_MEMORY + largest


def make_plan(source: Source, file_type: FileType, overrides: Sequence[tuple[re.Pattern[str], str]] = ()) -> Plan:
    """Plan the conversion of a checkpoint; UnsupportedArchitecture or CheckpointError before any work."""
    arch = find_architecture(source.config)
    config = arch.complete_config(source.config)
    sizes = arch.sizes(config)
    if sizes["n_layer"] > _MAX_LAYERS:
        raise UnsupportedArchitecture(f"config.json has {sizes['n_layer']} layers; llama.cpp takes {_MAX_LAYERS}")
    arch.check(config)
    n_ctx, notes = arch.context_length(config)
    rope, rope_notes = rope_metadata(config)
    metadata = {
        kv.key.format(arch=arch.name): value for kv in arch.metadata if (value := _value(kv, config)) is not None
    }
    metadata[f"{arch.name}.context_length"] = n_ctx
    metadata |= {f"{arch.name}.rope.{key}": value for key, value in rope.items()}
    metadata[f"{arch.name}.rope.dimension_count"] = sizes["head_dim"]
    found = match_tensors(arch, config, sizes, source.tensors)
    shapes = {name: tensor.shape for name, (tensor, _) in found.items()}
    factors = rope_factors(config, sizes["head_dim"])
    if factors is not None:
        shapes["rope_freqs.weight"] = factors.shape
    model = ModelShape(arch.name, sizes["n_layer"], sizes["n_head"], sizes["n_head_kv"])
    types = choose_types(shapes, file_type, model, overrides)
    tensors = [
        _planned(name, tensor.shape, types[name], weight.ops, tensor) for name, (tensor, weight) in found.items()
    ]
    if factors is not None:
        tensors.insert(0, _planned("rope_freqs.weight", factors.shape, types["rope_freqs.weight"], (), None, factors))
    return Plan(arch.name, file_type, metadata, tuple(tensors), sizes, (*notes, *rope_notes), source.n_bytes)


def _planned(
    name: str,
    shape: tuple[int, ...],
    choice: Choice,
    ops: tuple[Op, ...],
    source: SourceTensor | None,
    computed: Array | None = None,
) -> PlannedTensor:
    n_bytes = tensor_bytes(shape, choice.type_name)
    return PlannedTensor(name, shape, choice.type_name, choice.wanted, n_bytes, ops, source, computed)


def _value(kv: KV, config: Config) -> int | float | None:
    if kv.optional and config.get(kv.field) is None:
        return None
    return config_int(config, kv.field) if kv.kind == "uint32" else config_float(config, kv.field)


def match_tensors(
    arch: Arch, config: Config, sizes: Mapping[str, int], tensors: Mapping[str, SourceTensor]
) -> dict[str, tuple[SourceTensor, Weight]]:
    """GGUF name → (stored tensor, its spec), in file order; every stored tensor used, every needed one there."""
    found: dict[str, tuple[SourceTensor, Weight]] = {}
    expected = {
        weight.hf.replace("{i}", str(i)): (weight, weight.gguf.replace("{i}", str(i)))
        for weight in arch.weights
        for i in (range(sizes["n_layer"]) if is_block_tensor(weight) else (0,))
    }
    _check_names(arch, config, sizes, expected, tensors)
    for hf_name, (weight, gguf_name) in expected.items():
        tensor = tensors.get(hf_name)
        if tensor is None or (weight.tied and _repeats_embedding(config, tensors, tensor)):
            continue
        shape = tuple(sizes[size] for size in weight.shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {hf_name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)} "
                f"({' × '.join(weight.shape)}); weights and config don't belong together"
            )
        found[gguf_name] = (tensor, weight)
    return dict(sorted(found.items(), key=lambda item: _file_order(item[0])))


def _check_names(
    arch: Arch,
    config: Config,
    sizes: Mapping[str, int],
    expected: Mapping[str, tuple[Weight, str]],
    tensors: Mapping[str, SourceTensor],
) -> None:
    tied = bool(config.get("tie_word_embeddings"))
    needed = {
        name
        for name, (weight, _) in expected.items()
        if not (weight.tied and tied) and (not weight.flag or config.get(weight.flag))
    }
    missing = [name for name in expected if name in needed and name not in tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}; save or copy it again in full")
    unknown = sorted(
        name
        for name in tensors.keys() - expected.keys()
        if not any(re.fullmatch(pattern, name) for pattern in arch.ignored)
    )
    if unknown:
        beyond = [name for name in unknown if any(match_name(w.hf, name) is not None for w in arch.weights)]
        why = f": config.json has {sizes['n_layer']} layers" if beyond else ""
        hint = "merge the adapter first" if any("lora_" in name for name in unknown) else "is it another model's?"
        raise CheckpointError(f"the checkpoint has tensors this family doesn't know: {_some(unknown)}{why}; {hint}")
    flagged = [name for name, (w, _) in expected.items() if w.flag and name in tensors and not config.get(w.flag)]
    if flagged:
        flag = expected[flagged[0]][0].flag
        raise CheckpointError(f"config.json says {flag} is off, but the checkpoint has {_some(flagged)}; correct one")


def _repeats_embedding(config: Config, tensors: Mapping[str, SourceTensor], head: SourceTensor) -> bool:
    """Whether a stored head only repeats the embedding of a model declared tied (then it isn't written twice)."""
    if not config.get("tie_word_embeddings"):
        return False
    embedding = next((t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is None or embedding.shape != head.shape:
        return False
    return bool(np.array_equal(embedding.read(), head.read()))


def _file_order(gguf_name: str) -> tuple[int, int]:
    """Embedding, then block after block, then the final norm and the head: the order they are used in."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]))
    return (0, 0) if parts[0] == "token_embd" else (2, 0)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""A GGUF as the source: the same tensors and metadata with other types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from converters.plan import Plan, PlannedTensor, weigh
from converters.quantize.importance import Importance
from converters.quantize.recipes import ModelShape, choose_types
from converters.quantize.types import FileType, tensor_bytes
from converters.sources import Source
from edgellm.errors import CheckpointError, ModelFileError

_LOSSLESS = ("F32", "F16", "BF16", "F64")
_REPLACED = (
    "general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "split.",
    "edgellm.receipt.", "quantize.imatrix.",
)  # fmt: skip


def make_gguf_plan(
    source: Source,
    file_type: FileType,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    importance: Importance | None = None,
) -> Plan:
    """Plan to write a GGUF's weights with the types of another recipe; any architecture."""
    arch = source.metadata.get("general.architecture")
    if not isinstance(arch, str) or not source.tensors:
        raise ModelFileError(f"{source.path} has no architecture or no weights: it is no model file")
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    counted = [
        name for name, tensor in source.tensors.items() if tensor.dtype.startswith("I") and tensor.dtype[1:].isdigit()
    ]
    if counted:
        raise CheckpointError(f"{source.path} has integer tensors ({counted[0]}), which can't be requantized")
    types = choose_types(shapes, file_type, _model_shape(arch, source), overrides, importance is not None)
    tensors = tuple(
        PlannedTensor(
            name,
            tensor.shape,
            types[name].type_name,
            types[name].wanted,
            tensor_bytes(tensor.shape, types[name].type_name),
            sources=(tensor,),
        )
        for name, tensor in source.tensors.items()
    )
    metadata = {key: value for key, value in source.metadata.items() if not key.startswith(_REPLACED)}
    quantized = sorted({tensor.dtype for tensor in source.tensors.values()} - set(_LOSSLESS))
    notes = (f"the source is already quantized ({', '.join(quantized)}): its losses stay",) if quantized else ()
    return Plan(arch, file_type, metadata, weigh(tensors, importance), {}, (*notes, *source.notes), source.n_bytes)


def _model_shape(arch: str, source: Source) -> ModelShape:
    def number(key: str, default: int = 0) -> int:
        value: Any = source.metadata.get(f"{arch}.{key}", default)
        return int(value[0] if isinstance(value, list) and value else value or default)

    n_head = number("attention.head_count", 1)
    n_head_kv = number("attention.head_count_kv", n_head)
    return ModelShape(arch, number("block_count"), n_head, n_head_kv, number("expert_count"))

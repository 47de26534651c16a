"""Writes .safetensors shards a tensor at a time, so that memory doesn't grow with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.architectures.spec import Array
from edgellm.native.ggml import quantize_rows

# our names of the types a checkpoint can have → (safetensors' name, ggml type, bytes)
DTYPES: Mapping[str, tuple[str, int, int]] = {"f32": ("F32", 0, 4), "f16": ("F16", 1, 2), "bf16": ("BF16", 30, 2)}
_SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write; `read()` gives its float32 values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def write_shards(
    folder: Path, tensors: Iterable[OutTensor], dtype: str, on_tensor: Callable[[str, int], None] | None = None
) -> int:
    """Write model.safetensors, or shards and their index; returns the bytes of tensor data."""
    shards = _split(list(tensors), DTYPES[dtype][2])
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(folder / name, shard, dtype, on_tensor)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _split(tensors: list[OutTensor], item: int) -> list[list[OutTensor]]:
    shards: list[list[OutTensor]] = [[]]
    room = _SHARD_BYTES
    for tensor in tensors:
        n_bytes = prod(tensor.shape) * item
        if n_bytes > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(tensor)
        room -= n_bytes
    return shards


def _write_file(path: Path, tensors: list[OutTensor], dtype: str, on_tensor: Callable[[str, int], None] | None) -> int:
    stored, ggml_type, item = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + prod(tensor.shape) * item
        header[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data: NDArray[np.uint8] = quantize_rows(tensor.read(), ggml_type)
            file.write(data.data)
            if on_tensor:
                on_tensor(tensor.name, data.nbytes)
    return offset

"""A GGUF as a source of weights: any quantization, dequantized to float32 a tensor at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters.sources import Source, SourceTensor
from edgellm.errors import CheckpointError
from edgellm.gguf_header import GGML_TYPES, TensorInfo, read_header

_SLAB_BYTES = 1 << 20  # gguf's numpy dequantizers make several temporaries of the size of their input


def open_gguf(path: Path) -> Source:
    """The tensors under their GGUF names. A split GGUF must be merged first."""
    header = read_header(path)
    if int(header.metadata.get("split.count", 1)) > 1:
        raise CheckpointError(f"{path} is one part of a split GGUF; merge the parts with llama-gguf-split first")
    tensors = {
        name: SourceTensor(name, info.shape, info.type_name, info.n_bytes, partial(read_tensor, path, info))
        for name, info in header.tensors.items()
    }
    return Source(path, "gguf", {}, tensors, header.metadata)


def read_tensor(path: Path, info: TensorInfo, k: int = 0, n: int = 1) -> NDArray[np.float32]:
    """Dequantized as gguf.quants does it: exact products, the same on every machine."""
    shape = (info.shape[0] // n, *info.shape[1:])
    out = np.empty(info.n_elements // n, dtype=np.float32)
    _, block, n_block_bytes = GGML_TYPES[info.ggml_type]
    n_bytes = info.n_bytes // n
    step = max(1, _SLAB_BYTES // n_block_bytes) * n_block_bytes
    try:
        with path.open("rb") as file:
            file.seek(info.offset + k * n_bytes)
            for start in range(0, n_bytes, step):
                wanted = min(step, n_bytes - start)
                raw = np.frombuffer(file.read(wanted), dtype=np.uint8)
                if raw.size != wanted:
                    raise CheckpointError(f"{path} changed while it was read: tensor {info.name} is cut off")
                first = start // n_block_bytes * block
                values = _dequantize(raw, info.ggml_type)
                out[first : first + values.size] = values
    except OSError as exc:
        raise CheckpointError(f"cannot read tensor {info.name} in {path}: {exc.strerror or exc}") from exc
    return out.reshape(shape)


def _dequantize(raw: NDArray[np.uint8], ggml_type: int) -> NDArray[np.float32]:
    name = GGML_TYPES[ggml_type][0]
    if name in ("F32", "F16", "F64"):
        return raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[name]).astype(np.float32, copy=False)
    # as one long row: gguf works through a few rows at a time, and short ones take it ten times as long
    values: NDArray[np.float32] = dequantize(raw.reshape(1, -1), GGMLQuantizationType(ggml_type))
    return values.reshape(-1)

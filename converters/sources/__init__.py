"""Where weights come from: names, shapes and types from headers alone, float32 arrays on request.

`open_source` tells the kinds apart by what is in the folder or file, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.damage import blamed_on
from edgellm.errors import CheckpointError


@dataclass(frozen=True)
class SourceTensor:
    """One stored tensor. `shape` is as stored (rows first).

    `read()` gives it as float32, freshly allocated; `read(k, n)` the k-th of n equal parts along the first axis.
    `read_stored`, with the same arguments, gives the stored numbers: integers as they are, BF16 as uint16 and FP8 as
    uint8 bits. A GGUF's tensors have none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # a safetensors type, a ggml type, or how a weight is quantized ("GPTQ 4 bit")
    n_bytes: int
    read: Callable[..., NDArray[np.float32]]
    read_stored: Callable[..., NDArray[Any]] | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: `config` is its config.json (or what a GGUF's metadata says in the same words)."""

    path: Path
    kind: str  # "safetensors", "torch", "gguf"
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of a GGUF
    notes: tuple[str, ...] = ()  # what the receipt should say about it
    tokenizer: Path | None = None  # where its tokenizer is, if that is another folder (an adapter's)

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.path

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())


def open_source(path: str | Path) -> Source:
    """Open a checkpoint folder, one weight file with a config beside it, or a GGUF.

    CheckpointError or ModelFileError says what is wrong with it.
    """
    path = Path(path)
    with blamed_on(path):
        return _open(path)


def _open(path: Path) -> Source:
    if not path.exists():
        raise CheckpointError(f"no such file or folder: {path}; check the path")
    if path.is_dir():
        from converters.sources.huggingface import open_folder

        return open_folder(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from converters.sources.gguf_file import open_gguf

        return open_gguf(path)
    from converters.sources.state_dict import open_weight_file

    return open_weight_file(path)

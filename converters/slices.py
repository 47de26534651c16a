"""Some blocks of a GGUF as a small model of their own, so that hidden states can be run through just these.

llama.cpp can't start in the middle of a model. But it takes hidden states in place of tokens, and a file with blocks
4 to 5 as its blocks 0 and 1 computes what the whole model does there, where a family's blocks are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.quantize.recipes import layer_of
from converters.quantize.types import tensor_bytes
from converters.sources.gguf_file import read_tensor
from converters.writer import header_bytes, padded
from edgellm.errors import OutputError
from edgellm.gguf_header import GGUFHeader, TensorInfo
from edgellm.native.observe import InputWatch
from edgellm.native.sweep import sweep

_N_VOCAB = 32  # of a slice that is never given tokens
_DROPPED = ("general.", "tokenizer.", "split.", "edgellm.", "quantize.")


# Their graphs have been run with states for tokens; others could abort the process at it.
_SLICEABLE = (
    "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "phi3", "granite", "granitemoe", "olmo2", "olmoe", "stablelm",
    "starcoder2", "minicpm", "arcee", "mistral3",
)  # fmt: skip
_N_TRIED = 8  # blocks: more than the period of any pattern
_SAME = 1e-2  # of the states' norm; other positions or windows make 1e-1 and more

_Bytes = NDArray[np.uint8]


def block_count(header: GGUFHeader) -> int:
    """How many blocks a model has."""
    return int(header.metadata.get(f"{header.architecture}.block_count", 0))


def write_slice(
    path: Path,
    header: GGUFHeader,
    blocks: range,
    tokens: NDArray[np.int32],
    packed: Mapping[str, tuple[str, _Bytes]],
    floats: Collection[str],
) -> None:
    """These blocks of the file as a model without a vocabulary; with block 0 it takes tokens, else hidden states.

    tokens: those that it will be given, sorted; a token is then known by its place among them. packed: tensors in other
    bytes, (type, bytes). floats: tensors that must be stored as F16 or F32. OutputError where it can't be written.
    """
    from_start = blocks.start == 0
    n_vocab = header.tensors["token_embd.weight"].shape[0]
    stored = np.memmap(header.path, np.uint8, "r")
    infos, readers = [], []
    for info in header.tensors.values():
        name = _name(info.name, blocks)
        if name is None:
            continue
        type_name, read = info.type_name, partial(_stored, stored, info)
        shape = info.shape
        if info.name in packed:
            type_name, data = packed[info.name]
            read = partial(np.asarray, data)
        elif info.name in floats and type_name not in ("F16", "F32"):
            type_name = "F32" if type_name == "BF16" else "F16"
            read = partial(_as_floats, header.path, info, type_name)
        elif shape[0] == n_vocab and not info.name.startswith("blk."):
            shape = (len(tokens) if from_start else _N_VOCAB, *shape[1:])
            read = partial(_rows, stored, info, tokens) if from_start else partial(_zeros, shape, type_name)
        infos.append(_Info(name, shape, type_name, tensor_bytes(shape, type_name)))
        readers.append(read)
    metadata = _metadata(header, blocks, len(tokens) if from_start else _N_VOCAB)
    try:
        with path.open("wb") as file:
            file.write(header_bytes(header.architecture, metadata, infos))
            for read in readers:
                file.write(bytes(padded(file.tell()) - file.tell()))
                file.write(np.ascontiguousarray(read()).data)
            file.write(bytes(padded(file.tell()) - file.tell()))
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}; make room there") from exc


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type_name: str
    n_bytes: int


def _name(name: str, blocks: range) -> str | None:
    """A tensor's name in the slice, None for one of another block."""
    i = layer_of(name)
    if i < 0:
        return name
    return name.replace(f"blk.{i}.", f"blk.{i - blocks.start}.", 1) if i in blocks else None


def _stored(stored: _Bytes, info: TensorInfo) -> _Bytes:
    return stored[info.offset : info.offset + info.n_bytes]


def _rows(stored: _Bytes, info: TensorInfo, rows: NDArray[np.int32]) -> _Bytes:
    return _stored(stored, info).reshape(info.shape[0], -1)[rows]


def _zeros(shape: tuple[int, ...], type_name: str) -> _Bytes:
    return np.zeros(tensor_bytes(shape, type_name), np.uint8)


def _as_floats(path: Path, info: TensorInfo, type_name: str) -> NDArray[Any]:
    return read_tensor(path, info).astype(np.float32 if type_name == "F32" else np.float16)


def _metadata(header: GGUFHeader, blocks: range, n_vocab: int) -> dict[str, Any]:
    arch, n = header.architecture, block_count(header)
    kept = {key: value for key, value in header.metadata.items() if not key.startswith(_DROPPED)}
    for key, value in kept.items():
        if isinstance(value, list) and len(value) == n and key.startswith(f"{arch}."):
            kept[key] = value[blocks.start : blocks.stop]
    kept[f"{arch}.block_count"] = len(blocks)
    kept[f"{arch}.vocab_size"] = n_vocab
    if blocks.start:
        kept.pop(f"{arch}.embedding_scale", None)  # the states have had it
        leading = f"{arch}.leading_dense_block_count"
        if leading in kept:
            kept[leading] = max(0, kept[leading] - blocks.start)
    return {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab", **kept}


def stands_alone(header: GGUFHeader, tokens: Sequence[int], folder: Path, n_threads: int = 0) -> bool:
    """Whether hidden states run through one block after another come out as from the whole model.

    Not where a block depends on its number (sliding windows and positions that differ), on tokens, or on the past.
    Tried on families that are known not to abort at it.
    """
    n = min(block_count(header), _N_TRIED)
    if header.architecture not in _SLICEABLE or any("per_layer" in name for name in header.tensors):
        return False
    special = ("rope.dimension_sections", "attention.sliding_window")
    if any(header.metadata.get(f"{header.architecture}.{key}") for key in special):
        return False
    used, places = np.unique(np.array([tokens], np.int32), return_inverse=True)
    start = [places.reshape(-1).tolist()]
    path = folder / "slice.gguf"

    def leaving(blocks: range, last: int, inputs: Any) -> NDArray[np.float32] | None:
        write_slice(path, header, blocks, used, {}, ())
        watch = InputWatch(lambda name: False, lambda *_: None, last=f"l_out-{last}")
        sweep(path, inputs, watch, n_threads=n_threads)
        return None if watch.last_values is None else watch.last_values.reshape(1, len(tokens), -1)

    states: Any = start
    for i in range(n):
        states = leaving(range(i, i + 1), 0, states)
        if states is None:
            return False
    expected = leaving(range(block_count(header)), n - 1, start)
    return expected is not None and bool(np.linalg.norm(states - expected) < _SAME * np.linalg.norm(expected))

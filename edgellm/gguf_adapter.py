"""Reads the header of a GGUF LoRA and checks it against its model, before native code gets near it.

llama.cpp aborts on some adapters, ignores parts of others without a word, and says of the rest only that the "model
arch mismatches". Every pair is checked here: its tensor, its shape, its type, and that llama.cpp will use it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import AdapterError, ModelFileError
from edgellm.gguf_header import GGUFHeader, TensorInfo, read_header

# what llama.cpp's graphs look up or multiply without asking for adapters
WITHOUT_LORA = re.compile(
    r"(per_layer_model_proj|per_layer_token_embd|position_embd|token_types|blk\.\d+\.(shortconv\.conv|ssm_conv1d))"
    r"\.weight"
)
_FLOAT32, _STRING = 6, 8
_NUMBERS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")  # no matrix product takes them
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_INVOCATION = "adapter.alora.invocation_tokens"


@dataclass(frozen=True)
class AdapterFile:
    """A checked GGUF LoRA. invocation: the tokens that switch it on (an activated LoRA); () = always on."""

    path: Path
    n_tensors: int
    n_bytes: int
    invocation: tuple[int, ...] = ()


def check_adapter(path: str | Path, model: GGUFHeader) -> AdapterFile:
    """Check that llama.cpp can add this adapter to `model`, and will add all of it. AdapterError otherwise."""
    path = Path(path)
    if path.is_dir():
        raise AdapterError(
            f"{path} is a folder; make a GGUF of the adapter: edgellm convert BASE --adapter {path} --adapter-only"
        )
    try:
        header = read_header(path)
    except ModelFileError as exc:
        raise AdapterError(str(exc)) from exc
    _check_kind(header, model)
    names = {_base_name(header, tensor) for tensor in header.tensors.values()}
    if not names:
        raise AdapterError(f"{path} holds no tensors; export the adapter again")
    for name in sorted(names):
        _check_pair(header, model, name)
    return AdapterFile(path, len(names), header.n_bytes, _invocation(header, model))


def _check_kind(header: GGUFHeader, model: GGUFHeader) -> None:
    path, meta = header.path, header.metadata
    if meta.get("general.type", "model") != "adapter":
        raise AdapterError(f"{path} is a model, not an adapter; load it as the model")
    if meta.get("adapter.type") != "lora":
        raise AdapterError(f"{path} holds an adapter of type {meta.get('adapter.type')!r}; only 'lora' can be added")
    if header.architecture != model.architecture:
        raise AdapterError(
            f"{path} was made for a {header.architecture} model, but {model.path} is a {model.architecture} model; "
            "load it with its own base"
        )
    for key in ("general.type", "general.architecture", "adapter.type"):
        if header.kinds.get(key) != _STRING:
            raise AdapterError(f"{path} is damaged: {key} is no text; export the adapter again")
    alpha = meta.get("adapter.lora.alpha", 0.0)
    if header.kinds.get("adapter.lora.alpha", _FLOAT32) != _FLOAT32 or not math.isfinite(alpha):
        raise AdapterError(f"{path} is damaged: adapter.lora.alpha is {alpha!r}; export the adapter again")


def _base_name(header: GGUFHeader, tensor: TensorInfo) -> str:
    name, _, suffix = tensor.name.rpartition(".")
    if suffix not in ("lora_a", "lora_b"):
        raise AdapterError(
            f"{header.path} holds {tensor.name}, which llama.cpp can't add at run time; merge the adapter instead: "
            "edgellm convert BASE --adapter DIR"
        )
    return name


def _check_pair(header: GGUFHeader, model: GGUFHeader, name: str) -> None:
    path, base = header.path, model.tensors.get(name)
    a, b = header.tensors.get(f"{name}.lora_a"), header.tensors.get(f"{name}.lora_b")
    if base is None:
        raise AdapterError(f"{path} changes {name}, which {model.path} doesn't have; load it with its own base")
    if a is None or b is None:
        raise AdapterError(f"{path}: {name} has only one half of its pair; export the adapter again")
    if WITHOUT_LORA.fullmatch(name) or (name == _EMBEDDING and _HEAD not in model.tensors):
        raise AdapterError(
            f"{path} changes {name}, to which llama.cpp adds no adapter in this model; merge it instead: "
            "edgellm convert BASE --adapter DIR"
        )
    rank = a.shape[-1] if name == _EMBEDDING else a.shape[-2] if len(a.shape) > 1 else 0
    if name == _EMBEDDING:  # rows of a are looked up, then multiplied with b
        wanted: tuple[tuple[int, ...], ...] = ((base.shape[0], rank), (base.shape[1], rank))
    else:
        *experts, rows, columns = base.shape if len(base.shape) > 1 else (0, 0)
        wanted = ((*experts, rank, columns), (*experts, rows, rank))
    if (_plain(a, len(base.shape)), _plain(b, len(base.shape))) != wanted:
        raise AdapterError(
            f"{path}: {name} is {list(base.shape)} in {model.path}, but the adapter's factors are {list(a.shape)} and "
            f"{list(b.shape)}; load it with its own base"
        )
    for half in (a, b):
        if half.type_name in _NUMBERS:
            raise AdapterError(f"{path}: {half.name} has type {half.type_name}; export the adapter again")


def _plain(tensor: TensorInfo, n_dims: int) -> tuple[int, ...]:
    """The shape without leading dimensions of 1 that the base's doesn't have."""
    shape = tensor.shape
    while len(shape) > n_dims and shape[0] == 1:
        shape = shape[1:]
    return shape


def _invocation(header: GGUFHeader, model: GGUFHeader) -> tuple[int, ...]:
    tokens = header.metadata.get(_INVOCATION, [])
    n_vocab = len(model.metadata.get("tokenizer.ggml.tokens", ()))
    if not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < n_vocab for t in tokens):
        raise AdapterError(f"{header.path}: {_INVOCATION} aren't tokens of {model.path}; load it with its own base")
    return tuple(tokens)

"""GGUF → Hugging Face folder: the specs run backwards.

The weights are the GGUF's, dequantized; with dtype f32 nothing is rounded, so converting the folder to an F32
GGUF gives the same numbers again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from converters.architectures import find_gguf_architecture
from converters.architectures.rope import rope_config, shortest
from converters.architectures.spec import Arch, Array, Weight, is_block_tensor
from converters.safetensors_writer import DTYPES, OutTensor, write_shards
from converters.sources import Source, SourceTensor
from converters.sources.gguf_file import open_gguf
from converters.tokenizers.tokenizer_json import build_tokenizer_json, dump_json
from converters.tokenizers.vocabulary import Vocabulary, vocabulary_from_metadata
from edgellm.errors import CheckpointError, OutputError

_TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def to_checkpoint(
    gguf: str | Path,
    folder: str | Path,
    *,
    dtype: str = "f32",
    force: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a GGUF as a checkpoint folder that transformers loads; returns the folder.

    dtype: f32 (exact), bf16 or f16. force replaces an existing folder. The folder appears when it is complete.
    Raises ModelFileError, UnsupportedArchitecture, TokenizerError, CheckpointError, OutputError, ValueError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    source, folder = open_gguf(Path(gguf)), Path(folder)
    arch = find_gguf_architecture(str(source.metadata.get("general.architecture", "")))
    config = gguf_config(arch, source, dtype)
    sizes = arch.sizes(config)
    tensors = _out_tensors(arch, config, sizes, source)
    vocabulary = vocabulary_from_metadata(source.metadata)
    tokenizer = build_tokenizer_json(vocabulary)
    n_bytes = sum(prod(tensor.shape) for tensor in tensors) * DTYPES[dtype][2]
    _check_folder(folder, n_bytes, force)
    _check_replaceable(folder, source.path)
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        partial_folder.mkdir()
        done = 0

        def on_tensor(name: str, n: int) -> None:
            nonlocal done
            done += n
            if on_progress:
                on_progress(name, done, n_bytes)

        write_shards(partial_folder, tensors, dtype, on_tensor)
        _write_small_files(partial_folder, config, vocabulary, tokenizer)
        _put_in_place(partial_folder, folder)
    except OSError as exc:
        raise OutputError(f"cannot write {folder}: {exc.strerror or exc}; make room or choose another folder") from exc
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return folder


def _check_folder(folder: Path, n_bytes: int, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder to write")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise OutputError(f"{folder} exists and isn't empty; add --force to replace it, or name another folder")
    parent = folder.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write in {parent}; choose another folder")
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        raise OutputError(f"{parent} has {free:,} bytes free, the checkpoint needs {n_bytes:,}; make room")


def _check_replaceable(folder: Path, gguf: Path) -> None:
    """--force replaces an earlier checkpoint, never somebody's home folder or the one that holds the source."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise OutputError(f"{folder} holds no checkpoint, so --force won't replace it; name another folder")
    if gguf.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"the GGUF itself is in {folder}, which would be replaced; name another folder")


def _put_in_place(new: Path, folder: Path) -> None:
    """Give the complete folder its name; the one it replaces is moved aside first and deleted last."""
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.replaced-", dir=folder.parent))
    os.replace(folder, aside / folder.name)
    os.replace(new, folder)
    shutil.rmtree(aside, ignore_errors=True)


def gguf_config(arch: Arch, source: Source, dtype: str = "f32") -> dict[str, Any]:
    """config.json for a GGUF, in words that transformers 4 and 5 both read."""
    metadata = source.metadata
    hf_class = arch.hf_classes[0]
    config: dict[str, Any] = {"architectures": [hf_class], "model_type": arch.model_types[hf_class]}
    config |= {key: value for key, value in arch.defaults[hf_class].items() if not isinstance(value, int | float)}
    for kv in arch.metadata:
        key = kv.key.format(arch=arch.name)
        if key in metadata:
            config[kv.field] = shortest(metadata[key])
        elif not kv.optional and kv.field != "vocab_size":
            raise CheckpointError(f"{source.path} lacks {key}; it can't be written as a checkpoint")
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source.path} has no token_embd.weight; it can't be written as a checkpoint")
    config["max_position_embeddings"] = int(metadata.get(f"{arch.name}.context_length", 0)) or 2048
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in source.tensors
    for weight in arch.weights:
        if weight.flag:
            config[weight.flag] = config.get(weight.flag, False) or weight.gguf.replace("{i}", "0") in source.tensors
    n_rot = arch.sizes(config)["head_dim"]
    factors = source.tensors.get("rope_freqs.weight")
    rope = rope_config(metadata, arch.name, n_rot, None if factors is None else factors.read())
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{name}_token_id"] = int(metadata[f"tokenizer.ggml.{key}_token_id"])
    return config | {"torch_dtype": _TORCH_DTYPES[dtype], "use_cache": True}


def _matched(arch: Arch, sizes: Mapping[str, int], source: Source) -> dict[str, tuple[SourceTensor, Weight]]:
    """Checkpoint name → (GGUF tensor, its spec); every tensor of the GGUF used."""
    found: dict[str, tuple[SourceTensor, Weight]] = {}
    used = {"rope_freqs.weight"}
    for weight in arch.weights:
        for i in range(sizes["n_layer"]) if is_block_tensor(weight) else (0,):
            name = weight.gguf.replace("{i}", str(i))
            if name in source.tensors:
                found[weight.hf.replace("{i}", str(i))] = (source.tensors[name], weight)
                used.add(name)
    unknown = sorted(source.tensors.keys() - used)
    if unknown:
        raise CheckpointError(
            f"{source.path} has tensors the {arch.name} family doesn't know: {', '.join(unknown[:3])}"
        )
    return found


def _out_tensors(arch: Arch, config: Mapping[str, Any], sizes: Mapping[str, int], source: Source) -> list[OutTensor]:
    matched = _matched(arch, sizes, source)
    out = []
    for weight in arch.weights:
        if (weight.tied and config["tie_word_embeddings"]) or (weight.flag and not config[weight.flag]):
            continue
        for i in range(sizes["n_layer"]) if is_block_tensor(weight) else (0,):
            name, shape = weight.hf.replace("{i}", str(i)), tuple(sizes[size] for size in weight.shape)
            if name not in matched:
                raise CheckpointError(f"{source.path} lacks {weight.gguf.replace('{i}', str(i))}")
            tensor = matched[name][0]
            if tensor.shape != shape:
                raise CheckpointError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
            out.append(OutTensor(name, shape, partial(_read_back, tensor, weight, sizes)))
    return out


def _read_back(tensor: SourceTensor, weight: Weight, sizes: Mapping[str, int]) -> Array:
    values = tensor.read()
    for op in reversed(weight.ops):
        values = op.inverse(values, sizes)
    return values


def _write_small_files(
    folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: Mapping[str, Any]
) -> None:
    dump_json(folder / "config.json", config)
    dump_json(folder / "tokenizer.json", tokenizer)
    special = {
        f"{name}_token": vocabulary.tokens[number]
        for name, number in vocabulary.special.items()
        if name not in ("eot", "eom") and number < len(vocabulary.tokens)
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **special,
    }
    dump_json(folder / "tokenizer_config.json", tokenizer_config)
    ends = [vocabulary.special[name] for name in ("eos", "eom", "eot") if name in vocabulary.special]
    generation = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
    }
    dump_json(folder / "generation_config.json", {key: value for key, value in generation.items() if value is not None})
    for name, template in vocabulary.templates.items():
        path = folder / "chat_template.jinja"
        if name != "default":
            path = folder / "additional_chat_templates" / f"{Path(name).name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")

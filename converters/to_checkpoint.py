"""GGUF → Hugging Face folder: the specs run backwards.

The weights are the GGUF's, dequantized; with dtype f32 nothing is rounded, so converting the folder to an F32
GGUF gives the same numbers again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from converters.architectures import find_gguf_architecture
from converters.architectures.spec import (
    Arch,
    Array,
    Config,
    Sizes,
    Weight,
    blocks,
    gguf_name,
    hf_names,
    stored_shape,
    weight_shape,
)
from converters.damage import blamed_on
from converters.gguf_config import gguf_config
from converters.safetensors_writer import DTYPES, OutTensor, write_shards
from converters.sources import Source, SourceTensor
from converters.sources.gguf_file import open_gguf
from converters.sources.sentence_transformers import POOLING_NAMES, write_modules
from converters.tokenizers.tokenizer_json import build_tokenizer_json, dump_json
from converters.tokenizers.vocabulary import Vocabulary, vocabulary_from_metadata
from edgellm.errors import CheckpointError, OutputError

_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


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
    with blamed_on(source.path):
        return _to_checkpoint(source, folder, dtype, force, on_progress)


def _to_checkpoint(
    source: Source, folder: Path, dtype: str, force: bool, on_progress: Callable[[str, int, int], None] | None
) -> Path:
    arch = find_gguf_architecture(source.metadata)
    config = gguf_config(arch, source, dtype)
    usual = arch.complete_config(config)
    sizes = arch.sizes(usual)
    tensors = out_tensors(arch, usual, sizes, source)
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
        n_ctx = int(source.metadata.get(f"{arch.name}.context_length", 2048))
        write_small_files(partial_folder, config, vocabulary, tokenizer, n_ctx)
        pooling = POOLING_NAMES.get(source.metadata.get(f"{arch.name}.pooling_type", 0))
        if pooling:
            write_modules(partial_folder, pooling)
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


def out_tensors(arch: Arch, config: Config, sizes: Sizes, source: Source) -> list[OutTensor]:
    """Every tensor of the checkpoint; CheckpointError where the GGUF has too few or too many."""
    made_of: dict[str, list[tuple[SourceTensor, Weight]]] = {}
    used = set(arch.tensors(config, sizes)) | _ROPE_TENSORS  # made from the config
    for weight in arch.weights:
        for i in blocks(weight, config, sizes):
            name, names = gguf_name(weight, i), hf_names(weight, i, sizes)
            is_part = any(op.part for op in weight.ops)
            if name in used or not _is_written(weight, config, source, name):
                continue
            tensor = source.tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"{source.path} lacks {name}")
            if tensor.shape != weight_shape(weight, sizes):
                expected = list(weight_shape(weight, sizes))
                raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, expected {expected}")
            used.add(name)
            for e, hf_name in enumerate(names):
                share = tensor if len(names) == 1 else replace(tensor, read=partial(tensor.read, e, len(names)))
                made_of.setdefault(hf_name, []).append((share, weight))
                assert is_part or len(made_of[hf_name]) == 1
    if config["tie_word_embeddings"]:
        used.add("output.weight")
    unknown = sorted(source.tensors.keys() - used)
    if unknown:
        known = ", ".join(unknown[:3])
        raise CheckpointError(f"{source.path} has tensors the {arch.name} family doesn't know: {known}")
    return [
        OutTensor(name, stored_shape(parts[0][1], sizes), partial(_read_back, parts, sizes))
        for name, parts in made_of.items()
    ]


def _is_written(weight: Weight, config: Config, source: Source, name: str) -> bool:
    if weight.tied and config["tie_word_embeddings"]:
        return False
    return not (weight.flag and not config[weight.flag]) and not (weight.optional and name not in source.tensors)


def _read_back(parts: Sequence[tuple[SourceTensor, Weight]], sizes: Sizes) -> Array:
    """The stored tensor: maps undone, parts joined."""
    undone: list[tuple[int, Array]] = []
    shape = stored_shape(parts[0][1], sizes)
    for tensor, weight in parts:
        at = next((n for n, op in enumerate(weight.ops) if op.part), -1)
        values = tensor.read()
        if "{e}" in weight.hf:
            values = values[0]  # one expert, with the stack's axis
        for op in reversed(weight.ops[at + 1 :]):
            values = op.inverse(values, sizes)
        if at < 0:
            return values.reshape(shape)
        undone.append(((weight.ops[at].part or (0, 1))[0], values))
    weight = parts[0][1]
    at = next(n for n, op in enumerate(weight.ops) if op.part)
    join = weight.ops[at].join
    assert join is not None
    values = join([values for _, values in sorted(undone, key=lambda item: item[0])])
    for op in reversed(weight.ops[:at]):
        values = op.inverse(values, sizes)
    return values.reshape(shape)


def write_small_files(
    folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: Mapping[str, Any], n_ctx: int
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
        "model_max_length": n_ctx,
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

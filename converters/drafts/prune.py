"""Which blocks of a model a draft keeps, and the smaller checkpoint that they make."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapters.gguf_base import as_checkpoint
from converters.architectures import find_architecture
from converters.forward.families import FAMILIES, Family
from converters.safetensors_writer import OutTensor, write_shards
from converters.sources import Source, SourceTensor, open_source
from converters.to_checkpoint import write_small_files
from converters.tokenizers.tokenizer_json import build_tokenizer_json, dump_json
from converters.tokenizers.vocabulary import vocabulary_from_metadata
from edgellm.errors import UnsupportedArchitecture

_LAYER = re.compile(r"((?:.*\.)?layers\.)(\d+)\.(.+)")
_ENDS = 2  # blocks kept at either end, where there are enough: they do what no others do
_PER_LAYER = ("layer_types", "no_rope_layers")  # lists in config.json with an entry for each block


def open_base(path: Path) -> Source:
    """A checkpoint, or a GGUF seen as one. Errors as of `open_source`."""
    source = open_source(path)
    return as_checkpoint(source) if source.kind == "gguf" else source


def complete_config(source: Source) -> dict[str, Any]:
    """config.json with the defaults of the family's class."""
    return dict(find_architecture(source.config).complete_config(source.config))


def family_of(source: Source) -> Family:
    """How the model's blocks work; UnsupportedArchitecture with the reason where `student` can't train them."""
    config = complete_config(source)
    kind = str(config.get("model_type", ""))
    family = FAMILIES.get(kind)
    reasons = {
        "its family has no forward pass of ours": family is None,
        "it has experts": any("expert" in name or "_moe." in name for name in source.tensors),
        "it has convolutions": any(".conv." in name for name in source.tensors),
        "its blocks are of several kinds": bool(family and family.full_every) or len(set(_kinds(config))) > 1,
        "its logits are capped": bool(config.get("final_logit_softcapping") or config.get("attn_logit_softcapping")),
        "its branches are scaled by the number of blocks": kind == "minicpm",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if family is None or found:
        raise UnsupportedArchitecture(
            f"{source.path} ({kind or 'unknown family'}) can't be distilled: {found[0]}; make a draft from text instead"
        )
    return family


def _kinds(config: Mapping[str, Any]) -> Sequence[str]:
    return config.get("layer_types") or []


def silent_blocks(source: Source, family: Family) -> set[int]:
    """Blocks that add nothing to the residual stream: the last matrices of both branches are zero."""
    silent: dict[int, bool] = {}
    for name, tensor in source.tensors.items():
        found = _LAYER.fullmatch(name)
        if found and found[3] in (f"{family.output}.weight", f"{family.feed_forward[2]}.weight"):
            i = int(found[2])
            silent[i] = silent.get(i, True) and not _has_values(tensor)
    return {i for i, is_silent in silent.items() if is_silent}


def _has_values(tensor: SourceTensor) -> bool:
    return bool(tensor.read(0, tensor.shape[0]).any()) or bool(tensor.read().any())  # a row tells mostly


def choose_blocks(candidates: Sequence[int], n: int) -> list[int]:
    """n of the blocks: the first and last ones, and others evenly spread between. ValueError: there aren't as many."""
    if n > len(candidates):
        raise ValueError(f"the model has {len(candidates)} blocks that do something; --layers {n} is more")
    ends = min(_ENDS, n // 2)
    inner, n_inner = candidates[ends : len(candidates) - ends], n - 2 * ends
    spread = [inner[int((i + 0.5) * len(inner) / n_inner)] for i in range(n_inner)]
    return [*candidates[:ends], *spread, *candidates[len(candidates) - ends :]]


def prune(source: Source, blocks: Sequence[int]) -> Source:
    """The model with these blocks only, numbered anew."""
    number = {block: i for i, block in enumerate(blocks)}
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in source.tensors.items():
        found = _LAYER.fullmatch(name)
        if not found:
            tensors[name] = tensor
        elif int(found[2]) in number:
            tensors[f"{found[1]}{number[int(found[2])]}.{found[3]}"] = tensor
    config = {key: value for key, value in source.config.items() if key not in _PER_LAYER}
    config["num_hidden_layers"] = len(blocks)
    return Source(source.path, source.kind, config, tensors, source.metadata, tokenizer=source.tokenizer)


def write_folder(folder: Path, source: Source, trained: Mapping[str, Any]) -> None:
    """The checkpoint of a pruned source, its trained tensors (numpy, by name) in place of the stored ones."""
    folder.mkdir(parents=True)
    tensors = [
        OutTensor(name, tensor.shape, partial(np.asarray, trained[name]) if name in trained else tensor.read)
        for name, tensor in source.tensors.items()
    ]
    write_shards(folder, tensors, "f32")
    if source.kind == "gguf":
        vocabulary = vocabulary_from_metadata(source.metadata)
        n_ctx = int(source.config.get("max_position_embeddings", 2048))
        write_small_files(folder, source.config, vocabulary, build_tokenizer_json(vocabulary), n_ctx)
        return
    dump_json(folder / "config.json", {key: value for key, value in source.config.items() if not _is_quantizer(key)})
    for path in source.tokenizer_folder.iterdir():
        is_tokenizer = path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name
        if path.is_file() and is_tokenizer and path.name not in ("config.json", "params.json"):
            shutil.copy(path, folder / path.name)


def _is_quantizer(key: str) -> bool:
    return key in ("quantization_config", "compression_config")  # what was read of it is plain numbers by now

"""A conversion's source with its adapters merged, and what will be written of it: shared by everything that writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.adapters.gguf_base import merge_into_gguf
from converters.adapters.merge import merge_adapters
from converters.adapters.read import Adapter, read_adapter
from converters.damage import blamed_on
from converters.plan import Plan, make_plan
from converters.quantize.importance import Importance
from converters.quantize.types import WEIGHT_TYPES, FileType, find_file_type
from converters.requantize import make_gguf_plan
from converters.sources import Source, open_source
from converters.tokenizers.read import read_vocabulary
from converters.tokenizers.vocabulary import Vocabulary, fit, vocabulary_metadata
from edgellm.errors import AdapterError

Overrides = Sequence[tuple[str, str]]
AdapterArgument = str | Path | tuple[str | Path, float]  # a folder, or a folder and how much of it


@dataclass(frozen=True)
class Inputs:
    """The opened source. files: what a file made of it depends on; settings: how the adapters are merged."""

    source: Source
    pre: str | None
    files: tuple[Path, ...]
    settings: str

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The checkpoint's own. TokenizerError where there is none that llama.cpp knows."""
        return read_vocabulary(self.source.tokenizer_folder, self.source.config, self.pre)

    @property
    def is_gguf(self) -> bool:
        """A GGUF that is converted as it is, without an adapter."""
        return self.source.kind == "gguf"


def open_inputs(
    source: str | Path,
    adapters: Sequence[AdapterArgument] = (),
    pre: str | None = None,
    merge_base: str | None = None,
) -> Inputs:
    """Open everything and check that it belongs together. ValueError, CheckpointError, AdapterError."""
    if merge_base not in (None, "fp16", "dequant"):
        raise ValueError(f"unknown merge base {merge_base!r}; choose fp16 or dequant")
    if merge_base and not adapters:
        raise ValueError("a merge base is chosen for adapters; give one or more")
    pairs = [_folder_and_weight(adapter) for adapter in adapters]
    opened = open_source(source)
    files = (opened.path, *(folder for folder, _ in pairs))
    settings = " ".join([str(merge_base), *(str(weight) for _, weight in pairs)])
    if pairs:
        found = [read_adapter(folder, weight) for folder, weight in pairs]
        with blamed_on(found[0].path, AdapterError):
            opened = _merged(opened, found, pre, merge_base)
    return Inputs(opened, pre, files, settings)


def _merged(opened: Source, found: Sequence[Adapter], pre: str | None, merge_base: str | None) -> Source:
    if opened.kind == "gguf":
        return merge_into_gguf(opened, found, pre, merge_base)
    return merge_adapters(opened, found, merge_base)


def _folder_and_weight(adapter: AdapterArgument) -> tuple[Path, float]:
    folder, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return Path(folder), weight


def plan_of(inputs: Inputs, quant: str | FileType, types: Overrides = (), importance: Importance | None = None) -> Plan:
    """What a recipe makes of the source. ValueError for unknown names, CheckpointError and its kin."""
    file_type = find_file_type(quant) if isinstance(quant, str) else quant
    overrides = [_override(pattern, type_name) for pattern, type_name in types]
    make = make_gguf_plan if inputs.is_gguf else make_plan
    with blamed_on(inputs.source.path):
        return make(inputs.source, file_type, overrides, importance)


def _override(pattern: str, type_name: str) -> tuple[re.Pattern[str], str]:
    if type_name.upper() not in WEIGHT_TYPES:
        raise ValueError(f"unknown tensor type {type_name!r}; choose one of {', '.join(WEIGHT_TYPES)}")
    try:
        return re.compile(pattern), type_name.upper()
    except re.error as exc:
        raise ValueError(f"{pattern!r} is no regular expression: {exc}") from exc


def metadata_of(inputs: Inputs, planned: Plan) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All metadata in file order, and the vocabulary's notes."""
    source = inputs.source
    general: dict[str, Any] = {
        "general.architecture": planned.architecture,
        "general.type": "model",
        "general.name": source.path.resolve().name,
        "general.file_type": planned.file_type.number,
        "general.quantization_version": 2,
    }
    if inputs.is_gguf:
        return {**general, **planned.metadata}, ()
    vocabulary = fit(inputs.vocabulary, planned.sizes["n_vocab"])
    notes = list(vocabulary.notes)
    if "default" not in vocabulary.templates:
        notes.append("the checkpoint has no chat template: a chat model will answer badly without one")
    return {**general, **planned.metadata, **vocabulary_metadata(vocabulary)}, tuple(notes)

"""The whole pipeline: open, plan, write tensor by tensor, verify, give the file its name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from converters.adapters.gguf_base import merge_into_gguf
from converters.adapters.merge import merge_adapters
from converters.adapters.read import Adapter, read_adapter
from converters.damage import blamed_on
from converters.plan import Plan, make_plan
from converters.produce import produce
from converters.quantize.types import WEIGHT_TYPES, find_file_type
from converters.receipt import Receipt, peak_memory, types_used
from converters.requantize import make_gguf_plan
from converters.sources import Source, open_source
from converters.tokenizers.read import read_vocabulary
from converters.tokenizers.vocabulary import fit, vocabulary_metadata
from converters.verify import reference_encoder, verify
from converters.writer import Writer, check_output
from edgellm.errors import AdapterError

# (tensor name, bytes written so far, bytes in all)
OnProgress = Callable[[str, int, int], None]
Overrides = Sequence[tuple[str, str]]
AdapterArgument = str | Path | tuple[str | Path, float]  # a folder, or a folder and how much of it


def plan(
    source: str | Path, *, quant: str = "Q4_K_M", types: Overrides = (), adapters: Sequence[AdapterArgument] = ()
) -> Plan:
    """What `convert` would write, from headers alone.

    quant: a recipe's name. types: (regular expression, type) pairs that overrule it for the tensors they match.
    ValueError for unknown names; CheckpointError and its kin for a checkpoint that can't be converted.
    """
    return _plan(_open(source, adapters, None), quant, types)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    quant: str = "Q4_K_M",
    types: Overrides = (),
    pre: str | None = None,
    adapters: Sequence[AdapterArgument] = (),
    merge_base: str | None = None,
    force: bool = False,
    resume: bool = False,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Receipt:
    """Convert a checkpoint folder or a GGUF to a quantized GGUF at `out`, checked before it gets that name.

    pre overrides the identification of the pre-tokenizer. force replaces an existing file. n_threads 0 = all cores.
    adapters: folders of adapters to merge first, each alone or with a weight (folder, 0.5). merge_base: "fp16" or
    "dequant", see `merge_adapters`.
    resume keeps the tensors that an interrupted conversion of the same source to the same output had finished, and
    what this one finishes if it is interrupted in turn.
    Raises CheckpointError, OutputError or ValueError; `out` is then as it was before.
    """
    started = time.perf_counter()
    out = Path(out)
    opened = _open(source, adapters, pre, merge_base)
    planned = _plan(opened, quant, types)
    check_output(out, planned.n_bytes, force)
    metadata, notes = _metadata(opened, planned, pre)
    inputs = [opened.path, *(folder for folder, _ in map(_folder_and_weight, adapters))]
    settings = " ".join([str(merge_base), *(str(weight) for _, weight in map(_folder_and_weight, adapters))])
    with Writer(
        out, planned.architecture, metadata, planned.tensors, inputs=inputs, settings=settings, resume=resume
    ) as writer:
        _write_tensors(writer, planned, n_threads, on_progress)
        partial = writer.finish()
        converted = time.perf_counter()
        folder = opened.tokenizer_folder
        reference = reference_encoder(folder) if folder.is_dir() else None
        checks = verify(partial, planned, metadata, reference)
        writer.commit()
    return Receipt(
        output=str(out),
        quant=planned.file_type.name,
        architecture=planned.architecture,
        n_parameters=planned.n_parameters,
        source_bytes=planned.source_bytes,
        output_bytes=out.stat().st_size,
        bits_per_weight=planned.bits_per_weight,
        types=types_used(planned),
        n_fallback=sum(tensor.type_name != tensor.wanted_type for tensor in planned.tensors),
        convert_seconds=converted - started,
        verify_seconds=time.perf_counter() - converted,
        peak_memory=peak_memory(),
        checks=checks,
        notes=(*planned.notes, *notes, *_resumed(writer.n_kept, len(planned.tensors), resume)),
    )


def _resumed(n_kept: int, n_tensors: int, resume: bool) -> list[str]:
    if n_kept:
        return [f"resumed: {n_kept} of {n_tensors} tensors were written before the interruption, and checked"]
    return ["nothing to resume: converted from the start"] if resume else []


def _open(
    source: str | Path, adapters: Sequence[AdapterArgument], pre: str | None, merge_base: str | None = None
) -> Source:
    if merge_base not in (None, "fp16", "dequant"):
        raise ValueError(f"unknown merge base {merge_base!r}; choose fp16 or dequant")
    if merge_base and not adapters:
        raise ValueError("a merge base is chosen for adapters; give one or more")
    opened = open_source(source)
    if not adapters:
        return opened
    found = [read_adapter(folder, weight) for folder, weight in map(_folder_and_weight, adapters)]
    with blamed_on(found[0].path, AdapterError):
        return _merged(opened, found, pre, merge_base)


def _merged(opened: Source, found: Sequence[Adapter], pre: str | None, merge_base: str | None) -> Source:
    if opened.kind == "gguf":
        return merge_into_gguf(opened, found, pre, merge_base)
    return merge_adapters(opened, found, merge_base)


def _folder_and_weight(adapter: AdapterArgument) -> tuple[Path, float]:
    folder, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return Path(folder), weight


def _plan(source: Source, quant: str, types: Overrides) -> Plan:
    file_type = find_file_type(quant)
    overrides = [_override(pattern, type_name) for pattern, type_name in types]
    make = make_gguf_plan if source.kind == "gguf" else make_plan
    with blamed_on(source.path):
        return make(source, file_type, overrides)


def _override(pattern: str, type_name: str) -> tuple[re.Pattern[str], str]:
    if type_name.upper() not in WEIGHT_TYPES:
        raise ValueError(f"unknown tensor type {type_name!r}; choose one of {', '.join(WEIGHT_TYPES)}")
    try:
        return re.compile(pattern), type_name.upper()
    except re.error as exc:
        raise ValueError(f"{pattern!r} is no regular expression: {exc}") from exc


def _metadata(source: Source, planned: Plan, pre: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All metadata in file order, and the vocabulary's notes."""
    general: dict[str, Any] = {
        "general.architecture": planned.architecture,
        "general.type": "model",
        "general.name": source.path.resolve().name,
        "general.file_type": planned.file_type.number,
        "general.quantization_version": 2,
    }
    if source.kind == "gguf":
        return {**general, **planned.metadata}, ()
    vocabulary = fit(read_vocabulary(source.tokenizer_folder, source.config, pre), planned.sizes["n_vocab"])
    notes = list(vocabulary.notes)
    if "default" not in vocabulary.templates:
        notes.append("the checkpoint has no chat template: a chat model will answer badly without one")
    return {**general, **planned.metadata, **vocabulary_metadata(vocabulary)}, tuple(notes)


def _write_tensors(writer: Writer, planned: Plan, n_threads: int, on_progress: OnProgress | None) -> None:
    done = sum(tensor.n_bytes for tensor in planned.tensors[: writer.n_kept])
    for tensor, pieces in produce(planned.tensors[writer.n_kept :], planned.sizes, n_threads):
        if on_progress:
            on_progress(tensor.name, done, planned.n_bytes)
        writer.write(tensor, pieces)
        done += tensor.n_bytes
    if on_progress:
        on_progress("", done, planned.n_bytes)

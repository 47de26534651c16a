"""The whole pipeline: open, plan, calibrate, write tensor by tensor, verify, measure, give the file its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.calibrate import calibrate as collect
from converters.calibrate import save_importance
from converters.original import Original, write_tensors
from converters.plan import Plan
from converters.prepare import AdapterArgument, Inputs, Overrides, metadata_of, open_inputs, plan_of
from converters.quality import Quality, decide, measure
from converters.quantize.importance import Importance, read_importance
from converters.receipt import Receipt, blank_entries, entries_of, peak_memory, types_used
from converters.report import tensor_errors, write_report
from converters.verify import reference_encoder, verify
from converters.writer import Writer, check_output
from edgellm.errors import EngineCrashed
from edgellm.gguf_header import vouched

# (tensor name or what is done, how much so far, how much in all)
OnProgress = Callable[[str, int, int], None]
DEFAULT_RECEIPT = "auto"


def plan(
    source: str | Path, *, quant: str = "Q4_K_M", types: Overrides = (), adapters: Sequence[AdapterArgument] = ()
) -> Plan:
    """What `convert` would write, from headers alone.

    quant: a recipe's name. types: (regular expression, type) pairs that overrule it for the tensors they match.
    ValueError for unknown names; CheckpointError and its kin for a checkpoint that can't be converted.
    """
    return plan_of(open_inputs(source, adapters), quant, types)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    quant: str = "Q4_K_M",
    types: Overrides = (),
    pre: str | None = None,
    adapters: Sequence[AdapterArgument] = (),
    merge_base: str | None = None,
    calibrate: str | Path | None = None,
    imatrix: str | Path | None = None,
    save_imatrix: str | Path | None = None,
    receipt: str | None = None,
    receipt_text: str | Path | None = None,
    report: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Receipt:
    """Convert a checkpoint folder or a GGUF to a quantized GGUF at `out`, checked before it gets that name.

    pre overrides the identification of the pre-tokenizer. force replaces an existing file. n_threads 0 = all cores.
    adapters: folders of adapters to merge first, each alone or with a weight (folder, 0.5). merge_base: "fp16" or
    "dequant", see `merge_adapters`.
    calibrate: a text, dialogues, or "self" to collect an importance matrix on; imatrix: a file that has one;
    save_imatrix: where to write it. receipt: "full" measures the result against the original, "fast" only checks it,
    "off" also leaves nothing about it in the file, "auto" (the default) is full where disk and time allow.
    receipt_text: what to measure on in place of our own text. report: an HTML page to write about it.
    resume keeps the tensors that an interrupted conversion of the same source to the same output had finished, and
    what this one finishes if it is interrupted in turn.
    Raises CheckpointError, OutputError or ValueError; `out` is then as it was before.
    """
    started = time.perf_counter()
    out = Path(out)
    inputs = open_inputs(source, adapters, pre, merge_base)
    planned = plan_of(inputs, quant, types)
    if calibrate is not None and imatrix is not None:
        raise ValueError("an importance matrix is either collected (calibrate) or read (imatrix)")
    if save_imatrix is not None and calibrate is None:
        raise ValueError("there is no importance matrix to save without a text to collect it on (calibrate)")
    check_output(out, planned.n_bytes, force)
    with Original(inputs, out, n_threads, on_progress) as original:
        level, reason = decide(receipt or DEFAULT_RECEIPT, inputs, planned, original, out)
        weighed = _importance(inputs, original, calibrate, imatrix, n_threads, on_progress)
        if weighed.matrix is not None:
            planned = plan_of(inputs, quant, types, weighed.matrix)
            if save_imatrix is not None:
                save_importance(weighed.matrix, Path(save_imatrix))
        metadata, notes = metadata_of(inputs, planned)
        metadata |= _imatrix_metadata(weighed.matrix, imatrix)
        with Writer(
            out,
            planned.architecture,
            metadata | ({} if level == "off" else blank_entries()),
            planned.tensors,
            inputs=inputs.files,
            settings=f"{inputs.settings} {_fingerprint(weighed.matrix)}",
            resume=resume,
        ) as writer:
            write_tensors(writer, planned, n_threads, on_progress)
            partial = writer.finish()
            converted = time.perf_counter()
            with vouched(partial):
                folder = inputs.source.tokenizer_folder
                reference = reference_encoder(folder) if folder.is_dir() else None
                checks = verify(partial, planned, metadata, reference, folder)
                quality = Quality(level, reason)
                if level == "full":
                    with_speed = report is not None
                    try:
                        quality, line = measure(inputs, planned, original, partial, receipt_text, reason, with_speed)
                        checks = (*checks, line)
                    except EngineCrashed as exc:  # the file passed every other check
                        if receipt == "full":
                            raise
                        quality = Quality("fast", str(exc))
                errors = tensor_errors(planned, partial) if report is not None else []
            made = Receipt(
                output=str(out),
                quant=planned.file_type.name,
                architecture=planned.architecture,
                n_parameters=planned.n_parameters,
                source_bytes=planned.source_bytes,
                output_bytes=partial.stat().st_size,
                bits_per_weight=planned.bits_per_weight,
                types=types_used(planned),
                n_fallback=sum(tensor.type_name != tensor.wanted_type for tensor in planned.tensors),
                convert_seconds=converted - started,
                verify_seconds=time.perf_counter() - converted,
                peak_memory=peak_memory(),
                checks=checks,
                notes=(*planned.notes, *notes),
                run_notes=(*weighed.run_notes, *_resumed(writer.n_kept, len(planned.tensors), resume)),
                quality=asdict(quality),
                calibration=weighed.origin,
            )
            if report is not None:
                write_report(Path(report), made, errors, weighed.matrix is not None, original.n_bytes)
            if level != "off":
                writer.amend(entries_of(made))
            original.close()
            writer.commit()
    return made


@dataclass(frozen=True)
class _Weighed:
    """The importance matrix that was asked for, a line about it, and notes on where it came from this time."""

    matrix: Importance | None = None
    origin: str = ""
    run_notes: tuple[str, ...] = ()


def _importance(
    inputs: Inputs,
    original: Original,
    text: str | Path | None,
    imatrix: str | Path | None,
    n_threads: int,
    on_progress: OnProgress | None,
) -> _Weighed:
    if imatrix is not None:
        return _Weighed(read_importance(imatrix), f"importance matrix of {Path(imatrix).name}")
    if text is None:
        return _Weighed()
    importance, cached = collect(inputs, original, text, n_threads=n_threads, on_progress=on_progress)
    n_tokens = importance.n_chunks * importance.chunk_size
    notes = ("the importance matrix is that of an earlier conversion of the same model and text",) if cached else ()
    return _Weighed(importance, f"importance matrix of {importance.dataset}, up to {n_tokens} tokens", notes)


def _imatrix_metadata(importance: Importance | None, file: str | Path | None) -> dict[str, Any]:
    """What llama-quantize writes about an importance matrix."""
    if importance is None:
        return {}
    named = {"quantize.imatrix.file": Path(file).name} if file else {}
    return {
        **named,
        "quantize.imatrix.dataset": Path(importance.dataset).name,
        "quantize.imatrix.entries_count": len(importance.entries),
        "quantize.imatrix.chunks_count": importance.n_chunks,
    }


def _fingerprint(importance: Importance | None) -> str:
    """For the identity of the job: `--resume` must not go on with another matrix."""
    if importance is None:
        return ""
    return json.dumps({name: [float(e.sums.sum()), int(e.counts.sum())] for name, e in importance.entries.items()})


def _resumed(n_kept: int, n_tensors: int, resume: bool) -> list[str]:
    if n_kept:
        return [f"resumed: {n_kept} of {n_tensors} tensors were written before the interruption, and checked"]
    return ["nothing to resume: converted from the start"] if resume else []

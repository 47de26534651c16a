"""The whole pipeline: open, plan, calibrate, write tensor by tensor, verify, measure, give the file its name."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from converters.budget.choose import Budget, budget_of
from converters.budget.meet import Met, Wish, meet
from converters.calibrate import calibrate as collect
from converters.calibrate import keep_gram, save_importance
from converters.compensation import DEFAULT_EFFORT, Compensated, Job, workplace
from converters.compensation import compensate as compensated
from converters.original import Original, write_tensors
from converters.plan import Plan
from converters.prepare import AdapterArgument, Inputs, Overrides, metadata_of, open_inputs, plan_of
from converters.quality import Decision, Quality, decide, measure
from converters.quantize.gram import DEFAULT_MEMORY
from converters.quantize.importance import Importance, check_names, read_importance
from converters.receipt import Receipt, blank_entries, entries_of, peak_memory, types_used
from converters.report import tensor_errors, write_report
from converters.verify import verify
from converters.writer import Writer, check_output
from edgellm.errors import EngineCrashed
from edgellm.gguf_header import vouched
from edgellm.measure.scoring import OnProgress
from edgellm.measure.texts import SELF

DEFAULT_QUANT = "Q4_K_M"
DEFAULT_RECEIPT = "auto"
_CHUNKS_IF_COMPENSATED = 16  # of 512 tokens: an importance matrix then matters only where nothing is compensated
_SMALL = "Q4_0"  # whose plan a budget begins with: the smallest that doesn't hurt everywhere


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
    quant: str | None = None,
    max_size: int | None = None,
    max_kld: float | None = None,
    min_speed: float | None = None,
    types: Overrides = (),
    pre: str | None = None,
    adapters: Sequence[AdapterArgument] = (),
    merge_base: str | None = None,
    calibrate: str | Path | None = None,
    imatrix: str | Path | None = None,
    save_imatrix: str | Path | None = None,
    save_gram: str | Path | None = None,
    memory: int = DEFAULT_MEMORY,
    compensate: bool | None = None,
    effort: int = DEFAULT_EFFORT,
    receipt: str | None = None,
    receipt_text: str | Path | None = None,
    report: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Receipt:
    """Convert a checkpoint folder or a GGUF to a quantized GGUF at `out`, checked before it gets that name.

    quant: a recipe's name (Q4_K_M), or "auto", which chooses for this machine's memory. max_size (bytes), max_kld
    (nats) and min_speed (tokens per second of decoding here) are budgets instead of it, alone or together: the
    tensors' types are then chosen by what measuring shows, on the text of `calibrate` or one that the model writes.
    pre overrides the identification of the pre-tokenizer. force replaces an existing file. n_threads 0 = all cores.
    adapters: folders of adapters to merge first, each alone or with a weight (folder, 0.5). merge_base: "fp16" or
    "dequant", see `merge_adapters`.
    calibrate: a text, dialogues, or "self" to collect an importance matrix on; imatrix: a file that has one;
    save_imatrix: where to write it. save_gram: a folder for the inputs' Gram matrices (`read_gram` opens it). memory:
    bytes that may hold matrices and states at a time. compensate: whether rounding errors are compensated on that text,
    by default if there is one; effort: 1 to 5, how much of it is looked at.
    receipt: "full" measures the result against the original, "fast" only checks it, "off" also leaves nothing about it
    in the file, "auto" (the default) is full where disk and time allow.
    receipt_text: what to measure on in place of our own text. report: an HTML page to write about it.
    resume keeps the tensors that an interrupted conversion of the same source to the same output had finished, and
    what this one finishes if it is interrupted in turn.
    Raises CheckpointError, OutputError, BudgetError or ValueError; `out` is then as it was before.
    """
    started = time.perf_counter()
    inputs = open_inputs(source, adapters, pre, merge_base)
    budget = budget_of(quant, max_size, max_kld, min_speed)
    planned = plan_of(inputs, _SMALL if budget else quant or DEFAULT_QUANT, types)
    text = _text(budget, calibrate, imatrix, save_imatrix is not None or save_gram is not None, compensate)
    check_output(Path(out), planned.n_bytes, force)
    with workplace(Path(out), resume), closing(Original(inputs, Path(out), n_threads, on_progress)) as original:
        decision = decide(receipt or DEFAULT_RECEIPT, inputs, planned, original, Path(out))
        n_chunks = None if save_imatrix is not None or compensate is False else _CHUNKS_IF_COMPENSATED
        weighed = _importance(inputs, original, text, n_chunks, imatrix, n_threads, on_progress)
        if weighed.matrix is not None:
            check_names(weighed.matrix, {tensor.name for tensor in planned.tensors})
            planned = plan_of(inputs, planned.file_type, types, weighed.matrix)
            if save_imatrix is not None:
                save_importance(weighed.matrix, Path(save_imatrix))
        if save_gram is not None and text is not None:
            keep_gram(inputs, original, text, Path(save_gram), memory, n_threads, on_progress)
        made, met = Compensated(planned), None
        if text is not None:
            more = dict(weighed.metadata) | (blank_entries() if decision.level != "off" else {})
            wish = Wish(budget, types, weighed.matrix, compensate is not False, more)
            task = Job(inputs, original, text, Path(out), effort, memory, resume, n_threads, on_progress)
            made, met = _quantized(task, wish, planned)
        job = _Job(inputs, made, original, weighed, Path(out), decision, receipt == "full", receipt_text, report, met)
        return _write(job, started, resume, n_threads, on_progress)


def _text(
    budget: Budget, calibrate: str | Path | None, imatrix: str | Path | None, saves: bool, compensate: bool | None
) -> str | Path | None:
    """The text that statistics are collected on; ValueError for what doesn't go together."""
    if budget and imatrix is not None:
        raise ValueError("a budget collects its own statistics: give a text (calibrate), not an importance matrix")
    if budget and calibrate is None:
        return SELF
    if calibrate is not None and imatrix is not None:
        raise ValueError("an importance matrix is either collected (calibrate) or read (imatrix)")
    if calibrate is None and saves:
        raise ValueError("there are no statistics to save without a text to collect them on (calibrate)")
    if compensate and calibrate is None:
        raise ValueError("rounding errors are compensated on a text; give one (calibrate)")
    return calibrate


def _quantized(task: Job, wish: Wish, planned: Plan) -> tuple[Compensated, Met | None]:
    """What a text makes of the plan, by a budget if there is one."""
    if wish.budget:
        return meet(task, wish, planned)
    return compensated(task, planned) if wish.compensates else Compensated(planned), None


@dataclass(frozen=True)
class _Weighed:
    """The importance matrix that was asked for, a line about it, notes on where it came from this time, and what the
    file says about it.
    """

    matrix: Importance | None = None
    origin: str = ""
    run_notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What is written of what, and how it is judged. must_measure: that it was asked for."""

    inputs: Inputs
    compensated: Compensated
    original: Original
    weighed: _Weighed
    out: Path
    decision: Decision
    must_measure: bool
    receipt_text: str | Path | None
    report: str | Path | None
    met: Met | None = None

    @property
    def planned(self) -> Plan:
        return self.compensated.planned


def _write(job: _Job, started: float, resume: bool, n_threads: int, on_progress: OnProgress | None) -> Receipt:
    """The file, checked and measured before it gets its name."""
    inputs, planned = job.inputs, job.planned
    metadata, notes = metadata_of(inputs, planned)
    metadata |= job.weighed.metadata
    has_receipt = job.decision.level != "off"
    with Writer(
        job.out,
        planned.architecture,
        metadata | (blank_entries() if has_receipt else {}),
        planned.tensors,
        inputs=inputs.files,
        settings=f"{inputs.settings} {_fingerprint(job.weighed.matrix)} {job.compensated.key}",
        resume=resume,
    ) as writer:
        write_tensors(writer, planned, n_threads, on_progress)
        partial = writer.finish()
        converted = time.perf_counter()
        with vouched(partial):
            checks = verify(partial, planned, metadata, inputs.source.tokenizer_folder)
            quality, line = _measured(job, partial)
            errors = tensor_errors(planned, partial) if job.report is not None else []
        made = Receipt(
            output=str(job.out),
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
            checks=(*checks, *line),
            notes=(*planned.notes, *notes, *job.compensated.notes),
            run_notes=(*job.weighed.run_notes, *_resumed(writer.n_kept, len(planned.tensors), resume)),
            quality=asdict(quality),
            calibration="; ".join(filter(None, (job.weighed.origin, job.compensated.line))),
            budget=job.met.as_dict() if job.met else None,
        )
        if job.report is not None:
            write_report(Path(job.report), made, errors, job.weighed.matrix is not None, job.original.n_bytes)
        if has_receipt:
            writer.amend(entries_of(made))
        job.original.close()
        writer.commit()
    return made


def _measured(job: _Job, partial: Path) -> tuple[Quality, tuple[str, ...]]:
    """The quality as far as it was decided to measure it, and the line about it if it was."""
    if not job.decision.checks_function:
        return Quality(job.decision.level, job.decision.reason), ()
    with_speed = job.report is not None
    try:
        quality, line = measure(
            job.inputs, job.planned, job.original, partial, job.receipt_text, job.decision, with_speed
        )
    except EngineCrashed as exc:  # the file passed every other check
        if job.must_measure:
            raise
        return Quality("fast", str(exc)), ()
    return quality, (line,)


def _importance(
    inputs: Inputs,
    original: Original,
    text: str | Path | None,
    n_chunks: int | None,
    imatrix: str | Path | None,
    n_threads: int,
    on_progress: OnProgress | None,
) -> _Weighed:
    if imatrix is not None:
        matrix = read_importance(imatrix)
        return _Weighed(matrix, f"importance matrix of {Path(imatrix).name}", (), _imatrix_metadata(matrix, imatrix))
    if text is None:
        return _Weighed()
    importance, cached = collect(
        inputs, original, text, n_chunks=n_chunks, n_threads=n_threads, on_progress=on_progress
    )
    n_tokens = importance.n_chunks * importance.chunk_size
    notes = ("the importance matrix is that of an earlier conversion of the same model and text",) if cached else ()
    origin = f"importance matrix of {importance.dataset}, up to {n_tokens} tokens"
    return _Weighed(importance, origin, notes, _imatrix_metadata(importance, None))


def _imatrix_metadata(importance: Importance, file: str | Path | None) -> dict[str, Any]:
    """What llama-quantize writes about an importance matrix."""
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

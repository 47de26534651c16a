"""The compensated part of a conversion: what is quantized so, on which tokens, and what a resumed one finds done."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converters.calibrate import calibration_samples, spread, statistics_key
from converters.layerwise import Layerwise, compensate_model, head_name
from converters.original import Original
from converters.plan import Plan, PlannedTensor
from converters.prepare import Inputs
from converters.produce import load_whole
from converters.quantize.compensate import can_compensate
from converters.quantize.recipes import layer_of
from converters.slices import block_count, stands_alone
from converters.writer import RESUMABLE
from edgellm import __version__
from edgellm.errors import OutputError
from edgellm.gguf_header import GGUFHeader, read_header
from edgellm.measure.scoring import OnProgress, Sample

EFFORTS = range(1, 6)
DEFAULT_EFFORT = 3
_VERSION = 2  # of the method: work of another one isn't resumed
_CHUNKS_AT_1 = 8  # of 512 tokens; twice as many with each step of effort
_FEW_TOKENS = 4096
_INPUT_BYTES = 4_000_000_000  # of the unquantized model's inputs on disk at a time


@dataclass(frozen=True)
class Compensated:
    """planned: with the bytes of its compensated tensors. line: what was done; notes on what wasn't. key: another one
    means other bytes.
    """

    planned: Plan
    line: str = ""
    notes: tuple[str, ...] = ()
    key: str = ""


def work_folder(out: Path) -> Path:
    """Where the compensated bytes wait until they are all there."""
    return out.with_name(f"{out.name}.compensated.partial")


@dataclass(frozen=True)
class Job:
    """A conversion with a text. effort: 1 to 5, each looks at twice the tokens. memory: bytes for matrices and states.
    resume: goes on with what an interrupted one has finished.
    """

    inputs: Inputs
    original: Original
    text: str | Path
    out: Path
    effort: int
    memory: int
    resume: bool = False
    n_threads: int = 0
    on_progress: OnProgress | None = None

    def samples(self) -> list[Sample]:
        """The whole text."""
        return calibration_samples(self.original, self.text, self.on_progress)


def compensate(job: Job, planned: Plan, samples: Sequence[Sample] | None = None) -> Compensated:
    """Quantize what can be compensated, to files in `work_folder`. samples: of the text, if not all of it.

    ValueError for another effort; OutputError where the folder beside the output has no room.
    """
    if job.effort not in EFFORTS:
        raise ValueError(f"effort is {job.effort}; choose {EFFORTS[0]} (quick) to {EFFORTS[-1]} (thorough)")
    header = read_header(job.original.path)
    head = head_name(header)
    targets = {tensor.name: tensor for tensor in planned.tensors if _is_target(tensor, head)}
    if not targets:
        return Compensated(planned)
    tokens = _tokens(job.samples() if samples is None else samples, job.effort, header, job.memory)
    folder = work_folder(job.out)
    types = json.dumps({name: target.type_name for name, target in targets.items()})
    key = f"{_VERSION} {__version__} {statistics_key(job.inputs, job.text)} {job.memory} {tokens} {types}"
    key = hashlib.sha256(key.encode()).hexdigest()
    try:
        _open(folder, key, job.resume)
        work = Layerwise(
            header, targets, lambda tensor: load_whole(tensor, planned.sizes), folder, n_threads=job.n_threads
        )
        work.max_width = max(256, min(work.max_width, math.isqrt(job.memory // 80) // 256 * 256))
        work.from_start = not stands_alone(header, tokens[0], folder, job.n_threads)
        if work.from_start:
            n_columns = sum(target.shape[-1] for target in targets.values())
            per_block = 4 * np.size(tokens) * n_columns // block_count(header)
            work.n_together = max(1, _INPUT_BYTES // max(1, per_block))
        compensate_model(work, tokens, job.on_progress)
    except OSError as exc:
        raise OutputError(f"cannot keep what is quantized in {folder}: {exc.strerror or exc}; make room there") from exc
    done = [
        replace(tensor, packed=path) if (path := work.packed_path(tensor.name)).exists() else tensor
        for tensor in planned.tensors
    ]
    n_done = sum(tensor.packed is not None for tensor in done)
    line = f"rounding errors of {n_done} tensors compensated on {np.size(tokens)} tokens of {Path(job.text).name}"
    notes = []
    if np.size(tokens) < _FEW_TOKENS:
        notes.append(f"{np.size(tokens)} tokens are few to calibrate on: other texts may suffer; give some thousands")
    if n_plain := work.n_plain():
        notes.append(f"{n_plain} experts saw too few tokens to be compensated; calibrate on more text, or other text")
    return Compensated(replace(planned, tensors=tuple(done)), line, tuple(notes), key)


@contextmanager
def workplace(out: Path, resume: bool) -> Iterator[None]:
    """Within it `work_folder` may exist. With `resume` an interruption leaves it for the next attempt."""
    try:
        yield
    except RESUMABLE:
        if not resume:
            shutil.rmtree(work_folder(out), ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(work_folder(out), ignore_errors=True)
        raise
    shutil.rmtree(work_folder(out), ignore_errors=True)


def _is_target(tensor: PlannedTensor, head: str) -> bool:
    has_inputs = layer_of(tensor.name) >= 0 or tensor.name == head
    return has_inputs and tensor.computed is None and can_compensate(tensor.type_name)


def _tokens(samples: Sequence[Sample], effort: int, header: GGUFHeader, memory: int) -> list[list[int]]:
    """Equally long samples from all over the text, as many as the effort asks and the memory holds."""
    length = max(len(sample.tokens) for sample in samples)
    whole = [sample for sample in samples if len(sample.tokens) == length]
    widest = max(info.shape[-1] for name, info in header.tensors.items() if layer_of(name) >= 0)
    n_embd = header.tensors["token_embd.weight"].shape[-1]
    per_token = 4 * (3 * widest + 8 * n_embd)  # of the graph's states, roughly
    n = min(len(whole), _CHUNKS_AT_1 << (effort - 1), 256, max(1, memory // 2 // (per_token * length)))
    return [sample.tokens for sample in spread(whole, n)]


def _open(folder: Path, key: str, resume: bool) -> None:
    """A folder for this very job; what an interrupted one of the same key has finished is kept."""
    written = folder / "job"
    with suppress(OSError):
        if resume and written.read_text(encoding="utf-8") == key:
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    written.write_text(key, encoding="utf-8")

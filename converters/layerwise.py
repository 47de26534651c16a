"""Error-compensated quantization of a whole model, layer after layer.

Two streams of hidden states go through the blocks: the unquantized model's, and one through what is quantized already.
The second is stopped before each group of weights with the same inputs (q, k and v; then the output projection; …):
the group is fitted to what comes in there, takes its quantized values, and the evaluation goes on with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.plan import PlannedTensor
from converters.quantize.compensate import DAMPING, HEAD_DAMPING, Fit, compensated, fit, unpacked
from converters.quantize.grids import Array, Bytes
from converters.quantize.recipes import layer_of
from converters.quantize.types import TYPE_IDS
from converters.slices import block_count, write_slice
from edgellm.errors import CheckpointError
from edgellm.gguf_header import GGUFHeader
from edgellm.measure.scoring import OnProgress
from edgellm.native.ggml import quantize_rows
from edgellm.native.observe import InputWatch
from edgellm.native.sweep import Tokens, sweep

Experts = NDArray[np.int32]

_MADE_UP = 0.5  # of what is missing from the residual stream; all of it fits the text at hand too closely (measured)
_MIN_TOKENS = 0.25  # of the columns; an expert that saw fewer is rounded as ever


@dataclass
class Layerwise:
    """What the steps share.

    targets: what is quantized, by its name. read: a tensor's weights, float32. folder: for slices, inputs and the
    finished bytes. n_together: blocks that are run at once. from_start: each time from the first block on, for a family
    whose blocks don't stand alone. max_width: wider inputs are taken apart, as the work grows with the cube.
    """

    header: GGUFHeader
    targets: Mapping[str, PlannedTensor]
    read: Callable[[PlannedTensor], Array]
    folder: Path
    n_together: int = 1
    from_start: bool = False
    n_threads: int = 0
    max_width: int = 8192

    def n_plain(self) -> int:
        """How many experts too few tokens reached: they are rounded as ever."""
        return sum(json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("*.plain.json"))

    def packed_path(self, name: str) -> Path:
        """Where a target's bytes are once it is quantized: uint8 (rows, bytes of a row) as numpy saves it."""
        return self.folder / f"{name}.npy"


@dataclass
class _Pass:
    """Some blocks' way through llama.cpp. run: the blocks in the slice; fitted: those quantized this time; is_last: the
    head's turn comes after them. inputs: of
    the first of the weights that share them, in the unquantized model, float32 (tokens, columns); none for experts,
    which other tokens may reach in the quantized one. added: weight → what is added to its product, by its name in the
    graph, and its values in the unquantized model, float32 (tokens, rows).
    """

    run: range
    fitted: range
    is_last: bool = False
    inputs: dict[str, Array] = field(default_factory=dict)
    added: dict[str, tuple[str, Array]] = field(default_factory=dict)

    def name(self, in_slice: str) -> str:
        """A weight's name in the whole model."""
        i = layer_of(in_slice)
        return in_slice.replace(f"blk.{i}.", f"blk.{i + self.run.start}.", 1)

    @property
    def last(self) -> str:
        """What the graph calls the states that leave the last block; nothing where it goes on to the head."""
        return "" if self.is_last else f"l_out-{self.fitted[-1] - self.run.start}"


def compensate_model(job: Layerwise, samples: Sequence[Sequence[int]], on_progress: OnProgress | None = None) -> None:
    """Quantize the targets to files of the folder: those in blocks, and the head. samples: token ids, equally long."""
    used, places = np.unique(np.array(samples, np.int32), return_inverse=True)
    tokens: Tokens = places.reshape(len(samples), -1).tolist()
    exact: Tokens | Array = tokens
    rounded: Tokens | Array = tokens
    n_blocks = block_count(job.header)
    for start in range(0, n_blocks, job.n_together):
        if on_progress:
            on_progress("compensating", start, n_blocks)
        fitted = range(start, min(start + job.n_together, n_blocks))
        is_last = fitted.stop == n_blocks and head_name(job.header) in job.targets
        now = _Pass(range(n_blocks) if job.from_start else fitted, fitted, is_last)
        path = job.folder / "slice.gguf"
        earlier = {n: (t.type_name, np.load(job.packed_path(n))) for n, t in job.targets.items() if _is_before(n, now)}
        write_slice(path, job.header, now.run, used, earlier, job.targets)
        after = _see_exact(job, now, path, exact), _fit_on(job, now, path, rounded)
        if not job.from_start:
            exact, rounded = after
    for left in job.folder.glob("inputs-*.npy"):
        left.unlink()


def head_name(header: GGUFHeader) -> str:
    """The weight that makes the logits; where it is token_embd, its rows are the tokens' embeddings too."""
    return "output.weight" if "output.weight" in header.tensors else "token_embd.weight"


def _is_before(name: str, now: _Pass) -> bool:
    return now.run.start <= layer_of(name) < now.fitted.start


def _see_exact(job: Layerwise, now: _Pass, path: Path, inputs: Tokens | Array) -> Array:
    """Run the unquantized blocks and note what goes into their weights. Returns the states that leave them."""
    last_source = 0

    def see(in_slice: str, source: int, rows: Array, experts: Experts | None) -> None:
        nonlocal last_source
        if source == last_source or experts is not None:
            return
        last_source = source
        now.inputs[now.name(in_slice)] = keep(f"inputs-{len(now.inputs)}", rows.reshape(-1, rows.shape[-1]))

    def see_added(in_slice: str, name: str, rows: Array) -> None:
        now.added[now.name(in_slice)] = name, keep(f"inputs-added-{len(now.added)}", rows)

    def keep(what: str, rows: Array) -> Array:
        file = job.folder / f"{what}.npy"
        file.unlink(missing_ok=True)  # the one of the blocks before may still be mapped
        np.save(file, rows)
        kept: Array = np.load(file, mmap_mode="r")
        return kept

    watch = InputWatch(_wanted(job, now), see, last=now.last, on_added=see_added)
    return _swept(job, now, path, inputs, watch)


def _fit_on(job: Layerwise, now: _Pass, path: Path, inputs: Tokens | Array) -> Array:
    """Run the blocks on the quantized stream, and quantize each weight just before it is used."""
    shared: tuple[int, list[Fit]] = 0, []

    def see(in_slice: str, source: int, rows: Array, experts: Experts | None) -> None:
        nonlocal shared
        target = job.targets[now.name(in_slice)]
        if (experts is None) != (len(target.shape) == 2):
            return
        if not job.packed_path(target.name).exists():
            if experts is not None:
                packed = _expert_bytes(job, target, rows, experts)
            else:
                if shared[0] != source:
                    missing = _missing(now, target.name, watch)
                    x = rows.reshape(-1, rows.shape[-1])
                    if target.name == "token_embd.weight":  # moved, its rows would be other embeddings
                        shared = source, _fits(job, x, None, damping=HEAD_DAMPING)
                    else:
                        shared = source, _fits(job, x, now.inputs.get(target.name), missing)
                packed = _bytes(job, target, shared[1])
            _save(job.packed_path(target.name), packed)
        if layer_of(target.name) >= 0:
            watch.replace(in_slice, unpacked(target.type_name, np.load(job.packed_path(target.name)), target.shape[-1]))

    watch = InputWatch(_wanted(job, now), see, last=now.last, step_by_step=True)
    return _swept(job, now, path, inputs, watch)


def _wanted(job: Layerwise, now: _Pass) -> Callable[[str], bool]:
    def is_wanted(in_slice: str) -> bool:
        name = now.name(in_slice)
        return name in job.targets and (layer_of(name) in now.fitted or (layer_of(name) < 0 and now.is_last))

    return is_wanted


def _swept(job: Layerwise, now: _Pass, path: Path, inputs: Tokens | Array, watch: InputWatch) -> Array:
    sweep(path, inputs, watch, n_threads=job.n_threads)
    if now.is_last:
        return np.empty(0, np.float32)
    if watch.last_values is None:
        raise CheckpointError(f"llama.cpp's graph of {job.header.architecture} has no {now.last}: please report this")
    return watch.last_values.reshape(len(inputs), len(inputs[0]), -1)


def _missing(now: _Pass, name: str, watch: InputWatch) -> Array | None:
    """How far what will be added to a weight's product is from what it is in the unquantized model."""
    in_graph, exact = now.added.get(name, ("", None))
    found = watch.values(in_graph)
    return None if exact is None or found is None or found.shape != exact.shape else exact - found


def _fits(
    job: Layerwise, rows: Array, exact: Array | None, missing: Array | None = None, damping: float = DAMPING
) -> list[Fit]:
    """How to round weights with these inputs, float32 (tokens, columns), for each stretch of columns; `missing` of the
    outputs is made up for besides, each stretch making up for its share.
    """
    fits = []
    stretches = _stretches(rows.shape[1], job.max_width)
    for columns in stretches:
        x = np.ascontiguousarray(rows[:, columns])
        cross = None if exact is None else exact[:, columns].T @ x / np.float32(len(x))
        extra = None if missing is None else missing.T @ x * np.float32(_MADE_UP / len(x) / len(stretches))
        fits.append(fit(x.T @ x / np.float32(len(x)), cross, extra, damping))
    return fits


def _stretches(n_columns: int, max_width: int) -> list[slice]:
    """Equal ones, as few as may be, each a whole number of a type's blocks."""
    n = -(-n_columns // max_width)
    width = -(-n_columns // (256 * n)) * 256
    return [slice(start, min(start + width, n_columns)) for start in range(0, n_columns, width)]


def _bytes(job: Layerwise, target: PlannedTensor, fits: list[Fit]) -> Bytes:
    weights = job.read(target)
    stretches = zip(_stretches(weights.shape[1], job.max_width), fits, strict=True)
    return np.concatenate(
        [compensated(weights[:, columns], target.type_name, f, job.n_threads) for columns, f in stretches], axis=1
    )


def _expert_bytes(job: Layerwise, target: PlannedTensor, rows: Array, experts: Experts) -> Bytes:
    """Each expert by the tokens it gets in the quantized model; rounded as ever where they are too few."""
    weights, width = job.read(target), target.shape[-1]
    rows, of_row = rows.reshape(-1, width), experts.reshape(-1)
    packed, n_plain = [], 0
    for e in range(target.shape[0]):
        chosen = rows[of_row == e]
        if len(chosen) < _MIN_TOKENS * width:
            n_plain += 1
            importance = None if target.importance is None else target.importance[e]
            ggml_type = TYPE_IDS[target.type_name]
            packed.append(quantize_rows(weights[e], ggml_type, importance=importance, n_threads=job.n_threads))
            continue
        fits = _fits(job, chosen, None)
        stretches = zip(_stretches(width, job.max_width), fits, strict=True)
        parts = [compensated(weights[e][:, c], target.type_name, f, job.n_threads) for c, f in stretches]
        packed.append(np.concatenate(parts, axis=1))
    if n_plain:
        (job.folder / f"{target.name}.plain.json").write_text(json.dumps(n_plain), encoding="utf-8")
    return np.stack(packed)


def _save(path: Path, packed: Bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, packed)
    os.replace(partial, path)

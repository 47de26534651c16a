"""Input Gram matrices H = E[x xᵀ] of every weight's inputs, in bounded memory and kept on disk.

What error-compensating quantizers need. Weights that share inputs (q, k and v; gate and up) share a matrix. Where all
matrices together exceed the memory, groups of weights are collected in several passes over the text. Inputs wider than
MAX_WIDTH get the diagonal blocks only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.config import DEFAULT_N_BATCH
from edgellm.errors import CheckpointError
from edgellm.measure.scoring import OnProgress, Sample
from edgellm.measure.watching import block_shapes, by_expert, head_shape, n_matrices, watch_inputs

Array = NDArray[np.float32]

MAX_WIDTH = 16384  # a matrix of 1 GB
DEFAULT_MEMORY = 8_000_000_000
_INDEX = "gram.json"
_N_PROBED = 16  # tokens that show which weights share inputs


@dataclass(frozen=True)
class Gram:
    """Matrices in a folder. inputs: weight → the weight whose matrix it shares. widths: of each such weight's blocks.
    counts: tokens of each matrix (experts: of each expert).
    """

    folder: Path
    inputs: Mapping[str, str]
    widths: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, tuple[int, ...]]

    def blocks(self, name: str) -> list[Array]:
        """H of a weight's inputs: for each diagonal block float32 (matrices, width, width), mapped from disk.

        One matrix, or one an expert; an expert that no token reached has zeros.
        """
        shared = self.inputs[name]
        return [np.load(_file(self.folder, shared, b), mmap_mode="r") for b in range(len(self.widths[shared]))]

    def matrix(self, name: str) -> Array:
        """H of a weight without experts, float32 (columns, columns); beyond the blocks zero."""
        blocks = [block[0] for block in self.blocks(name)]
        whole = np.zeros((sum(map(len, blocks)),) * 2, np.float32)
        at = 0
        for block in blocks:
            whole[at : at + len(block), at : at + len(block)] = block
            at += len(block)
        return whole


def collect_gram(
    model: Path,
    samples: Sequence[Sample],
    folder: Path,
    *,
    memory: int = DEFAULT_MEMORY,
    with_head: bool = False,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Gram:
    """Run the model over the samples, as often as `memory` (bytes for matrices and inputs) asks, and leave H in
    `folder`. with_head: also of the weight that makes the logits, which is token_embd where there is no other.

    CheckpointError where one matrix alone is larger than the memory. The folder must be empty or ours.
    """
    shapes = block_shapes(model) | (head_shape(model) if with_head else {})
    inputs = _shared_inputs(model, samples[0], set(shapes), n_threads)
    widths = {shared: _widths(shapes[shared][-1]) for shared in dict.fromkeys(inputs.values())}
    n_of = {shared: n_matrices(shapes[shared]) for shared in widths}
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, tuple[int, ...]] = {}
    n_bytes = {s: 4 * (n_of[s] * sum(w * w for w in widths[s]) + DEFAULT_N_BATCH * sum(widths[s])) for s in widths}
    passes = _passes(n_bytes, memory)
    for number, names in enumerate(passes):
        sums = {s: [np.zeros((n_of[s], w, w), np.float32) for w in widths[s]] for s in names}
        n_rows = {s: np.zeros(n_of[s], np.int64) for s in names}
        _one_pass(model, samples, sums, n_rows, n_threads, _of_all(on_progress, number, len(passes)))
        for shared in names:
            for b, block in enumerate(sums[shared]):
                block /= np.maximum(n_rows[shared], 1)[:, None, None]
                np.save(_file(folder, shared, b), block)
            counts[shared] = tuple(int(n) for n in n_rows[shared])
    index = {"inputs": inputs, "widths": widths, "counts": counts}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return read_gram(folder)


def read_gram(folder: Path) -> Gram:
    """What `collect_gram` left in a folder; CheckpointError where it isn't whole."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        widths, counts = ({name: tuple(values) for name, values in index[key].items()} for key in ("widths", "counts"))
        return Gram(folder, index["inputs"], widths, counts)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise CheckpointError(f"{folder} has no whole set of Gram matrices; collect them again") from exc


def _shared_inputs(model: Path, sample: Sample, weights: set[str], n_threads: int) -> dict[str, str]:
    """Weight → the first one with the same inputs, seen on a few tokens."""
    shared: dict[str, str] = {}
    last = (0, "")

    def see(name: str, source: int, inputs: Array, experts: NDArray[np.int32] | None) -> None:
        nonlocal last
        last = last if last[0] == source else (source, name)
        shared.setdefault(name, last[1])

    few = Sample(sample.tokens[:_N_PROBED], range(1))
    watch_inputs(model, [few], weights, see, n_threads=n_threads)
    return shared


def _one_pass(
    model: Path,
    samples: Sequence[Sample],
    sums: Mapping[str, list[Array]],
    n_rows: Mapping[str, NDArray[np.int64]],
    n_threads: int,
    on_progress: OnProgress | None,
) -> None:
    kept: list[tuple[str, Array, NDArray[np.int32] | None]] = []

    def keep(name: str, source: int, inputs: Array, experts: NDArray[np.int32] | None) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).copy()
        kept.append((name, rows, None if experts is None else experts.reshape(-1).copy()))

    def add_kept() -> None:
        for name, rows, of_row in kept:
            for e, chosen in ((0, rows),) if of_row is None else by_expert(rows, of_row):
                _add(sums[name], e, chosen)
                n_rows[name][e] += len(chosen)
        kept.clear()

    watch_inputs(model, samples, set(sums), keep, after_batch=add_kept, n_threads=n_threads, on_progress=on_progress)


def _add(blocks: list[Array], k: int, rows: Array) -> None:
    at = 0
    for block in blocks:
        width = block.shape[-1]
        part = rows if width == rows.shape[1] else np.ascontiguousarray(rows[:, at : at + width])
        block[k] += part.T @ part  # numpy computes one triangle of it
        at += width


def _widths(n_columns: int) -> tuple[int, ...]:
    """Blocks of equal width, or nearly so."""
    n_blocks = -(-n_columns // MAX_WIDTH)
    edges = [n_columns * b // n_blocks for b in range(n_blocks + 1)]
    return tuple(end - start for start, end in pairwise(edges))


def _passes(n_bytes: Mapping[str, int], memory: int) -> list[list[str]]:
    """The matrices in order, in as few groups as fit the memory."""
    passes: list[list[str]] = []
    room = 0
    for name, size in n_bytes.items():
        if size > memory:
            raise CheckpointError(
                f"the Gram matrix of {name} takes {size / 1e9:.1f} GB, more than the {memory / 1e9:.1f} GB allowed"
            )
        if size > room:
            passes.append([])
            room = memory
        passes[-1].append(name)
        room -= size
    return passes


def _of_all(on_progress: OnProgress | None, number: int, n_passes: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda what, done, total: on_progress(what, number * total + done, n_passes * total)


def _file(folder: Path, name: str, block: int) -> Path:
    return folder / f"{name}.{block}.npy"

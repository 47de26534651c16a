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
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.config import DEFAULT_N_BATCH
from edgellm.errors import CheckpointError
from edgellm.gguf_header import read_header
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
    n_kept = {s: sum(widths[s]) * _rows_kept(model, samples, n_of[s]) for s in widths}
    n_floats = {s: n_of[s] * sum(w * w for w in widths[s]) + n_kept[s] for s in widths}
    product = 4 * max(w * w for ws in widths.values() for w in ws)  # one is made at a time, then added
    passes = _passes({s: 4 * n for s, n in n_floats.items()}, memory, product)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, tuple[int, ...]] = {}
    for number, names in enumerate(passes):
        sums = _zeros({s: [(n_of[s], w, w) for w in widths[s]] for s in names})
        n_rows = {s: np.zeros(n_of[s], np.int64) for s in names}
        room = np.empty(sum(n_kept[s] for s in names), np.float32)
        _one_pass(model, samples, sums, n_rows, room, n_threads, _of_all(on_progress, number, len(passes)))
        for shared in names:
            _save_means(folder, shared, sums[shared], n_rows[shared])
            counts[shared] = tuple(int(n) for n in n_rows[shared])
        del sums, room  # before the next pass makes its own
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


def _rows_kept(model: Path, samples: Sequence[Sample], n_experts: int) -> int:
    """Rows of inputs that a batch brings at most: experts get those of a token as often as it uses experts."""
    n_tokens = min(DEFAULT_N_BATCH, max(len(sample.tokens) for sample in samples))
    used = (v for key, v in read_header(model).metadata.items() if key.endswith(".expert_used_count"))
    return n_tokens * (int(next(used, 1)) if n_experts > 1 else 1)


def _zeros(shapes: Mapping[str, list[tuple[int, int, int]]]) -> dict[str, list[Array]]:
    """Arrays in one piece of memory, which goes back to the system as a whole: small ones leave holes behind."""
    whole = np.zeros(sum(prod(shape) for of_name in shapes.values() for shape in of_name), np.float32)
    arrays: dict[str, list[Array]] = {}
    at = 0
    for name, of_name in shapes.items():
        for shape in of_name:
            arrays.setdefault(name, []).append(whole[at : at + prod(shape)].reshape(shape))
            at += prod(shape)
    return arrays


def _one_pass(
    model: Path,
    samples: Sequence[Sample],
    sums: Mapping[str, list[Array]],
    n_rows: Mapping[str, NDArray[np.int64]],
    room: Array,
    n_threads: int,
    on_progress: OnProgress | None,
) -> None:
    """Add to sums and n_rows. room: where a batch's inputs are kept until it is through."""
    kept: list[tuple[str, Array, NDArray[np.int32] | None]] = []
    n_used = 0

    def keep(name: str, source: int, inputs: Array, experts: NDArray[np.int32] | None) -> None:
        nonlocal n_used
        if n_used + inputs.size > len(room):
            add_kept()
        place = room[n_used : n_used + inputs.size]
        n_used += inputs.size
        np.copyto(place.reshape(inputs.shape), inputs)
        kept.append(
            (name, place.reshape(-1, inputs.shape[-1]), None if experts is None else experts.reshape(-1).copy())
        )

    def add_kept() -> None:
        nonlocal n_used
        for name, rows, of_row in kept:
            for e, chosen in ((0, rows),) if of_row is None else by_expert(rows, of_row):
                _add(sums[name], e, chosen)
                n_rows[name][e] += len(chosen)
        kept.clear()
        n_used = 0

    watch_inputs(model, samples, set(sums), keep, after_batch=add_kept, n_threads=n_threads, on_progress=on_progress)


def _save_means(folder: Path, shared: str, blocks: list[Array], n_rows: NDArray[np.int64]) -> None:
    for b, block in enumerate(blocks):
        block /= np.maximum(n_rows, 1)[:, None, None]
        np.save(_file(folder, shared, b), block)


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


def _passes(n_bytes: Mapping[str, int], memory: int, product: int) -> list[list[str]]:
    """The matrices in order, in as few groups as fit the memory beside a product of `product` bytes."""
    passes: list[list[str]] = []
    room = 0
    for name, size in n_bytes.items():
        if size + product > memory:
            raise CheckpointError(
                f"the Gram matrix of {name} takes {(size + product) / 1e9:.1f} GB to collect, more than the "
                f"{memory / 1e9:.1f} GB allowed"
            )
        if size > room:
            passes.append([])
            room = memory - product
        passes[-1].append(name)
        room -= size
    return passes


def _of_all(on_progress: OnProgress | None, number: int, n_passes: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda what, done, total: on_progress(what, number * total + done, n_passes * total)


def _file(folder: Path, name: str, block: int) -> Path:
    return folder / f"{name}.{block}.npy"

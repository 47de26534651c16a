"""The importance matrix: mean squared input of every column of a weight, which the quantizers weigh errors with.

Collected as llama-imatrix does, over all tokens, and kept in its file format, both ways; its older .dat is read too.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from edgellm.errors import CheckpointError, ModelFileError
from edgellm.gguf_header import GGUFHeader, read_header
from edgellm.measure.scoring import OnProgress, Sample
from edgellm.measure.watching import block_shapes, by_expert, n_matrices, watch_inputs

_SUM, _COUNT = ".in_sum2", ".counts"


@dataclass
class Entry:
    """sums: float64 (matrices, columns), of squared inputs over `counts` (matrices,) rows. One matrix, or experts."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    def means(self) -> NDArray[np.float32]:
        """float32 (matrices, columns); 1 for an expert that no token reached."""
        sums, counts = self.sums.astype(np.float32), self.counts.astype(np.float32)[:, None]
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True)
class Importance:
    """Entries by the weight's name in the GGUF. dataset: what it was collected on, a name for people."""

    entries: Mapping[str, Entry]
    dataset: str
    n_chunks: int
    chunk_size: int

    def of(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """Means for a tensor of `shape`, None where there are none; CheckpointError where they don't fit it."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.shape != (n_matrices(shape), shape[-1]):
            found = " × ".join(map(str, entry.sums.shape))
            raise CheckpointError(
                f"the importance matrix has {found} columns for {name} of shape {list(shape)}; it is of another model"
            )
        return entry.means()


def check_names(importance: Importance, names: Collection[str]) -> None:
    """CheckpointError where it has blocks' weights that a model with these tensors hasn't: those of the model would be
    rounded without it, and nobody would know.
    """
    strange = sorted(name for name in importance.entries if name.startswith("blk.") and name not in names)
    if strange:
        raise CheckpointError(
            f"the importance matrix is of another model: it has {strange[0]}, which this one hasn't; use its own"
        )


def collect_importance(
    model: Path,
    samples: Sequence[Sample],
    dataset: str,
    *,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Importance:
    """Run the model over the samples and sum up the squared inputs of every weight of its blocks."""
    entries: dict[str, Entry] = {}
    shapes = block_shapes(model)
    last: tuple[int, NDArray[np.float64]] = (0, np.empty(0))

    def add(name: str, source: int, inputs: NDArray[np.float32], experts: NDArray[np.int32] | None) -> None:
        nonlocal last
        entry = entries.get(name)
        if entry is None:
            n = n_matrices(shapes[name])
            entry = entries[name] = Entry(np.zeros((n, inputs.shape[-1])), np.zeros(n, dtype=np.int64))
        if experts is None:
            if last[0] != source:
                last = source, np.einsum("mrc,mrc->mc", inputs, inputs).astype(np.float64)
            per_matrix = last[1].reshape(-1, len(entry.sums), inputs.shape[-1])
            entry.sums += per_matrix.sum(axis=0)
            entry.counts += inputs.shape[0] * inputs.shape[1] // len(entry.sums)
        else:
            for e, chosen in by_expert(inputs.reshape(-1, inputs.shape[-1]), experts.reshape(-1)):
                entry.sums[e] += np.einsum("rc,rc->c", chosen, chosen)
                entry.counts[e] += len(chosen)

    watch_inputs(model, samples, set(shapes), add, n_threads=n_threads, on_progress=on_progress)
    if not all(np.isfinite(entry.sums).all() for entry in entries.values()):
        raise CheckpointError("the model's activations are not finite on this text; its weights are damaged")
    return Importance(entries, dataset, len(samples), max(len(sample.tokens) for sample in samples))


def write_importance(importance: Importance, path: Path) -> None:
    """A GGUF as llama-imatrix writes it. OSError where that fails."""
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [importance.dataset])
    writer.add_uint32("imatrix.chunk_count", importance.n_chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    for name, entry in sorted(importance.entries.items()):
        writer.add_tensor(name + _SUM, entry.sums.astype(np.float32))
        writer.add_tensor(name + _COUNT, entry.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(path: str | Path) -> Importance:
    """An importance matrix of llama.cpp's or ours, GGUF or .dat. CheckpointError: no such file, or not one."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_dat(path)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc
    except ModelFileError as exc:
        raise CheckpointError(str(exc)) from exc
    if not found.entries or not all(np.isfinite(entry.sums).all() for entry in found.entries.values()):
        raise CheckpointError(f"{path} is damaged: it has no entries, or values that are not finite; make it again")
    return found


def _read_gguf(path: Path) -> Importance:
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{path} is no importance matrix, but a GGUF of type {header.metadata.get('general.type')}"
        )
    entries = {}
    for name in (name.removesuffix(_SUM) for name in header.tensors if name.endswith(_SUM)):
        sums, counts = (_values(header, name + suffix) for suffix in (_SUM, _COUNT))
        if sums.size % counts.size:
            raise CheckpointError(f"{path} is damaged: {name} has {counts.size} counts for {sums.size} sums")
        sums = sums.reshape(counts.size, -1)  # GGUF doesn't count a leading 1
        entries[name] = Entry(sums.astype(np.float64), np.rint(counts.reshape(-1)).astype(np.int64))
    datasets = header.metadata.get("imatrix.datasets") or [""]
    n_chunks, chunk_size = (int(header.metadata.get(f"imatrix.{key}", 0)) for key in ("chunk_count", "chunk_size"))
    return Importance(entries, str(datasets[0]), n_chunks, chunk_size)


def _values(header: GGUFHeader, name: str) -> NDArray[np.float32]:
    info = header.tensors.get(name)
    if info is None or info.type_name != "F32":
        raise CheckpointError(f"{header.path} is damaged: {name} is missing or not F32; make it again")
    return np.fromfile(header.path, np.float32, info.n_elements, offset=info.offset).reshape(info.shape)


def _read_dat(path: Path) -> Importance:
    """int32 n; then for each entry: name's length, name, calls, n values, float32 means × calls; calls; dataset."""
    data = path.read_bytes()
    entries: dict[str, Entry] = {}
    try:
        (n_entries,), at = struct.unpack_from("<i", data), 4
        for _ in range(n_entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            n_calls, n_values = struct.unpack_from("<ii", data, at + 4 + length)
            values = np.frombuffer(data, np.float32, n_values, at + 12 + length)
            at += 12 + length + 4 * n_values
            entries[name] = Entry(values[None].astype(np.float64), np.array([max(1, n_calls)]))
        n_chunks = struct.unpack_from("<i", data, at)[0] if at + 4 <= len(data) else 0
        length = struct.unpack_from("<i", data, at + 4)[0] if at + 8 <= len(data) else 0
        dataset = data[at + 8 : at + 8 + length].decode("utf-8", "replace")
    except (struct.error, ValueError, OverflowError) as exc:
        raise CheckpointError(f"{path} is no importance matrix (neither GGUF nor llama.cpp's .dat); check it") from exc
    return Importance(entries, dataset, n_chunks, 0)

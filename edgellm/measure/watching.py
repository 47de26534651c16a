"""A model run over samples while something looks at what goes into its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.config import DEFAULT_N_BATCH, LoadParams
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import check_loadable, read_header
from edgellm.measure.scoring import OnProgress, Sample, rows_at_a_time
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.observe import InputWatch, OnInputs


def watch_inputs(
    model: Path,
    samples: Sequence[Sample],
    weights: Collection[str],
    on_inputs: OnInputs,
    *,
    after_batch: Callable[[], object] | None = None,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> None:
    """Evaluate every token of the samples, each sample from an empty context, and show the weights' inputs.

    after_batch: called when llama.cpp is done with a batch. Heavy work belongs there: during `on_inputs` its threads
    wait for the next product, and waiting they take the cores.

    Errors: ModelFileError and its kin; whatever `on_inputs` raises; EdgeLLMError for an embedding model.
    """
    check_loadable(model)
    n_ctx = max(len(sample.tokens) for sample in samples)
    total, done = sum(len(sample.tokens) for sample in samples), 0
    with (
        closing(InputWatch(weights.__contains__, on_inputs)) as watch,
        closing(NativeModel(model, load_mode="mmap")) as native,
    ):
        if native.is_embedder:
            raise EdgeLLMError(f"{model} makes embeddings, no text: nothing can be collected from it")
        # Logits are asked for at every token: where they aren't, the last block leaves tokens out.
        n_rows = rows_at_a_time(min(n_ctx, DEFAULT_N_BATCH), native.vocab.size)
        params = LoadParams(n_ctx=n_ctx, n_batch=n_rows, n_threads=n_threads)
        with closing(Context(native, params, n_outputs=n_rows, watch=watch)) as context:
            for sample in samples:
                if on_progress:
                    on_progress("watching", done, total)
                for _ in context.logits_from(sample.tokens, 0):
                    watch.raise_error()
                    if after_batch:
                        after_batch()
                done += len(sample.tokens)


def block_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the blocks, outermost dimension first."""
    return {name: info.shape for name, info in read_header(model).tensors.items() if name.startswith("blk.")}


def head_shape(model: Path) -> dict[str, tuple[int, ...]]:
    """The weight that makes the logits, by its name, and its shape."""
    tensors = read_header(model).tensors
    name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    return {name: tensors[name].shape}


def n_matrices(shape: tuple[int, ...]) -> int:
    """How many matrices a weight holds: one, or one an expert."""
    return shape[0] if len(shape) == 3 else 1


def by_expert(rows: NDArray[np.float32], experts: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Each expert that any row is for, with its rows. rows: (rows, columns); experts: (rows,)."""
    for e in np.unique(experts):
        yield int(e), rows[experts == e]

"""A model run over samples while something looks at what goes into its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path

from edgellm.config import LoadParams
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import check_loadable
from edgellm.measure.scoring import Sample
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.observe import InputWatch, OnInputs

_LOGITS_BYTES = 64 << 20
OnProgress = Callable[[str, int, int], None]  # (what, tokens done, tokens in all)


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
    with closing(NativeModel(model, load_mode="mmap")) as native:
        if native.is_embedder:
            raise EdgeLLMError(f"{model} makes embeddings, no text: nothing can be collected from it")
        watch = InputWatch(weights.__contains__, on_inputs)
        # Logits are asked for at every token: where they aren't, the last block leaves tokens out.
        n_rows = max(32, min(n_ctx, 512, _LOGITS_BYTES // (4 * max(1, native.vocab.size))))
        params = LoadParams(n_ctx=n_ctx, n_batch=min(n_ctx, n_rows), n_threads=n_threads)
        with closing(Context(native, params, n_outputs=n_rows, watch=watch)) as context:
            for sample in samples:
                if on_progress:
                    on_progress("watching", done, total)
                for _ in context.logits_from(sample.tokens, 0):
                    watch.raise_error()
                    if after_batch:
                        after_batch()
                done += len(sample.tokens)

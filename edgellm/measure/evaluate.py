"""`evaluate`: a model's perplexity over a text, and its divergence from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.engine.adapters import Lora
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import read_header
from edgellm.measure.divergence import Evaluation, Rows, Tally, kl_divergence
from edgellm.measure.reference import Reference, open_reference
from edgellm.measure.scoring import OnProgress, Sample, Scorer, in_slabs


def evaluate(
    model: Path,
    samples: Sequence[Sample],
    *,
    reference: Path | None = None,
    lora: Sequence[Lora] = (),
    keep: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Perplexity of `model` over the samples, and its divergence from `reference`, both GGUFs.

    lora: adapters added to `model`. keep: a folder for the reference's log-probabilities (4 bytes × tokens ×
    vocabulary), which the next run with the same reference and samples reads instead of computing them.
    Errors: ModelFileError and its kin; EdgeLLMError where the two vocabularies differ.
    """
    n_ctx = max(len(sample.tokens) for sample in samples)
    with closing(Scorer(model, n_ctx, lora=lora)) as scorer:
        if reference is None:
            return _tally(scorer, None, samples, on_progress).evaluation()
        _check_tokens(model, reference, samples)
        theirs = open_reference(reference, samples, n_ctx, scorer.vocab.size, keep)
        finished = False
        try:
            tally = _tally(scorer, theirs, samples, on_progress)
            finished = True
        finally:
            theirs.close(finished)
    return tally.evaluation()


def _check_tokens(model: Path, reference: Path, samples: Sequence[Sample]) -> None:
    """Two vocabularies may be of one size by chance: the tokens that are read must be the same texts in both."""
    ours, theirs = (read_header(path).metadata.get("tokenizer.ggml.tokens") or [] for path in (model, reference))
    if len(ours) != len(theirs):
        return  # said later, with the numbers
    for token in sorted({token for sample in samples for token in sample.tokens if token < len(ours)}):
        if ours[token] != theirs[token]:
            raise EdgeLLMError(
                f"token {token} is {ours[token]!r} in {model} and {theirs[token]!r} in {reference}: only models of one "
                "vocabulary can be compared"
            )


def _tally(
    scorer: Scorer, reference: Reference | None, samples: Sequence[Sample], on_progress: OnProgress | None
) -> Tally:
    tally = Tally()
    n_done, n_tokens = 0, sum(len(sample.tokens) for sample in samples)
    for sample in samples:
        if on_progress:
            on_progress("scoring", n_done, n_tokens)
        if reference:
            reference.begin(sample)
        targets = np.asarray(sample.targets)
        at = 0
        for rows in scorer.log_probs(sample):
            wanted = targets[at : at + len(rows)]
            at += len(rows)
            _add(tally, rows, reference.read(len(rows)) if reference else None, wanted)
        n_done += len(sample.tokens)
    return tally


def _add(tally: Tally, rows: Rows, reference: Rows | None, targets: NDArray[Any]) -> None:
    at = np.arange(len(rows))
    tally.surprise.append(-rows[at, targets].astype(np.float64))
    if reference is not None:
        tally.reference_surprise.append(-reference[at, targets].astype(np.float64))
        for kld, same in in_slabs(_compare, reference, rows):
            tally.kld.append(kld)
            tally.same_top.append(same)


def _compare(reference: Rows, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return kl_divergence(reference, rows), reference.argmax(axis=1) == rows.argmax(axis=1)

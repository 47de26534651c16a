"""What a student learns from: texts, and what the target finds likely after each of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import TextError
from edgellm.measure.divergence import Rows
from edgellm.measure.passages import Passage
from edgellm.measure.scoring import OnProgress, Sample, Scorer, in_slabs

N_TOP = 32  # likeliest tokens kept of each distribution
_WINDOW = 256  # tokens of a text read together


@dataclass(frozen=True)
class Labelled:
    """A text of n tokens. first: from which position on it is learned. top, log_probs: (n - first, N_TOP), the target's
    likeliest next tokens at the positions from there on, the likeliest first, and how likely.
    """

    tokens: NDArray[np.int32]
    first: int
    top: NDArray[np.int32]
    log_probs: NDArray[np.float32]

    @property
    def prompt(self) -> list[int]:
        """What comes before the model's own part; the first half of a text that is all learned."""
        end = self.first + 1 if self.first else max(1, len(self.tokens) // 2)
        return [int(token) for token in self.tokens[:end]]


def windows(passages: Iterable[Passage]) -> list[Sample]:
    """Passages cut to what is read together; of dialogues only the model's own part is learned."""
    found = []
    for passage in passages:
        for start in range(0, len(passage.tokens), _WINDOW):
            tokens = passage.tokens[start : start + _WINDOW]
            first = 0 if passage.is_text else max(0, passage.begin - 1 - start)
            if len(tokens) - first > 1:
                found.append(Sample(tokens, range(first, len(tokens))))
    return found


def label(
    target: Path, samples: Sequence[Sample], seconds: float = float("inf"), on_progress: OnProgress | None = None
) -> list[Labelled]:
    """The target's distributions at the samples' positions, as far as `seconds` allow, at least of one sample.

    TextError where there is nothing to label.
    """
    if not samples:
        raise TextError("the text has nothing of the model's own to learn; give dialogues with answers, or plain text")
    ends, found = monotonic() + seconds, list[Labelled]()
    with closing(Scorer(target, max(len(sample.tokens) for sample in samples))) as scorer:
        n_top = min(N_TOP, scorer.vocab.size)
        for i, sample in enumerate(samples):
            if found and monotonic() > ends:
                break
            if on_progress:
                on_progress("asking the model", i, len(samples))
            found.append(_labelled(scorer, sample, n_top))
    return found


def _labelled(scorer: Scorer, sample: Sample, n_top: int) -> Labelled:
    top, log_probs = [], []
    for rows in scorer.log_probs(sample):
        for ids, values in in_slabs(lambda slab: _likeliest(slab, n_top), rows):
            top.append(ids)
            log_probs.append(values)
    tokens = np.asarray(sample.tokens, np.int32)
    return Labelled(tokens, sample.positions[0], np.concatenate(top), np.concatenate(log_probs))


def _likeliest(rows: Rows, n_top: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    ids = np.argpartition(rows, rows.shape[1] - n_top, axis=1)[:, -n_top:]
    values = np.take_along_axis(rows, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1).astype(np.int32)
    return sorted_ids, np.ascontiguousarray(np.take_along_axis(values, order, axis=1), np.float32)


def pack(labelled: Sequence[Labelled]) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
    """All of it as few arrays, to be stored."""
    return {
        "tokens": np.concatenate([one.tokens for one in labelled]),
        "sizes": np.array([(len(one.tokens), one.first) for one in labelled], np.int32),
        "top": np.concatenate([one.top for one in labelled]),
        "log_probs": np.concatenate([one.log_probs for one in labelled]),
    }


def unpack(stored: dict[str, NDArray[np.int32] | NDArray[np.float32]]) -> list[Labelled]:
    """`pack` undone."""
    found, at, row = [], 0, 0
    for n, first in stored["sizes"].tolist():
        tokens = stored["tokens"][at : at + n].astype(np.int32)
        rows = slice(row, row + n - first)
        log_probs = stored["log_probs"][rows].astype(np.float32)
        found.append(Labelled(tokens, first, stored["top"][rows].astype(np.int32), log_probs))
        at, row = at + n, row + n - first
    return found

"""Log-probabilities of a model over given tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from edgellm.config import DEFAULT_N_BATCH, LoadParams, physical_cpu_count
from edgellm.engine.adapters import LoadedAdapters, Lora
from edgellm.gguf_header import check_loadable
from edgellm.measure.divergence import Rows, log_softmax
from edgellm.native.context import Context
from edgellm.native.model import NativeModel, Vocab

Result = TypeVar("Result")
OnProgress = Callable[[str, int, int], None]  # (what is done, or a tensor's name; how much so far; how much in all)

_LOGITS_BYTES = 64 << 20  # of logits at a time
_SLAB_ROWS = 8  # of them for one thread: they stay in its cache


@dataclass(frozen=True)
class Sample:
    """Tokens read from an empty context, and the positions whose next token is scored, in order."""

    tokens: list[int]
    positions: range | list[int]

    @property
    def targets(self) -> list[int]:
        """The scored tokens."""
        return [self.tokens[i + 1] for i in self.positions]


class Scorer:
    """A model opened for scoring, the way `load` opens it for chats; to be closed."""

    def __init__(self, path: Path, n_ctx: int, *, lora: Sequence[Lora] = ()) -> None:
        header = check_loadable(path)
        self._opened = ExitStack()
        self._model = NativeModel(path)
        self._opened.callback(self._model.close)
        try:
            n_batch = min(n_ctx, DEFAULT_N_BATCH)
            n_outputs = rows_at_a_time(n_batch, self.vocab.size)
            params = LoadParams(n_ctx=n_ctx, n_batch=n_batch)
            adapters = LoadedAdapters(header)
            adapters.choose(self._model, lora)
            self._context = Context(self._model, params, n_outputs=n_outputs)
            self._opened.callback(self._context.close)
            self._context.use_adapters(adapters.in_use)
        except BaseException:
            self.close()
            raise

    @property
    def vocab(self) -> Vocab:
        return self._model.vocab

    def close(self) -> None:
        """Free the model. Twice is fine."""
        self._opened.close()

    def log_probs(self, sample: Sample) -> Iterator[Rows]:
        """Log-probabilities at the sample's positions, in order: float32 (some of them, n_vocab) at a time."""
        positions = list(sample.positions)
        first, done = positions[0], 0
        at = first
        for rows in self._context.logits_from(sample.tokens[: positions[-1] + 1], first):
            wanted = [i - at for i in positions[done:] if i < at + len(rows)]
            at += len(rows)
            if wanted:
                done += len(wanted)
                chosen = rows if len(wanted) == len(rows) else rows[wanted]
                in_slabs(log_softmax, chosen)
                yield chosen


def rows_at_a_time(n_batch: int, n_vocab: int) -> int:
    """Positions whose logits are computed together, so that they stay within bounds for any vocabulary."""
    return max(1, min(n_batch, _LOGITS_BYTES // (4 * max(1, n_vocab))))


def in_slabs(work: Callable[..., Result], *rows: Rows) -> list[Result]:
    """`work` on a few rows of each array at a time, over all cores; its results in order."""
    starts = range(0, len(rows[0]), _SLAB_ROWS)
    slabs = [[array[start : start + _SLAB_ROWS] for array in rows] for start in starts]
    return list(_pool().map(lambda slab: work(*slab), slabs))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(physical_cpu_count(), thread_name_prefix="score")

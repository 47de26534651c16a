"""A smaller model of the same vocabulary as a draft, in a context of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from edgellm.errors import DraftMismatch
from edgellm.speculation.drafts import NOTHING, GoesOn, Proposal, always

if TYPE_CHECKING:
    from edgellm.gguf_header import GGUFHeader
    from edgellm.native.context import Context

_LOOKBACK = 256  # tokens the draft reads when it has missed more: reading all can cost more than it brings
_FEW = 32  # tokens that other drafts' right guesses leave to be read: a part of what a guess costs
_SIZE_DIFFERENCE = 128  # rows that vocabularies of one family are padded with


class ModelDraft:
    """Guesses what a small model finds likeliest. It reads the text from where it began, at most _LOOKBACK tokens back.

    Closing the context is the owner's.
    """

    is_free = False

    def __init__(self, name: str, context: Context) -> None:
        self.name, self._context = name, context
        self._start = 0  # in the history, of what the context holds
        self._seconds: deque[float] = deque(maxlen=9)  # of a guess

    def propose(self, history: Sequence[int], k: int, goes_on: GoesOn = always) -> Proposal:
        """Cancelled when its context is told to abort."""
        import numpy as np

        context = self._context
        text = self._readable(history, k)
        if not text:
            return NOTHING
        started = perf_counter()
        missing = text[context.reuse_prefix(text) :]
        context.decode(missing)
        n_timed = 0 if len(missing) > _FEW else 1
        started = started if n_timed else perf_counter()
        tokens: list[int] = []
        probabilities: list[float] = []
        while True:
            token, probability = context.likeliest_and_probability(np)
            if tokens and not goes_on(probability):
                break
            tokens.append(token)
            probabilities.append(probability)
            if len(tokens) == k:
                break
            context.step(token)
            n_timed += 1
        if n_timed:
            self._seconds.append((perf_counter() - started) / n_timed)
        seconds = median(self._seconds) if self._seconds else 0.0
        return Proposal(tokens, self.name, seconds, probabilities=probabilities)

    def _readable(self, history: Sequence[int], k: int) -> Sequence[int]:
        """The end of the history that the context holds, or shall read; empty where it has no room for that."""
        n_known = self._start + len(self._context.tokens)
        has_missed_much = self._start >= len(history) or len(history) - n_known > _LOOKBACK
        if has_missed_much or len(history) - self._start + k > self._context.n_ctx:
            self._start = max(0, len(history) - min(_LOOKBACK, self._context.n_ctx - k))
        text = history[self._start :]
        return text if len(text) + k <= self._context.n_ctx else ()


def check_same_vocabulary(target: GGUFHeader, draft: GGUFHeader) -> None:
    """DraftMismatch with what differs first, unless a token means the same to both models.

    llama.cpp's conditions: type, BOS, EOS, and the text of every token that both have.
    """
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        theirs, ours = draft.metadata.get(key), target.metadata.get(key)
        if theirs != ours:
            raise DraftMismatch(f"the draft's {key} is {theirs}, the model's {ours}; a draft needs the same vocabulary")
    ours, theirs = (header.metadata.get("tokenizer.ggml.tokens", []) for header in (target, draft))
    if abs(len(ours) - len(theirs)) > _SIZE_DIFFERENCE:
        raise DraftMismatch(
            f"the draft has {len(theirs)} tokens, the model {len(ours)}; a draft needs the same vocabulary"
        )
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            raise DraftMismatch(
                f"token {i} is {other!r} to the draft, {mine!r} to the model; a draft needs the same vocabulary"
            )

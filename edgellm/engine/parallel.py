"""Many prompts answered a few at a time in one context: a finished sequence is replaced at once.

The logic knows no llama.cpp: `Sequences` is all it needs (`native.parallel.ParallelContext`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgellm.config import SamplingParams
from edgellm.errors import ContextFull, GenerationError
from edgellm.generation import FinishReason, Pieces
from edgellm.native.parallel import Piece
from edgellm.text import StopStrings, StreamingDetokenizer

_WORTH_WAITING = 16  # tokens


class Sequences(Protocol):
    n_ctx: int
    n_batch: int
    n_sequences: int

    def start(
        self, sequence: int, params: SamplingParams, prompt: Sequence[int], copied_from: int | None, n: int
    ) -> None: ...

    def finish(self, sequence: int) -> None: ...

    def decode(self, pieces: Sequence[Piece]) -> dict[int, int]: ...


@dataclass(frozen=True)
class Request:
    """key: the caller's own, to know the answer by."""

    key: object
    prompt: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class Answer:
    """error: why there is none, "" if there is."""

    key: object
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    prompt_tokens: int = 0
    error: str = ""


@dataclass
class _Running:
    request: Request
    sequence: int
    n_past: int  # tokens the memory holds
    pending: list[int]  # to be evaluated: the rest of the prompt, or the token chosen last
    stops: StopStrings
    detokenizer: StreamingDetokenizer = field(default_factory=StreamingDetokenizer)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None


def answer_all(sequences: Sequences, pieces: Pieces, requests: Iterable[Request]) -> Iterator[Answer]:
    """The answers in the order they are finished. A request that can't be answered gives an Answer with an error."""
    run = _Batch(sequences, pieces)
    waiting = iter(requests)
    following = next(waiting, None)
    while following is not None or run.running:
        while following is not None and run.has_room and not run.is_about_to_read_the_same(following):
            if (refused := run.refusal(following)) is not None:
                yield refused
            else:
                run.add(following)
            following = next(waiting, None)
        if run.running:
            yield from run.step()


class _Batch:
    def __init__(self, sequences: Sequences, pieces: Pieces) -> None:
        self._sequences, self._pieces = sequences, pieces
        self._free = list(range(sequences.n_sequences))
        self.running: list[_Running] = []
        self._budget = sequences.n_ctx // sequences.n_sequences  # tokens each may take, so that all have room

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def is_about_to_read_the_same(self, request: Request) -> bool:
        """Whether waiting for another one's prompt to be read saves reading the same beginning twice."""
        shared = ((_shared(other.request.prompt, request.prompt), other.n_past) for other in self.running)
        return any(n >= _WORTH_WAITING and n_past < n for n, n_past in shared)

    def refusal(self, request: Request) -> Answer | None:
        """Why a request can't be answered at all."""
        n = len(request.prompt)
        if not n:
            return Answer(request.key, error="the prompt is empty")
        if request.params.is_constrained:
            return Answer(request.key, prompt_tokens=n, error="an answer of a given form can't be part of a batch yet")
        if n >= self._budget:
            return Answer(
                request.key,
                prompt_tokens=n,
                error=f"the prompt has {n} tokens, each sequence has room for {self._budget}; use a larger --n-ctx",
            )
        if request.params.max_tokens == 0:
            return Answer(request.key, finish_reason="length", prompt_tokens=n)
        return None

    def add(self, request: Request) -> None:
        """Start a request in a free sequence, with what another one's memory has of its prompt."""
        sequence = self._free.pop()
        donor, n = None, 0
        for other in self.running:
            shared = min(_shared(other.request.prompt, request.prompt), other.n_past, len(request.prompt) - 1)
            if shared > n:
                donor, n = other.sequence, shared
        self._sequences.start(sequence, request.params, request.prompt, donor, n)
        self.running.append(_Running(request, sequence, n, list(request.prompt[n:]), StopStrings(request.params.stop)))

    def step(self) -> Iterator[Answer]:
        """Evaluate the next tokens of every sequence; the answers that are finished by it."""
        room = self._sequences.n_batch
        taken: list[tuple[_Running, Piece]] = []
        # those that write first: each needs one token, and waits for nothing
        for run in sorted(self.running, key=lambda run: len(run.pending)):
            tokens = run.pending[:room]
            if tokens:
                whole = len(tokens) == len(run.pending)
                taken.append((run, Piece(run.sequence, run.n_past, tokens, whole)))
                room -= len(tokens)
        chosen = self._decode([piece for _, piece in taken])
        for run, piece in taken:
            run.n_past += len(piece.tokens)
            del run.pending[: len(piece.tokens)]
            if piece.wants_logits:
                self._take(run, chosen[run.sequence])
        for run in [run for run in self.running if run.reason is not None]:
            self.running.remove(run)
            self._sequences.finish(run.sequence)
            self._free.append(run.sequence)
            yield _answer(run)

    def _decode(self, pieces: list[Piece]) -> dict[int, int]:
        try:
            return self._sequences.decode(pieces)
        except ContextFull as exc:
            raise GenerationError(f"{exc}; this must not happen, please report it") from exc

    def _take(self, run: _Running, token: int) -> None:
        params = run.request.params
        if self._pieces.is_eog(token):
            run.reason = "stop"
            return
        run.token_ids.append(token)
        run.text += run.stops.add(run.detokenizer.add(self._pieces.piece(token)))
        run.pending = [token]
        if run.stops.found:
            run.reason = "stop"
        elif len(run.token_ids) == params.max_tokens or run.n_past + 1 >= self._budget:
            run.reason = "length"


def _answer(run: _Running) -> Answer:
    text = run.text
    if not run.stops.found:
        text += run.stops.add(run.detokenizer.flush()) + run.stops.flush()
    assert run.reason is not None
    return Answer(run.request.key, text, tuple(run.token_ids), run.reason, len(run.request.prompt))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)

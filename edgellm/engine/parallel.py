"""Many prompts answered a few at a time in one context: a finished sequence is replaced at once.

The logic knows no llama.cpp: `Sequences` is all it needs (`native.parallel.ParallelContext`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgellm.config import SamplingParams
from edgellm.errors import ContextFull, GenerationError
from edgellm.generation import FinishReason, Pieces
from edgellm.native.parallel import Piece
from edgellm.text import StopStrings, StreamingDetokenizer

if TYPE_CHECKING:
    from edgellm.constraint import Matcher

_WORTH_WAITING = 16  # tokens


class Sequences(Protocol):
    n_ctx: int
    n_batch: int
    n_sequences: int
    can_share: bool  # whether a sequence can begin with a part of another one's memory

    def start(
        self,
        sequence: int,
        params: SamplingParams,
        matcher: Matcher | None,
        prompt: Sequence[int],
        copied_from: int | None,
        n: int,
    ) -> int: ...

    def finish(self, sequence: int) -> None: ...

    def decode(self, pieces: Sequence[Piece]) -> None: ...

    def choose(self, sequence: int) -> int: ...


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
    pieces: Pieces
    stops: StopStrings
    detokenizer: StreamingDetokenizer = field(default_factory=StreamingDetokenizer)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    error: str = ""


def answer_all(
    sequences: Sequences,
    pieces_of: Callable[[SamplingParams], Pieces],
    requests: Iterable[Request],
    matcher_of: Callable[[SamplingParams], Matcher | None] = lambda _: None,
) -> Iterator[Answer]:
    """The answers in the order they are finished. A request that can't be answered gives an Answer with an error.

    pieces_of: what tokens stand for under these parameters. matcher_of: of the form that they ask for, if they do.
    """
    run = _Batch(sequences, pieces_of, matcher_of)
    waiting = iter(requests)
    following = next(waiting, None)
    while following is not None or run.running:
        while following is not None and run.has_room and not run.is_about_to_read_the_same(following):
            refused = run.refusal(following) or run.add(following)
            if refused is not None:
                yield refused
            following = next(waiting, None)
        if run.running:
            yield from run.step()


class _Batch:
    def __init__(
        self,
        sequences: Sequences,
        pieces_of: Callable[[SamplingParams], Pieces],
        matcher_of: Callable[[SamplingParams], Matcher | None],
    ) -> None:
        self._sequences, self._pieces_of, self._matcher_of = sequences, pieces_of, matcher_of
        self._free = list(range(sequences.n_sequences))
        self.running: list[_Running] = []
        self._budget = sequences.n_ctx // sequences.n_sequences  # tokens each may take, so that all have room

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def is_about_to_read_the_same(self, request: Request) -> bool:
        """Whether waiting for another one's prompt to be read saves reading the same beginning twice."""
        if not self._sequences.can_share:
            return False
        shared = ((_shared(other.request.prompt, request.prompt), other.n_past) for other in self.running)
        return any(n >= _WORTH_WAITING and n_past < n for n, n_past in shared)

    def refusal(self, request: Request) -> Answer | None:
        """Why a request can't be answered at all."""
        n = len(request.prompt)
        if not n:
            return Answer(request.key, error="the prompt is empty")
        if n >= self._budget:
            return Answer(
                request.key,
                prompt_tokens=n,
                error=f"the prompt has {n} tokens, each sequence has room for {self._budget}; use a larger --n-ctx",
            )
        if request.params.max_tokens == 0:
            return Answer(request.key, finish_reason="length", prompt_tokens=n)
        return None

    def add(self, request: Request) -> Answer | None:
        """Start a request in a free sequence, with what another one's memory has of its prompt; or why it can't be."""
        try:
            matcher = self._matcher_of(request.params)
        except GenerationError as exc:
            return Answer(request.key, prompt_tokens=len(request.prompt), error=str(exc))
        self._free.remove(sequence := min(self._free))
        donor, n = None, 0
        for other in self.running if self._sequences.can_share else ():
            shared = min(_shared(other.request.prompt, request.prompt), other.n_past, len(request.prompt) - 1)
            if shared > n:
                donor, n = other.sequence, shared
        n = self._sequences.start(sequence, request.params, matcher, request.prompt, donor, n)
        pieces, stops = self._pieces_of(request.params), StopStrings(request.params.stop)
        self.running.append(_Running(request, sequence, n, list(request.prompt[n:]), pieces, stops))
        return None

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
        # llama.cpp evaluates only neighbours together: sequences whose numbers follow one another, in that order
        self._decode(sorted((piece for _, piece in taken), key=lambda piece: piece.sequence))
        for run, piece in taken:
            run.n_past += len(piece.tokens)
            del run.pending[: len(piece.tokens)]
            if piece.wants_logits:
                self._take_next(run)
        for run in [run for run in self.running if run.reason is not None]:
            self.running.remove(run)
            self._sequences.finish(run.sequence)
            self._free.append(run.sequence)
            yield _answer(run)

    def _decode(self, pieces: list[Piece]) -> None:
        try:
            self._sequences.decode(pieces)
        except ContextFull as exc:
            raise GenerationError(f"{exc}; this must not happen, please report it") from exc

    def _take_next(self, run: _Running) -> None:
        params = run.request.params
        try:
            token = self._sequences.choose(run.sequence)
        except GenerationError as exc:  # of this answer's form
            run.reason, run.error = "stop", str(exc)
            return
        if run.pieces.is_eog(token):
            run.reason = "stop"
            return
        run.token_ids.append(token)
        run.text += run.stops.add(run.detokenizer.add(run.pieces.piece(token)))
        run.pending = [token]
        if run.stops.found:
            run.reason = "stop"
        elif len(run.token_ids) == params.max_tokens or run.n_past + 1 >= self._budget:
            run.reason = "length"


def _answer(run: _Running) -> Answer:
    if run.error:
        return Answer(run.request.key, prompt_tokens=len(run.request.prompt), error=run.error)
    text = run.text
    if not run.stops.found:
        text += run.stops.add(run.detokenizer.flush()) + run.stops.flush()
    assert run.reason is not None
    return Answer(run.request.key, text, tuple(run.token_ids), run.reason, len(run.request.prompt))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)

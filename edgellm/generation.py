"""Tokens from a context and a sampler, in three layers: `generate_step` yields tokens, `stream_generate` yields
responses with text and figures, `generate` joins them.

Nothing here knows llama.cpp: `Decoder`, `Chooser` and `Pieces` are all it needs, so the logic is tested with
scripted ones. However a stream ends, also when its consumer closes it early, `Decoder.tokens` is what the
decoder's memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any, Literal, Protocol

from edgellm.config import SamplingParams
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.speculation.verify import ChooserAt, Speculator, Verifier, speculative_steps
from edgellm.text import StopStrings, StreamingDetokenizer

FinishReason = Literal["stop", "length", "cancelled"]
PromptProgress = Callable[[float], object]  # a fraction from 0 to 1; returning False cancels


class Decoder(Verifier, Protocol):
    """A sequence being evaluated (`native.context.Context`)."""

    @property
    def aborted(self) -> bool: ...

    def reuse_prefix(self, tokens: Sequence[int]) -> int: ...

    def decode(self, tokens: Sequence[int], on_progress: Callable[[int, int], object] | None = None) -> None: ...


class Chooser(ChooserAt, Protocol):
    """Chooses the next token from the decoder's logits (`native.sampler.Sampler`)."""

    def accept_prompt(self, tokens: Sequence[int]) -> None: ...


class Pieces(Protocol):
    """The part of a vocabulary that turns tokens into text."""

    def piece(self, token: int) -> bytes: ...

    def is_eog(self, token: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Figures of one generation so far. Times are seconds spent in here, not in the code that consumes it.

    evaluated_prompt_tokens: those of the prompt that weren't in the context's memory already.
    time_to_first_token: from the start of the prompt's evaluation. steps: decode calls after the prompt.
    drafted, accepted: tokens proposed by a draft and those the model agreed with. draft_seconds: of decode_seconds,
    what the drafts took.
    """

    prompt_tokens: int = 0
    evaluated_prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    time_to_first_token: float = 0.0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.evaluated_prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first, which came with the prompt."""
        later = self.completion_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Of the tokens after the first; more than 1 where guesses were right."""
        return max(0, self.completion_tokens - 1) / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """A piece of an answer. The last one has a finish_reason; its text may be empty.

    token_ids: the tokens since the last response, without the one that ends the generation.
    from_draft: for each of them, whether a draft proposed it.
    tool_calls: of the last one, where tools were given: what the model calls, in OpenAI's shape.
    """

    text: str
    token_ids: tuple[int, ...]
    from_draft: tuple[bool, ...]
    finish_reason: FinishReason | None
    stats: GenerationStats
    tool_calls: tuple[Mapping[str, Any], ...] = ()


def generate_step(decoder: Decoder, chooser: Chooser) -> Iterator[tuple[Sequence[int], int]]:
    """(new tokens, how many of them a draft proposed), for ever, after a prompt that was decoded; here without drafts.

    A token is yielded before it is evaluated: the consumer shows it sooner, and the last one costs nothing.
    """
    while True:
        token = chooser.sample()
        yield (token,), 0
        decoder.step(token)


def stream_generate(
    decoder: Decoder,
    chooser: Chooser,
    pieces: Pieces,
    prompt: Sequence[int],
    params: SamplingParams,
    on_progress: PromptProgress | None = None,
    speculator: Speculator | None = None,
) -> Iterator[GenerationResponse]:
    """Evaluate `prompt` (what the decoder's memory lacks of it), then yield the answer as it comes.

    speculator: whose guesses are checked several at a time; the answer's distribution is the same.

    Errors: ContextFull if the prompt doesn't fit, Cancelled if cancelled before the first token,
    GenerationError for a failed decode. After the first token a full context or a cancel ends the answer normally.
    """
    run = _Run(decoder, chooser, pieces, prompt, params, speculator)
    run.evaluate_prompt(on_progress)
    for tokens, n_accepted in run.timed_steps():
        run.take(tokens, n_accepted)
        if run.finish_reason is not None:
            break
        if run.text:
            yield run.response()
            run.resume_clock()
    yield run.last_response()


def generate(
    decoder: Decoder, chooser: Chooser, pieces: Pieces, prompt: Sequence[int], params: SamplingParams
) -> tuple[str, list[int], FinishReason, GenerationStats]:
    """The whole answer of `stream_generate`: text, token ids, finish reason, stats. Same errors."""
    return join(stream_generate(decoder, chooser, pieces, prompt, params))


def join(responses: Iterator[GenerationResponse]) -> tuple[str, list[int], FinishReason, GenerationStats]:
    """All of a stream: text, token ids, finish reason, stats. GenerationError if it ended without a reason."""
    text: list[str] = []
    token_ids: list[int] = []
    last: GenerationResponse | None = None
    for last in responses:
        text.append(last.text)
        token_ids.extend(last.token_ids)
    if last is None or last.finish_reason is None:
        raise GenerationError("the stream was closed before the answer was complete")
    return "".join(text), token_ids, last.finish_reason, last.stats


class _Run:
    """The state of one `stream_generate`."""

    def __init__(
        self,
        decoder: Decoder,
        chooser: Chooser,
        pieces: Pieces,
        prompt: Sequence[int],
        params: SamplingParams,
        speculator: Speculator | None,
    ) -> None:
        self._decoder, self._chooser, self._pieces, self._speculator = decoder, chooser, pieces, speculator
        self._prompt, self._limit = prompt, params.max_tokens
        self._detokenizer, self._stops = StreamingDetokenizer(), StopStrings(params.stop)
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._token_ids: list[int] = []
        self._from_draft: list[bool] = []
        self._evaluated = self._completed = self._steps = 0
        self._prompt_seconds = self._first_token_seconds = self._decode_seconds = 0.0

    def evaluate_prompt(self, on_progress: PromptProgress | None) -> None:
        decoder, prompt = self._decoder, self._prompt
        if not prompt:
            raise GenerationError("the prompt is empty; give at least one token")
        if len(prompt) > decoder.n_ctx:
            raise ContextFull(
                f"the prompt has {len(prompt)} tokens but the context holds {decoder.n_ctx}; "
                "load with a larger n_ctx (--n-ctx), or shorten the prompt"
            )
        started = perf_counter()
        n_past = decoder.reuse_prefix(prompt)
        self._evaluated = len(prompt) - n_past
        watch = None if on_progress is None else lambda done, total: on_progress(done / total)
        decoder.decode(prompt[n_past:], watch)
        if decoder.aborted:
            raise Cancelled("cancelled before the first token")
        self._chooser.accept_prompt(prompt)
        self._prompt_seconds = perf_counter() - started

    def timed_steps(self) -> Iterator[tuple[Sequence[int], int]]:
        """Steps with or without guesses, the clock running only inside them, until a limit of context or patience."""
        self.resume_clock()
        if self._limit == 0:
            self.finish_reason = "length"
            return
        steps = self._endless_steps()
        for self._steps in count():  # the first token comes from the prompt's own logits
            try:
                tokens, n_accepted = next(steps)
            except ContextFull:
                self.finish_reason = "length"
                return
            except Cancelled:
                self.finish_reason = "cancelled"
                return
            yield tokens, n_accepted

    def _endless_steps(self) -> Iterator[tuple[Sequence[int], int]]:
        if self._speculator is None:
            return generate_step(self._decoder, self._chooser)
        return speculative_steps(
            self._decoder, self._chooser, self._speculator, self._prompt, self._pieces.is_eog, self._limit
        )

    def resume_clock(self) -> None:
        self._resumed = perf_counter()

    def take(self, tokens: Sequence[int], n_accepted: int) -> None:
        """Add a step's tokens to text and figures; sets finish_reason when one of them ends the answer."""
        if not self._completed:
            self._first_token_seconds = self._prompt_seconds + perf_counter() - self._resumed
            self.resume_clock()
        for i, token in enumerate(tokens):
            if self._pieces.is_eog(token):
                self.finish_reason = "stop"
                return
            self._completed += 1
            self._token_ids.append(token)
            self._from_draft.append(i < n_accepted)
            self.text += self._stops.add(self._detokenizer.add(self._pieces.piece(token)))
            if self._stops.found:
                self.finish_reason = "stop"
                return
            if self._completed == self._limit:
                self.finish_reason = "length"
                return
        if self._decoder.aborted:
            self.finish_reason = "cancelled"

    def response(self) -> GenerationResponse:
        self._decode_seconds += perf_counter() - self._resumed
        text, ids, from_draft = self.text, tuple(self._token_ids), tuple(self._from_draft)
        self.text = ""
        self._token_ids.clear()
        self._from_draft.clear()
        return GenerationResponse(text, ids, from_draft, self.finish_reason, self._stats())

    def last_response(self) -> GenerationResponse:
        if not self._stops.found:
            self.text += self._stops.add(self._detokenizer.flush())
            self.text += self._stops.flush()
        return self.response()

    def _stats(self) -> GenerationStats:
        return GenerationStats(
            prompt_tokens=len(self._prompt),
            evaluated_prompt_tokens=self._evaluated,
            prompt_seconds=self._prompt_seconds,
            time_to_first_token=self._first_token_seconds,
            completion_tokens=self._completed,
            decode_seconds=self._decode_seconds,
            steps=self._steps,
            drafted=self._speculator.drafted if self._speculator else 0,
            accepted=self._speculator.accepted if self._speculator else 0,
            draft_seconds=self._speculator.draft_seconds if self._speculator else 0.0,
        )

"""`load` and `Model`: what a program holds.

Threads: any thread may call any method. One generation (or logits, or embed) at a time uses a model; a call from
another thread or asyncio task waits its turn, from its first item to its last. A second generation by the same
thread or task, while its own stream is open, raises GenerationError instead of waiting for itself. `cancel` and
`close` act at once, from anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from edgellm.catalog import cards
from edgellm.catalog.partners import fingerprint
from edgellm.chat.session import Memory
from edgellm.config import LoadParams, SamplingParams
from edgellm.constraint import Matcher, grammar_of
from edgellm.engine.adapters import LoadedAdapters, Lora
from edgellm.engine.drafts import N_OUTPUTS, Drafts
from edgellm.engine.parallel import Answer, Request, answer_all
from edgellm.engine.stream import Stream, Ticket, iterate_async
from edgellm.engine.turn import Turn
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.generation import FinishReason, GenerationResponse, GenerationStats, join, stream_generate
from edgellm.gguf_header import check_loadable
from edgellm.native import library
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.parallel import ParallelContext
from edgellm.native.sampler import ConstrainedSampler, Sampler
from edgellm.native.state import restore_state, save_state
from edgellm.speculation.drafts import DraftChoice
from edgellm.text import ControlMarker

if TYPE_CHECKING:
    import numpy as np

    from edgellm.chat.template import ChatTemplate

    FloatMatrix = np.ndarray[Any, np.dtype[np.float32]]

Messages = Sequence[Mapping[str, Any]]
Progress = Callable[[float], object]  # a fraction from 0 to 1; returning False cancels

_LOGIT_ROWS = 64  # positions whose logits are computed together: 64 × 150,000 floats are 38 MB


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats


def load(
    path_or_name: str | Path | None = None,
    params: LoadParams | None = None,
    *,
    lora: Sequence[Lora] = (),
    on_progress: Progress | None = None,
) -> Model:
    """Load a GGUF by its path, or a model by the name of its card; None = the model of `edgellm[demo]`.

    lora: adapters to add to it, as for `Model.set_lora`.
    on_progress: called with the fraction loaded, 0 to 1; returning False cancels.
    Errors: ModelFileError (no such file, damaged, unsupported), AdapterError, Cancelled, GenerationError (no memory
    for n_ctx).
    """
    path = path_or_name if isinstance(path_or_name, Path) else cards.resolve(path_or_name)
    model = Model(path, params or LoadParams(), on_progress=on_progress)
    try:
        model.set_lora(*lora)
    except BaseException:
        model.close()
        raise
    return model


class Model:
    """A loaded model; use it as a context manager, or call `close`. Made by `load`."""

    def __init__(self, path: Path, params: LoadParams, *, on_progress: Progress | None = None) -> None:
        header = check_loadable(path)
        self.path = path
        self.params = params
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self._adapters = LoadedAdapters(header)
        self._native = NativeModel(
            path, load_mode=params.load_mode, n_gpu_layers=params.n_gpu_layers, on_progress=on_progress
        )
        self._drafts = Drafts(header, self._native, params)
        self._vocab = self._native.vocab
        self._marker = ControlMarker(self._vocab)
        self._turn = Turn()
        self._active: Ticket | None = None
        self._active_lock = threading.RLock()  # re-entrant: the garbage collector may end a stream anywhere
        self._closing = threading.Lock()
        self._closed = False
        self._contexts: set[Context | ParallelContext] = set()
        try:
            self._context = self._open_context(params, n_outputs=N_OUTPUTS)
        except BaseException:
            self._native.close()
            raise
        self.n_ctx = self._context.n_ctx

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"n_ctx={self.n_ctx}"
        return f"<edgellm.Model {self.path.name} {state}>"

    @property
    def n_threads(self) -> int:
        return self._context.n_threads

    @property
    def bos(self) -> int | None:
        """The token that begins every text; None where this model's texts begin without."""
        return self._vocab.bos if self._vocab.adds_bos else None

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer (end of text, end of turn)."""
        return self._vocab.is_eog(token)

    @property
    def context_used(self) -> int:
        """How many tokens the context's memory holds."""
        return len(self._context.tokens)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> Stream:
        """Continue a raw prompt: text (control tokens written out count as such, BOS is added) or token ids.

        draft: what guesses several tokens ahead, which costs no quality: "ngram" (the text's own repetitions), the path
        or card of a smaller model, asked where the n-grams know nothing, or a list of just those to ask in turn; "auto"
        = n-grams and the partner that the model's file or card names; "off".
        on_progress: called with the evaluated fraction of the prompt, 0 to 1; returning False cancels.
        Errors, at once: GenerationError (empty, not this model's tokens, closed), ContextFull. While iterating:
        DraftMismatch, ModelFileError (a draft that was named); Cancelled before the first token; later a cancel ends
        the stream with finish_reason "cancelled".
        """
        return self._open_stream(self._prompt_ids(prompt), params, draft, on_progress)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> Stream:
        """The assistant's answer to OpenAI-shaped messages. What the model has read of them already is reused.

        Text in messages never becomes a control token. Errors as in `generate`; also GenerationError where the
        model has no chat template, or its template refuses the messages.
        """
        return self._open_stream(self.chat_tokens(messages), params, draft, on_progress)

    def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> Completion:
        """`generate`, all at once. Same errors."""
        return Completion(*join(self.generate(prompt, params, draft=draft, on_progress=on_progress)))

    def agenerate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> AsyncIterator[GenerationResponse]:
        """`generate` for asyncio; every error comes while iterating. Cancelling the task cancels the generation."""
        return self._iterate_async(lambda: self._prompt_ids(prompt), params, draft, on_progress)

    def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> AsyncIterator[GenerationResponse]:
        """`chat` for asyncio; see `agenerate`."""
        return self._iterate_async(lambda: self.chat_tokens(messages), params, draft, on_progress)

    def chat_tokens(self, messages: Messages, *, answer_follows: bool = True) -> list[int]:
        """The token ids of the prompt that `chat` evaluates for these messages.

        answer_follows: False ends where the last message ends, without what introduces an answer.
        """
        from edgellm.chat.template import check_messages  # with jinja2, which only chats need

        self._check_open()
        template = self._template
        checked, mark = self._marker.mark(check_messages(messages), template.source)
        return self._marker.encode(template.render(checked, answer_follows=answer_follows), mark)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS. special: the text of a control token becomes that token."""
        self._check_open()
        return self._vocab.tokenize(text, special=special)

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. special: control tokens are written out."""
        self._check_open()
        return self._vocab.detokenize(_plain_ints(ids), special=special)

    def logits(self, tokens: Sequence[int]) -> FloatMatrix:
        """Logits after each token, from an empty context: float32 (n_tokens, n_vocab). Doesn't disturb a chat.

        Errors: GenerationError (no tokens, not this model's), ContextFull (more than the model was trained with).
        """
        self._check_fits_training(len(tokens))
        with self._side_context(n_ctx=max(1, len(tokens)), n_outputs=_LOGIT_ROWS) as context:
            return context.logits(_plain_ints(tokens))

    def embed(self, texts: str | Sequence[str]) -> FloatMatrix:
        """Embeddings of length 1, pooled as the model says (or the mean): float32 (n_texts, n_embd).

        Errors: GenerationError (no texts, an empty text), ContextFull (a text longer than the training context).
        """
        import numpy as np

        self._check_open()
        texts = [texts] if isinstance(texts, str) else texts
        if not texts or not all(texts):
            raise GenerationError("there is nothing to embed; give one or more texts, none of them empty")
        rows = [self._vocab.tokenize(text, special=False, framed=True) for text in texts]
        longest = max(map(len, rows))
        self._check_fits_training(longest)
        with self._side_context(n_ctx=longest, n_batch=longest, n_outputs=longest, embeddings=True) as context:
            matrix = np.stack([context.embedding(row) for row in rows])
        norms = np.linalg.norm(matrix, axis=1, keepdims=True)
        return np.asarray(matrix / np.maximum(norms, 1e-12), np.float32)

    @property
    def lora(self) -> tuple[tuple[Path, float], ...]:
        """The adapters in use: (path, scale)."""
        return tuple((adapter.file.path, scale) for adapter, scale in self._adapters.in_use)

    def set_lora(self, *adapters: Lora) -> None:
        """From the next call on, add these GGUF LoRAs to the weights, in place of those before; none = the plain model.

        Each is a path or (path, scale); the weights aren't loaded again, what the context held is. Waits for a
        running generation. Errors: AdapterError (no GGUF LoRA, made for another model), with all as it was before.
        """
        with self._turn_of(Ticket(None)), self._closing:
            self._check_open()
            if self._adapters.choose(self._native, adapters):
                for context in self._contexts:
                    context.use_adapters(self._adapters.in_use)
                self._adapters.free_unused()

    @property
    def memory_maker(self) -> Mapping[str, Any]:
        """All that must be the same for a saved memory to be used: model, adapters, template, types of the KV cache."""
        adapters = [(fingerprint(adapter.file.path), scale) for adapter, scale in self._adapters.in_use]
        template = str(self.metadata.get("tokenizer.chat_template", ""))
        return {
            "model": fingerprint(self.path),
            "adapters": adapters,
            "template": hashlib.sha256(template.encode("utf-8", "replace")).hexdigest(),
            "kv_type": self.params.kv_type,
            "flash_attn": self.params.flash_attn,
            "llama.cpp": library.version(),
        }

    def save_memory(self) -> Memory:
        """What the model holds of the conversation it was last in. Waits for a running generation."""
        with self._turn_of(Ticket(None)):
            return Memory(tuple(self._context.tokens), self.memory_maker, save_state(self._context))

    def restore_memory(self, memory: Memory) -> bool:
        """Go on from a memory that a model with the same `memory_maker` saved. False, and nothing held, if it can't."""
        with self._turn_of(Ticket(None)):
            self._vocab.check_ids(memory.tokens)
            return restore_state(self._context, memory.tokens, memory.data)

    def cancel(self) -> None:
        """Interrupt what this model is doing, from any thread, also in the middle of a prompt. Nothing = no effect."""
        with self._active_lock:
            if self._active is not None:
                self._cancel(self._active)

    def close(self) -> None:
        """Interrupt what is running and free everything. Any later use raises GenerationError. Twice is fine."""
        with self._closing:
            self._closed = True
            for context in tuple(self._contexts):
                context.close()
            self._contexts.clear()
            self._drafts.close()
            self._native.close()

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from edgellm.chat.template import ChatTemplate, find_template

        vocab = self._vocab
        return ChatTemplate(
            find_template(self.metadata), bos_token=vocab.text(vocab.bos), eos_token=vocab.text(vocab.eos)
        )

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        self._check_open()
        ids = self._marker.encode(prompt) if isinstance(prompt, str) else _plain_ints(prompt)
        if not ids:
            raise GenerationError("the prompt is empty; give at least one token")
        self._vocab.check_ids(ids)
        return ids

    def _open_stream(
        self,
        prompt: list[int],
        params: SamplingParams | None,
        draft: DraftChoice,
        on_progress: Progress | None,
        owner: object = None,
    ) -> Stream:
        ticket = Ticket(owner)
        responses = self._take_turn_and_generate(ticket, prompt, params or SamplingParams(), draft, on_progress)
        return Stream(ticket, responses, self._cancel)

    async def _iterate_async(
        self,
        encode: Callable[[], list[int]],
        params: SamplingParams | None,
        draft: DraftChoice,
        on_progress: Progress | None,
    ) -> AsyncIterator[GenerationResponse]:
        import asyncio

        task = asyncio.current_task()
        async for response in iterate_async(lambda: self._open_stream(encode(), params, draft, on_progress, task)):
            yield response

    def _take_turn_and_generate(
        self,
        ticket: Ticket,
        prompt: list[int],
        params: SamplingParams,
        draft: DraftChoice,
        on_progress: Progress | None,
    ) -> Generator[GenerationResponse, None, None]:
        with self._turn_of(ticket), contextlib.closing(Sampler(self._context, params)) as sampler:
            matcher = self._matcher(params)
            chooser = sampler if matcher is None else ConstrainedSampler(sampler, matcher)
            speculator = self._drafts.speculator(draft, matcher)
            yield from stream_generate(self._context, chooser, self._vocab, prompt, params, on_progress, speculator)

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        """Of the answer's form, from its beginning. GenerationError where the form can't be used."""
        grammar = grammar_of(params) if params.is_constrained else None
        return None if grammar is None else Matcher(self._grammar_tokenizer, grammar)

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        from edgellm.native.grammar import grammar_tokenizer

        return grammar_tokenizer(self._vocab)

    @contextlib.contextmanager
    def _turn_of(self, ticket: Ticket) -> Iterator[None]:
        def check() -> None:
            self._check_open()
            if ticket.cancelled:
                raise Cancelled("cancelled before the first token")

        self._turn.take(ticket.owner or threading.get_ident(), check)
        try:
            with self._active_lock:
                self._active = ticket
                self._drafts.clear_abort()
                for context in tuple(self._contexts):
                    context.clear_abort()
            check()
            yield
        finally:
            with self._active_lock:
                self._active = None
            self._turn.release()

    def _cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        with self._active_lock:
            if self._active is ticket:
                self._drafts.abort()
                for context in tuple(self._contexts):
                    context.abort()

    def answer_all(
        self, requests: Iterable[Request], n_parallel: int = 8, *, n_ctx: int | None = None
    ) -> Iterator[Answer]:
        """Answers to many prompts, n_parallel of them at a time in one context, in the order they are finished.

        n_ctx: tokens of context for each; None = as many as this model was loaded with. It doesn't disturb a chat,
        whose turn it waits for and holds.
        Errors: GenerationError (no memory), Cancelled. A request that can't be answered gives an Answer with an error.
        """
        with self._turn_of(Ticket(None)):
            with self._closing:
                self._check_open()
                limit = self._native.n_ctx_train or (n_ctx or self.n_ctx)
                each = min(n_ctx or self.n_ctx, limit)
                params = replace(self.params, n_ctx=each * n_parallel, n_batch=max(n_parallel, self.params.n_batch))
                context = ParallelContext(self._native, params, n_parallel)
                self._contexts.add(context)
            try:
                context.use_adapters(self._adapters.in_use)
                yield from answer_all(context, self._vocab, requests)
            finally:
                context.close()
                self._contexts.discard(context)

    @contextlib.contextmanager
    def _side_context(
        self, *, n_ctx: int, n_outputs: int, n_batch: int | None = None, embeddings: bool = False
    ) -> Iterator[Context]:
        """A context for one call, so that the chat in the main one stays as it is."""
        params = replace(self.params, n_ctx=n_ctx, n_batch=n_batch or self.params.n_batch)
        with self._turn_of(Ticket(None)):
            context = self._open_context(params, n_outputs=n_outputs, embeddings=embeddings)
            try:
                yield context
            finally:
                context.close()
                self._contexts.discard(context)

    def _open_context(self, params: LoadParams, *, n_outputs: int = 1, embeddings: bool = False) -> Context:
        with self._closing:
            self._check_open()
            context = Context(self._native, params, n_outputs=n_outputs, embeddings=embeddings)
            self._contexts.add(context)
            context.use_adapters(self._adapters.in_use)
            return context

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError("the model is closed; load it again")

    def _check_fits_training(self, n_tokens: int) -> None:
        self._check_open()
        limit = self._native.n_ctx_train
        if 0 < limit < n_tokens:
            raise ContextFull(
                f"{n_tokens} tokens, but the model was trained with a context of {limit}; shorten the text"
            )


def _plain_ints(tokens: Sequence[int]) -> list[int]:
    """numpy's integers too, as ints. GenerationError for anything else."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as exc:
        raise GenerationError(f"token ids must be integers: {exc}") from exc

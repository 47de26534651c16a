"""`load` and `Model`: what a program holds.

Threads: any thread may call any method. One generation (or logits, or embed) at a time uses a model; a call from
another thread or asyncio task waits its turn, from its first item to its last. A second generation by the same
thread or task, while its own stream is open, raises GenerationError instead of waiting for itself. `cancel` and
`close` act at once, from anywhere.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from edgellm.catalog import cards
from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.adapters import Lora
from edgellm.engine.drafts import N_OUTPUTS
from edgellm.engine.memory import check_fits
from edgellm.engine.resources import Resources, in_background
from edgellm.engine.stream import Completion, Stream, Ticket, iterate_async
from edgellm.engine.tuned import settings_in_force, settle, tuning_for
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse, Pieces, join, stream_generate
from edgellm.gguf_header import check_loadable
from edgellm.native.sampler import ConstrainedSampler, Sampler
from edgellm.speculation.drafts import DraftChoice
from edgellm.text import ControlMarker, ShownTokens, plain_ids

if TYPE_CHECKING:
    from edgellm.chat.session import Memory
    from edgellm.chat.template import ChatTemplate
    from edgellm.chat.tool_schema import Tool
    from edgellm.constraint import Matcher
    from edgellm.engine.parallel import Answer, Request
    from edgellm.engine.turn import Turns
    from edgellm.engine.vectors import FloatMatrix

Messages = Sequence[Mapping[str, Any]]
Progress = Callable[[float], object]  # a fraction from 0 to 1; returning False cancels


def load(
    path_or_name: str | Path | None = None,
    params: LoadParams | None = None,
    *,
    isolated: bool = False,
    lora: Sequence[Lora] = (),
    on_progress: Progress | None = None,
) -> Model:
    """Load a GGUF by its path, or a model by the name of its card; None = the model of `edgellm[demo]`.

    isolated: in a process of its own, so that nothing native code does can end this one; see `IsolatedModel`.
    lora: adapters to add to it, as for `Model.set_lora`.
    on_progress: called with the fraction loaded, 0 to 1; returning False cancels.
    Errors: ModelFileError (no such file, damaged, unsupported), AdapterError, Cancelled, GenerationError (not
    enough memory), EngineCrashed.
    """
    path = path_or_name if isinstance(path_or_name, Path) else cards.resolve(path_or_name)
    if isolated:
        from edgellm.engine.isolated import IsolatedModel

        return IsolatedModel(path, params or LoadParams(), lora=lora, on_progress=on_progress)
    model = Model(path, params or LoadParams(), on_progress=on_progress)
    try:
        model.set_lora(*lora)
    except BaseException:
        model.close()
        raise
    return model


class Model:
    """A loaded model; use it as a context manager, or call `close`. Made by `load`.

    settings: those in force: n_ctx, n_threads, n_batch, kv_type, flash_attn (None: llama.cpp chose), load_mode, tuned
    (whether `edgellm tune` had a say).
    """

    def __init__(self, path: Path, params: LoadParams, *, on_progress: Progress | None = None) -> None:
        header = check_loadable(path)
        tuning = tuning_for(path) if params.tuned else None
        asked, params = params, settle(params, tuning)
        check_fits(header, params)
        self.path, self.params = path, params
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self._held = Resources(header, asked, params, tuning.verify_cost if tuning else None, on_progress)
        self._native, self._drafts = self._held.native, self._held.drafts
        self._vocab = self._native.vocab
        self._marker = ControlMarker(self._vocab)
        in_background(lambda: self._vocab.control_tokens)  # for a chat, while native code works
        try:
            self._context = self._held.open_context(params, n_outputs=N_OUTPUTS)
        except BaseException:
            self._native.close()
            raise
        self.n_ctx = self._context.n_ctx
        self.settings: Mapping[str, Any] = settings_in_force(self._context, params, tuning)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._held.closed else f"n_ctx={self.n_ctx}"
        return f"<edgellm.Model {self.path.name} {state}>"

    @property
    def n_threads(self) -> int:
        return self._context.n_threads

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return self._vocab.size

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
        or card of a smaller model, asked where it promises more than the n-grams, or a list of just those to choose
        from; "auto" = n-grams and the partner that the model's file or card names; "off".
        on_progress: called with the evaluated fraction of the prompt, 0 to 1; returning False cancels.
        Errors, at once: GenerationError (empty, not this model's tokens, closed), ContextFull. While iterating:
        DraftMismatch, ModelFileError (a draft that was named); Cancelled before the first token; later a cancel ends
        the stream with finish_reason "cancelled".
        """
        return self._open_stream(self.prompt_tokens(prompt), params, draft, on_progress)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> Stream:
        """The assistant's answer to OpenAI-shaped messages. What the model has read of them already is reused.

        tools: Python functions, or OpenAI-shaped schemas, that the model may call: the last response has `tool_calls`.
        tool_choice: "auto", "none", "required" (it must call one), or the name of the one it must call.
        Text in messages never becomes a control token. Errors as in `generate`; also GenerationError where the
        model has no chat template, its template refuses the messages or has no place for tools.
        """
        return self._open_chat(messages, params, tools, tool_choice, draft, on_progress)

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
        return self._iterate_async(
            lambda task: self._open_stream(self.prompt_tokens(prompt), params, draft, on_progress, task)
        )

    def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        draft: DraftChoice = "auto",
        on_progress: Progress | None = None,
    ) -> AsyncIterator[GenerationResponse]:
        """`chat` for asyncio; see `agenerate`."""
        return self._iterate_async(
            lambda task: self._open_chat(messages, params, tools, tool_choice, draft, on_progress, task)
        )

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids that `generate` evaluates for this prompt. GenerationError: empty, not this model's, closed."""
        self._held.check_open()
        ids = self._marker.encode(prompt) if isinstance(prompt, str) else plain_ids(prompt)
        if not ids:
            raise GenerationError("the prompt is empty; give at least one token")
        self._vocab.check_ids(ids)
        return ids

    def chat_tokens(self, messages: Messages, *, tools: Sequence[Tool] = (), answer_follows: bool = True) -> list[int]:
        """The token ids of the prompt that `chat` evaluates for these messages.

        answer_follows: False ends where the last message ends, without what introduces an answer.
        """
        from edgellm.chat.template import prompt_of  # with jinja2, which only chats need

        self._held.check_open()
        return self._marker.encode(*prompt_of(self._template, self._marker, messages, tools, answer_follows))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS. special: the text of a control token becomes that token."""
        self._held.check_open()
        return self._vocab.tokenize(text, special=special)

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. special: control tokens are written out."""
        self._held.check_open()
        return self._vocab.detokenize(plain_ids(ids), special=special)

    def logits(self, tokens: Sequence[int]) -> FloatMatrix:
        """Logits after each token, from an empty context: float32 (n_tokens, n_vocab). Doesn't disturb a chat.

        Errors: GenerationError (no tokens, not this model's), ContextFull (more than the model was trained with).
        """
        from edgellm.engine.vectors import logits

        return logits(self._held, tokens)

    def embed(self, texts: str | Sequence[str]) -> FloatMatrix:
        """Embeddings of length 1, pooled as the model says (or the mean): float32 (n_texts, n_embd).

        Errors: GenerationError (no texts, an empty text), ContextFull (a text longer than the training context).
        """
        from edgellm.engine.vectors import embed

        return embed(self._held, texts)

    @property
    def lora(self) -> tuple[tuple[Path, float], ...]:
        """The adapters in use: (path, scale)."""
        return tuple((adapter.file.path, scale) for adapter, scale in self._held.adapters.in_use)

    def set_lora(self, *adapters: Lora) -> None:
        """From the next call on, add these GGUF LoRAs to the weights, in place of those before; none = the plain model.

        Each is a path or (path, scale); the weights aren't loaded again, what the context held is. Waits for a
        running generation. Errors: AdapterError (no GGUF LoRA, made for another model), with all as it was before.
        """
        self._held.set_adapters(adapters)

    @property
    def memory_maker(self) -> Mapping[str, Any]:
        """All that must be the same for a saved memory to be used: model, adapters, template, types of the KV cache."""
        from edgellm.engine.identity import memory_maker

        return memory_maker(self.path, self.metadata, self._held.adapters.in_use, self.settings)

    def save_memory(self) -> Memory:
        """What the model holds of the conversation it was last in. Waits for a running generation."""
        from edgellm.chat.session import Memory
        from edgellm.native.state import save_state

        with self._held.turn_of(Ticket(None)):
            return Memory(tuple(self._context.tokens), self.memory_maker, save_state(self._context))

    def restore_memory(self, memory: Memory) -> bool:
        """Go on from a memory that a model with the same `memory_maker` saved. False, and nothing held, if it can't."""
        from edgellm.native.state import restore_state

        with self._held.turn_of(Ticket(None)):
            self._vocab.check_ids(memory.tokens)
            return restore_state(self._context, memory.tokens, memory.data)

    def cancel(self) -> None:
        """Interrupt what this model is doing, from any thread, also in the middle of a prompt. Nothing = no effect."""
        self._turns.cancel_active()

    def close(self) -> None:
        """Interrupt what is running and free everything. Any later use raises GenerationError. Twice is fine."""
        self._held.close()

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from edgellm.chat.template import ChatTemplate, find_template

        bos, eos = (self._vocab.text(token) for token in (self._vocab.bos, self._vocab.eos))
        return ChatTemplate(find_template(self.metadata), bos_token=bos, eos_token=eos)

    @property
    def _turns(self) -> Turns:
        return self._held

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
        return Stream(ticket, responses, self._turns.cancel)

    def _open_chat(
        self,
        messages: Messages,
        params: SamplingParams | None,
        tools: Sequence[Tool],
        tool_choice: str,
        draft: DraftChoice,
        on_progress: Progress | None,
        owner: object = None,
    ) -> Stream:
        from edgellm.chat.answers import AnswerForm

        tokenize = functools.partial(self.tokenize, special=True)
        form = AnswerForm(str(self.metadata.get("tokenizer.chat_template")), tools, tool_choice, tokenize)
        prompt = self.chat_tokens(messages, tools=form.schemas)
        return self._open_stream(prompt, form.params(params), draft, on_progress, owner).through(form.read)

    async def _iterate_async(self, open_stream: Callable[[object], Stream]) -> AsyncIterator[GenerationResponse]:
        import asyncio

        task = asyncio.current_task()
        async for response in iterate_async(lambda: open_stream(task)):
            yield response

    def _take_turn_and_generate(
        self,
        ticket: Ticket,
        prompt: list[int],
        params: SamplingParams,
        draft: DraftChoice,
        on_progress: Progress | None,
    ) -> Generator[GenerationResponse, None, None]:
        with self._held.turn_of(ticket), contextlib.closing(Sampler(self._context, params)) as sampler:
            matcher = self._matcher(params)
            chooser = sampler if matcher is None else ConstrainedSampler(sampler, matcher)
            is_repeatable = params.seed is not None and params.temperature > 0
            speculator = self._drafts.speculator(draft, matcher, is_repeatable=is_repeatable)
            pieces = self._pieces(params)
            yield from stream_generate(self._context, chooser, pieces, prompt, params, on_progress, speculator)

    def _pieces(self, params: SamplingParams) -> Pieces:
        return ShownTokens(self._vocab, params.shown_tokens) if params.shown_tokens else self._vocab

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        """Of the answer's form, from its beginning. GenerationError where the form can't be used."""
        if not params.is_constrained:
            return None
        from edgellm.constraint import Matcher, grammar_of

        return Matcher(self._grammar_tokenizer, grammar_of(params))

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        from edgellm.native.grammar import grammar_tokenizer

        return grammar_tokenizer(self._vocab)

    def answer_all(
        self, requests: Iterable[Request], n_parallel: int = 8, *, n_ctx: int | None = None
    ) -> Iterator[Answer]:
        """Answers to many prompts, n_parallel of them at a time in one context, in the order they are finished.

        n_ctx: tokens of context for each; None = as many as this model was loaded with. It doesn't disturb a chat,
        whose turn it waits for and holds.
        Errors: GenerationError (no memory), Cancelled. A request that can't be answered gives an Answer with an error.
        """
        from edgellm.engine.parallel import answer_all

        with self._held.parallel_context(n_parallel, n_ctx or self.n_ctx) as context:
            yield from answer_all(context, self._pieces, requests, self._matcher)

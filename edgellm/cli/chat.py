"""`edgellm chat`: a conversation in the terminal, or turn by turn from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options
from edgellm.cli.console import clear_status, on_thread, percentage, report, say, silence_stdout, write
from edgellm.config import DEFAULT_N_CTX, SamplingParams
from edgellm.errors import Cancelled, EdgeLLMError

if TYPE_CHECKING:
    from edgellm.chat.conversation import Conversation
    from edgellm.engine.model import Model
    from edgellm.generation import GenerationResponse, GenerationStats

# Greedy small models repeat themselves; a chat wants some life where the card advises nothing.
_CHAT_SAMPLING = SamplingParams(temperature=0.7)


@dataclass
class Session:
    """What the slash commands work on."""

    model: Model
    conversation: Conversation
    sampling: SamplingParams
    draft: str = options.DEFAULT_DRAFT
    last_stats: GenerationStats | None = None
    failed: bool = False


def chat(
    model: Annotated[str | None, typer.Argument(help="Path of a GGUF, or the name of a card.")] = None,
    system: options.System = None,
    max_tokens: options.Tokens = None,
    seed: options.Seed = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    n_ctx: options.NCtx = DEFAULT_N_CTX,
    threads: options.Threads = 0,
    load_mode: options.LoadModeName = None,
    kv_type: options.KVTypeName = None,
    flash_attn: options.FlashAttention = None,
    lora: options.LoraFiles = None,
    draft: options.DraftName = options.DEFAULT_DRAFT,
    history: Annotated[bool, typer.Option(help="Remember what you type for the next chat.")] = True,
) -> None:
    """Chat with a model, by default the one that `edgellm[demo]` brings along. Piped in, every line is a turn."""
    given = {
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    params = options.load_params(n_ctx, threads, load_mode, kv_type, flash_attn)
    options.check_sampling(given)
    with options.open_model(model, params, lora) as loaded:
        from edgellm.chat.conversation import Conversation

        loaded.chat_tokens([{"role": "user", "content": "Hello"}])  # a model that can't chat says so before the banner
        sampling = options.sampling_params(loaded.path, _CHAT_SAMPLING, given)
        session = Session(loaded, Conversation(loaded, system), sampling, draft)
        try:
            _talk(session, history)
        except BrokenPipeError:
            silence_stdout()
            raise typer.Exit(1) from None
    if session.failed:
        raise typer.Exit(1)


def _talk(session: Session, history: bool) -> None:
    from edgellm.cli.chat_commands import run_slash_command

    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        _print_banner(session)
    for line in _terminal_lines(history) if in_terminal else _piped_lines():
        text = line.strip()
        if not text:
            continue
        try:
            if text.startswith("/"):
                if not run_slash_command(session, text):
                    return
            else:
                answer(session, partial(_say_turn, session, text))
        except BrokenPipeError:
            raise
        except (EdgeLLMError, OSError) as exc:
            report(exc, debug=False)
            session.failed = not in_terminal


def _say_turn(
    session: Session, text: str, show: Callable[[float], object]
) -> Generator[GenerationResponse, None, None]:
    return session.conversation.say(text, session.sampling, draft=session.draft, on_progress=show)


def answer(
    session: Session, ask: Callable[[Callable[[float], object]], Generator[GenerationResponse, None, None]]
) -> None:
    """Print the answer that `ask(on_progress)` gives, as it comes, and its figures. Ctrl-C ends it early."""
    last = None
    ends_line = True
    try:
        with closing(on_thread(ask(percentage("reading")), session.model.cancel)) as responses:
            for last in responses:
                write(last.text)
                ends_line = last.text.endswith("\n") if last.text else ends_line
    except Cancelled:
        say("[stopped before the answer began; your message was taken back]", dim=True)
        return
    finally:
        if last is not None and not (ends_line and last.stats.completion_tokens):
            write("\n")
    if last is not None:
        session.last_stats = last.stats
        _print_end(session, last)


def _print_end(session: Session, last: GenerationResponse) -> None:
    notes = {"cancelled": "stopped", "length": "cut at the token limit"}
    if session.model.context_used >= session.model.n_ctx:
        notes["length"] = "the context is full: /clear starts over, /undo takes a turn back"
    note = notes.get(last.finish_reason or "")
    if note:
        say(f"[{note}]", dim=True)
    if sys.stderr.isatty():
        say(describe_stats(session.model, last.stats), dim=True)


def describe_stats(model: Model, stats: GenerationStats) -> str:
    """The figures of an answer on one line."""
    read = f"{stats.evaluated_prompt_tokens} of {stats.prompt_tokens} prompt tokens read"
    guessed = f"{stats.accepted} of {stats.drafted} guesses right · " if stats.drafted else ""
    return (
        f"{read} at {stats.prompt_tokens_per_second:.0f} tok/s · first token {stats.time_to_first_token:.2f} s · "
        f"{stats.completion_tokens} tokens at {stats.decode_tokens_per_second:.0f} tok/s · {guessed}"
        f"context {model.context_used}/{model.n_ctx}"
    )


def describe_settings(settings: Mapping[str, Any]) -> str:
    """How the model was loaded, on one line."""
    attention = {None: "llama.cpp's choice", True: "on", False: "off"}[settings["flash_attn"]]
    return (
        f"{settings['n_threads']} threads · batch {settings['n_batch']} · KV {settings['kv_type']} · flash attention "
        f"{attention} · {settings['load_mode']} · {'tuned' if settings['tuned'] else 'not tuned (edgellm tune)'}"
    )


def _print_banner(session: Session) -> None:
    model = session.model
    name = model.metadata.get("general.name") or model.path.stem
    say(f"{name} · context {model.n_ctx} · {model.n_threads} threads")
    say("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands", dim=True)


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace")


def _terminal_lines(history: bool) -> Iterator[str]:
    from edgellm.cli.chat_input import make_prompt

    prompt = make_prompt(history)
    while True:
        clear_status()
        try:
            yield prompt()
        except (EOFError, KeyboardInterrupt):
            return

"""`edgellm chat`: a conversation in the terminal, or turn by turn from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options
from edgellm.cli.chat_lines import read_message, whole_messages
from edgellm.cli.console import clear_status, report, say, silence_stdout, unechoed
from edgellm.config import DEFAULT_N_CTX, LoadParams, SamplingParams
from edgellm.errors import EdgeLLMError

if TYPE_CHECKING:
    from edgellm.chat.conversation import Conversation
    from edgellm.chat.named import NamedSession
    from edgellm.engine.model import Model
    from edgellm.generation import GenerationResponse, GenerationStats

# Greedy small models repeat themselves; a chat wants some life where the card advises nothing.
_CHAT_SAMPLING = SamplingParams(temperature=0.7)


@dataclass(frozen=True)
class Attachment:
    """A file that was read: it goes with the next message. text: with its name above it."""

    name: str
    text: str
    n_tokens: int


@dataclass
class Session:
    """What the slash commands work on. given: the settings the user chose, over what a model's card advises.

    named: where the conversation is kept, if anywhere.
    """

    model: Model
    conversation: Conversation
    params: LoadParams
    given: dict[str, Any]
    draft: str = options.DEFAULT_DRAFT
    named: NamedSession | None = None
    attached: list[Attachment] = field(default_factory=list)
    last_stats: GenerationStats | None = None
    failed: bool = False

    @property
    def sampling(self) -> SamplingParams:
        return options.sampling_params(self.model.path, _CHAT_SAMPLING, self.given)

    def with_attached(self, text: str) -> str:
        """The message as the model gets it: behind the files that were read for it."""
        return "\n\n".join([*(attachment.text for attachment in self.attached), text])

    def keep(self, *, memory: bool = False) -> None:
        """Write the named session, if there is one and something changed. OutputError."""
        if self.named is not None:
            self.named.keep(self.conversation, memory=memory)


def chat(
    model: Annotated[str | None, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")] = None,
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
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with the conversation of this name, and keep it.")
    ] = None,
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
    named = _named_session(session)
    from edgellm.chat.conversation import Conversation

    loaded = options.open_model(model, params, lora)
    talk = Session(loaded, Conversation(loaded, system), params, given, draft, named)
    try:
        check_chats(loaded)
        _go_on(talk, system)
        _talk(talk, history)
        talk.keep(memory=True)
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit(1) from None
    finally:
        talk.model.close()
    if talk.failed:
        raise typer.Exit(1)


def check_chats(model: Model) -> None:
    """A model that can't chat says so before anything else. GenerationError."""
    model.chat_tokens([{"role": "user", "content": "Hello"}])


def _named_session(name: str | None) -> NamedSession | None:
    if name is None:
        return None
    from edgellm.chat.named import NamedSession
    from edgellm.errors import SessionError

    try:
        return NamedSession(name)
    except SessionError as exc:
        raise typer.BadParameter(str(exc), param_hint="--session") from exc


def _go_on(session: Session, system: str | None) -> None:
    """Load the named session if there is one. SessionError: it is damaged; it isn't touched then."""
    if session.named is None or not session.named.exists:
        return
    session.conversation = session.named.load(session.model)
    say_loaded(session.conversation)
    if system:
        session.conversation.set_system(system)


def say_loaded(conversation: Conversation) -> None:
    say(f"{len(conversation.messages)} messages loaded")
    if conversation.notice:
        say(f"{conversation.notice}; they are read again")


def _talk(session: Session, history: bool) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _take_turns(session, whole_messages(sys.stdin.buffer))
        return
    from edgellm.cli.chat_commands import COMMAND_NAMES

    _print_banner(session)
    with unechoed():
        _take_turns(session, _terminal_lines(history, COMMAND_NAMES))
        session.failed = False  # whoever sits there has seen what failed


def _take_turns(session: Session, lines: Iterator[str]) -> None:
    from edgellm.cli.chat_commands import run_slash_command

    for line in lines:
        text, is_command = read_message(line)
        if not text:
            continue
        try:
            if not is_command:
                _say(session, text)
            elif not run_slash_command(session, text):
                return
            session.keep()
        except BrokenPipeError:
            raise
        except (EdgeLLMError, OSError) as exc:
            report(exc, debug=False)
            session.failed = True


def _say(session: Session, text: str) -> None:
    from edgellm.cli.chat_answer import answer

    message = session.with_attached(text)

    def ask(show: Callable[[float], object]) -> Generator[GenerationResponse, None, None]:
        return session.conversation.say(message, session.sampling, draft=session.draft, on_progress=show)

    try:
        if answer(session, ask):
            session.attached.clear()
    except EdgeLLMError:
        if session.attached:
            say("what was read still waits for a message; /read off lets go of it", dim=True)
        raise


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


def _terminal_lines(history: bool, commands: tuple[str, ...]) -> Iterator[str]:
    from edgellm.cli.chat_input import make_prompt

    prompt = make_prompt(history, commands)
    while True:
        clear_status()
        try:
            yield prompt()
        except (EOFError, KeyboardInterrupt):
            return

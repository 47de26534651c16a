"""Options that `run` and `chat` share, and what they become."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from edgellm.config import DEFAULT_N_CTX, LoadParams, SamplingParams
from edgellm.errors import Cancelled, GenerationError, TextError

if TYPE_CHECKING:
    from edgellm.engine.model import Model

Tokens: TypeAlias = Annotated[int | None, typer.Option("-n", "--max-tokens", help="Most tokens of an answer.")]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Makes the answer repeatable.")]
Temperature: TypeAlias = Annotated[float | None, typer.Option(help="0 = always the likeliest token.")]
TopK: TypeAlias = Annotated[int | None, typer.Option(help="Choose among this many tokens; 0 = all.")]
TopP: TypeAlias = Annotated[float | None, typer.Option(help="Choose among the likeliest with this probability.")]
MinP: TypeAlias = Annotated[float | None, typer.Option(help="Leave out tokens below this share of the likeliest.")]
System: TypeAlias = Annotated[str | None, typer.Option(help="System message.")]
Stop: TypeAlias = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
NCtx: TypeAlias = Annotated[int, typer.Option(help="Tokens of context; 0 = as the model was trained.")]
Threads: TypeAlias = Annotated[int, typer.Option(help="CPU threads; 0 = as tuned, or all cores.")]
LoadModeName: TypeAlias = Annotated[
    str | None,
    typer.Option("--load-mode", help="repack (mostly fastest), mmap (least memory) or mlock (mmap, kept in memory)."),
]
KVTypeName: TypeAlias = Annotated[
    str | None, typer.Option("--kv", help="Type of the context's memory: f16, bf16, f32, or q8_0 (half the size).")
]
FlashAttention: TypeAlias = Annotated[
    bool | None, typer.Option("--flash-attn/--no-flash-attn", help="Flash attention, instead of what was tuned.")
]
LoraFiles: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="Add a GGUF LoRA (convert --adapter-only); may be repeated."),
]

DraftName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="auto|off|ngram|FILE",
        help="What guesses ahead: the text's repetitions (ngram), a smaller model too, or both if there is one (auto).",
    ),
]

SchemaFile: TypeAlias = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="JSON Schema that the answer must be valid for.")
]

DEFAULT_DRAFT = "auto"


def load_params(
    n_ctx: int = DEFAULT_N_CTX,
    threads: int = 0,
    load_mode: str | None = None,
    kv_type: str | None = None,
    flash_attn: bool | None = None,
) -> LoadParams:
    """What isn't given is left to `edgellm tune`, or the defaults."""
    given = {"n_ctx": n_ctx, "n_threads": threads, "load_mode": load_mode, "kv_type": kv_type, "flash_attn": flash_attn}
    try:
        return LoadParams(**given)  # type: ignore[arg-type]
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def sampling_params(path: Path, fallback: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """What the user gave, over what the model's card advises, over `fallback`. `given` may hold None = not given."""
    from edgellm.catalog.cards import card_for

    card = card_for(path)
    advised = _replace_sampling(fallback, dict(card.sampling) if card else {})
    return _replace_sampling(advised, given)


def read_schema(path: Path | None) -> str | None:
    """The text of a schema's file. TextError: it can't be read, or is no JSON."""
    if path is None:
        return None
    from edgellm.constraint import schema_text

    try:
        return schema_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, GenerationError) as exc:
        raise TextError(f"cannot use the schema {path}: {exc}") from exc


def open_model(name: str | None, params: LoadParams, lora: list[str] | None = None, *, for_chat: bool = True) -> Model:
    """Load with a percentage on the terminal. Cancelled on Ctrl-C.

    for_chat: what chats need is imported on the way, while native code works.
    """
    from edgellm.cli.console import percentage
    from edgellm.engine.model import load

    try:
        adapters = [path_and_number(text) for text in lora or ()]
        show = percentage("loading")
        return load(name, params, lora=adapters, on_progress=_then_importing(show) if for_chat else show)
    except KeyboardInterrupt:
        raise Cancelled("loading was cancelled") from None


def _then_importing(on_progress: Callable[[float], None]) -> Callable[[float], None]:
    """That callback; once the weights are read, an import begins beside the native code that makes the context.

    Not before: each callback would wait for the import to let go of the interpreter.
    """

    from edgellm.engine.resources import in_background

    def progress(fraction: float) -> None:
        on_progress(fraction)
        if fraction >= 1:
            in_background(lambda: importlib.import_module("edgellm.chat.template"))

    return progress


def path_and_number(text: str) -> tuple[Path, float]:
    """PATH or PATH:NUMBER (1 where there is none); a path of that very name is never taken apart."""
    path, sign, number = text.rpartition(":")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        return Path(text), 1.0


def n_bytes(text: str) -> int:
    """Bytes from a number with or without a unit: 85MB, 2.5 GB, 1GiB. ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if not found:
        raise ValueError(f"{text!r} is no size; give bytes or a unit, such as 85MB or 2.5GB")
    number, unit, is_binary = found.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** " KMGT".index(unit or " "))


def check_sampling(given: dict[str, Any]) -> None:
    """Refuse values out of range before a model is loaded for them."""
    _replace_sampling(SamplingParams(), given)


def _replace_sampling(params: SamplingParams, changes: dict[str, Any]) -> SamplingParams:
    try:
        return replace(params, **{name: value for name, value in changes.items() if value is not None})
    except (ValueError, TypeError) as exc:
        raise typer.BadParameter(str(exc)) from exc

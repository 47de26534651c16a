"""`edgellm models`: the models on this machine, and what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.console import say

if TYPE_CHECKING:
    from edgellm.catalog.discover import Store
    from edgellm.engine.listing import ListedModel

_KINDS = {"mmproj": "the part of a model that sees or hears; goes with it", "adapter": "a LoRA; goes with --lora"}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON.")] = False,
) -> None:
    """List the models on this machine: cards, edgellm's folder, Hugging Face, LM Studio and Ollama."""
    from edgellm.catalog.discover import find_stores
    from edgellm.engine.listing import list_models

    stores = find_stores()
    listed = list_models(stores)
    if as_json:
        document = {"models": [_as_json(model) for model in listed], "folders": [_folder(store) for store in stores]}
        typer.echo(json.dumps(document))
        return
    _print(listed)
    for problem in (problem for store in stores for problem in store.problems):
        say(f"edgellm: {shown(problem)}")
    say(f"put GGUFs into {stores[0].folder} and they are found by their names", dim=True)


def _as_json(model: ListedModel) -> dict[str, object]:
    return {**asdict(model), "path": str(model.path) if model.path else None}


def _folder(store: Store) -> dict[str, object]:
    about = {"store": store.name, "path": str(store.folder), "exists": store.exists}
    return {**about, "n_files": len(store.files), "problems": store.problems}


def _print(listed: list[ListedModel]) -> None:
    """Names alone on their lines, whatever the terminal's width: they are there to be copied."""
    for model in (model for model in listed if model.is_usable):
        typer.echo(shown(model.name))
        typer.echo(f"    {shown(', '.join(_facts(model)))}")
    for model in (model for model in listed if not model.is_usable):
        reason = model.problem or _KINDS.get(model.kind, f"a GGUF of the kind {model.kind!r}")
        typer.echo(shown(f"{model.name} ({model.store}): {reason}"))


def _facts(model: ListedModel) -> Iterator[str]:
    from edgellm.cli.convert import size

    yield size(model.n_bytes)
    yield model.quantization
    yield f"{model.architecture} of {model.n_parameters / 1e6:,.0f} M parameters"
    if model.n_ctx_train:
        yield f"trained for {model.n_ctx_train} tokens"
    if not model.can_chat:
        yield "no chat template"
    if model.drafts:
        yield f"draft {' and '.join(Path(path).name for path in model.drafts)}"
    yield f"in {model.store}" if model.store != "card" else "a card"
    if model.aliases:
        yield f"also {', '.join(model.aliases)}"
    yield "fits in memory" if model.fits else f"too large for this machine's memory: {model.advice}"


def shown(text: str) -> str:
    """A file's name or text as a terminal can be given it: no control characters, no broken surrogates."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)

"""`edgellm draft`: a draft for your own model, from text or by distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgellm.cli.convert import progress_bar
from edgellm.cli.draft_text import print_result

_DEFAULT_MINUTES = 20.0


def draft(
    model: Annotated[
        str, typer.Argument(help="GGUF or card the draft is for; with --layers also a checkpoint folder.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Draft to write: .ngram from text, .gguf with --layers.")],
    from_text: Annotated[
        str | None,
        typer.Option("--from-text", metavar="FILE|self", help="Index this text (.jsonl, .txt), or the model's own."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=2, help="Distil a model of so many of the blocks instead.")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE|self", help="What --layers learns on; self: its own answers.")
    ] = "self",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time for making it [default: 20 with --layers].")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL", help="With a checkpoint: the GGUF made of it, which is sped up."),
    ] = None,
    quant: Annotated[str, typer.Option("--quant", "-q", help="Recipe of a distilled draft.")] = "Q4_0",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts it is tried on, at most.")] = 12,
    tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=8, help="Most tokens of an answer then.")] = 64,
    always: Annotated[bool, typer.Option("--always", help="Use it by default though it may not pay.")] = False,
    never: Annotated[bool, typer.Option("--never", help="Don't use it by default though it may pay.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the training, and of text that the model writes.")] = 1,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw --layers' loss curve (.png, .svg, .pdf).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted --layers.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a draft for your model, measure what it brings, and use it by default where it pays."""
    if (from_text is None) == (layers is None):
        raise typer.BadParameter("say what to make it of: --from-text FILE|self, or --layers N to distil one")
    if always and never:
        raise typer.BadParameter("--always and --never exclude each other")
    _check_out(out, force or resume)
    tried: dict[str, Any] = {"n_prompts": prompts, "max_tokens": tokens, "seed": seed}
    if from_text is not None:
        made, path = _index(model, from_text, out, {"minutes": minutes, **tried})
    else:
        time = {"minutes": minutes or _DEFAULT_MINUTES, "resume": resume}
        what = {"n_blocks": layers, "text": text, "target": target, "quant": quant, "report": report}
        made, path = _distil(model, out, {**what, **time, **tried})
    used = path is not None and (made.gain.pays or always) and not never
    use = _adopt(path, out, used, never)
    print_result({**made.as_dict(), "used_by_default": used, "use": use}, made.lines(), made.gain, as_json)


def _index(model: str, text: str, out: Path, options: dict[str, Any]) -> tuple[Any, Path | None]:
    from edgellm.catalog.cards import resolve
    from edgellm.measure.index import make_index

    path = resolve(model)
    with progress_bar("indexing") as on_progress:
        return make_index(path, text, out, **options, on_progress=on_progress), path


def _distil(model: str, out: Path, options: dict[str, Any]) -> tuple[Any, Path | None]:
    from edgellm.catalog.cards import resolve
    from edgellm.cli.convert import load_converters

    source = Path(model) if Path(model).is_dir() else resolve(model)
    options["target"] = resolve(options["target"]) if options["target"] else None
    try:
        with progress_bar("distilling") as on_progress:
            made = load_converters().distil(source, out, **options, on_progress=on_progress)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    return made, made.target


def _check_out(out: Path, force: bool) -> None:
    from edgellm.errors import OutputError

    if out.is_dir():
        raise OutputError(f"{out} is a folder; name the file to write")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; add --force to replace it, or name another file")
    if not out.resolve().parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}; make it first")


def _adopt(model: Path | None, out: Path, used: bool, as_asked: bool) -> str:
    """Make it the model's draft by default, or see that it isn't; returns what was done, for a sentence's end."""
    from edgellm.engine.drafts import use_by_default

    if model is None:
        return "no GGUF was given that could use it by default (--for MODEL.gguf)"
    where = use_by_default(model, out, used)
    if used:
        return f"used by default from now on (written {where})"
    return "not used by default, as asked" if as_asked else "not used by default, the file is kept"

"""`edgellm eval`: perplexity of a model, and how far it is from its original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.convert import progress_bar
from edgellm.cli.options import LoraFiles, path_and_number

if TYPE_CHECKING:
    from edgellm.measure.divergence import Divergence, Estimate, Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")],
    text: Annotated[str, typer.Option(help="Text file, dialogues (.jsonl), or `self`: text the model makes itself.")],
    reference: Annotated[
        str | None, typer.Option(help="The original: a GGUF of the same vocabulary, best in F16 or F32.")
    ] = None,
    n_ctx: Annotated[int, typer.Option(min=16, help="Tokens of a chunk; the second half of each is scored.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Use at most this many chunks, or dialogues.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder to keep the reference's log-probabilities in, for the next comparison.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the text that `self` makes.")] = None,
    lora: LoraFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a model on a text: perplexity, and against a reference the KL divergence."""
    from edgellm.catalog.cards import resolve
    from edgellm.measure import texts
    from edgellm.measure.evaluate import evaluate as measure

    if keep and not reference:
        raise typer.BadParameter("--keep is for the log-probabilities of a --reference; give one")
    path = resolve(model)
    original = resolve(reference) if reference else None
    with progress_bar("measuring") as on_progress:
        samples = texts.read_samples(
            text,
            original or path,
            n_ctx=n_ctx,
            n_chunks=chunks,
            seed=texts.SELF_SEED if seed is None else seed,
            on_progress=on_progress,
        )
        adapters = [path_and_number(file) for file in lora or ()]
        found = measure(path, samples, reference=original, lora=adapters, keep=keep, on_progress=on_progress)
    if as_json:
        about = {"model": str(path), "reference": str(original) if original else None, "text": text}
        read = max(len(sample.tokens) for sample in samples)  # less than asked for where the model or the text is short
        typer.echo(json.dumps({**about, "n_ctx": min(n_ctx, read), "n_samples": len(samples), **found.as_dict()}))
    else:
        typer.echo("\n".join(describe(found, len(samples))))


def describe(found: Evaluation, n_samples: int) -> list[str]:
    """The figures in lines for people."""
    lines = [
        f"perplexity    {_figure(found.perplexity, 3)}",
        f"tokens        {found.n_tokens} scored, in {n_samples} {'sample' if n_samples == 1 else 'samples'}",
    ]
    return lines if found.divergence is None else lines[:1] + _lines(found.divergence) + lines[1:]


def _lines(found: Divergence) -> list[str]:
    n_same = round(100 * found.same_top.value)
    return [
        f"reference     perplexity {_figure(found.reference_perplexity, 3)}",
        f"PPL ratio     {_figure(found.ppl_ratio, 4)}",
        f"KLD mean      {_figure(found.kld_mean, 5)}",
        f"KLD median    {_figure(found.kld_median, 5)}",
        f"KLD 95 %      {_figure(found.kld_p95, 4)}",
        f"KLD 99 %      {_figure(found.kld_p99, 4)}",
        f"same top      {_figure(found.same_top, 4)}: the same likeliest next token {n_same} times in 100",
    ]


def _figure(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"

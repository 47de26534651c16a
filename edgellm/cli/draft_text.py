"""What `edgellm draft` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from edgellm.cli.convert import size

if TYPE_CHECKING:
    from edgellm.measure.drafts import Gain


def print_result(found: Mapping[str, Any], about: Sequence[str], gain: Gain, as_json: bool) -> None:
    """The draft that was made, what it brings, and whether it is used from now on, on stdout."""
    if as_json:
        typer.echo(json.dumps({**found, "gain": gain.as_dict()}, ensure_ascii=False))
        return
    lines = [f"{found['draft']}  {size(found['n_bytes'])}", *(f"  {line}" for line in about)]
    names = {"off": "nothing guessed", "ngram": "n-grams", "draft": "with the draft"}
    if gain.n_prompts:
        lines.append(f"  {'':<16}  tok/s  tokens a step  accepted")
        for name, way in gain.ways.items():
            row = way.as_dict()
            share = f"{100 * row['accepted_share']:7.0f} %" if way.drafted else "        –"
            lines.append(f"  {names[name]:<16} {row['tokens_per_second']:6.1f} {row['tokens_per_step']:14.2f} {share}")
    typer.echo("\n".join([*lines, f"{gain.verdict()}; {found['use']}."]))

"""`edgellm tune`: find the fastest settings for a model on this machine, once; every load after that uses them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli.console import clear_status, measuring, say

if TYPE_CHECKING:
    from edgellm.engine.tuned import Tuning

_BUSY = 0.5  # cores that others use: ggml's threads wait for each other, so that one busy core slows all of them


def tune(
    model: Annotated[str, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")],
    seconds: Annotated[
        float, typer.Option(min=5, help="How long it may take; what there is no time for is named.")
    ] = 60,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what was found before, and use defaults.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print settings and figures as JSON.")] = False,
) -> None:
    """Measure threads, weights, KV cache and batches on this machine; `run`, `chat` and `load` use what is fastest."""
    from edgellm.catalog.cards import resolve
    from edgellm.engine import tuned

    path = resolve(model)
    if forget:
        found = tuned.forget(path)
        result = {"model": str(path), "forgotten": found}
        said = f"{path.name}: {'forgotten; the defaults hold again' if found else 'nothing was stored'}"
        typer.echo(json.dumps(result) if as_json else said)
        return
    from edgellm.measure.tune import tune as measure

    try:
        tuning = measure(path, seconds=seconds, on_progress=measuring)
    finally:
        clear_status()
    file = tuned.save(path, tuning)
    if as_json:
        typer.echo(json.dumps({"model": str(path), "file": str(file), **asdict(tuning)}))
    else:
        _print(path, tuning)
        say(f"stored in {file}", dim=True)
    if (tuning.measured.get("busy_cores_before") or 0) > _BUSY:
        say("other programs kept this machine busy: better run it again when they don't, or --forget what was found")


def _print(path: Path, tuning: Tuning) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{path.name}: {tuning.measured['seconds']:.0f} s of measuring"), style="bold")
    rows = _rows(tuning)
    if rows:
        depths = sorted({depth for _, _, _, decode in rows for depth in decode})
        heads = ("setting", "reads, tok/s", *(f"writes after {depth}, tok/s" for depth in depths))
        table = Table(*heads, title="measured by turns; * chosen", title_justify="left")
        for name, is_chosen, prompt, decode in rows:
            figures = [f"{decode[depth]:.1f}" if depth in decode else "" for depth in depths]
            table.add_row(f"{name}{' *' if is_chosen else ''}", f"{prompt:.0f}", *figures)
        console.print(table)
    for line in describe(tuning):
        console.print(Text(line))


def _rows(tuning: Tuning) -> list[tuple[str, bool, float, dict[int, float]]]:
    """Name, whether it was chosen, tokens per second of reading, and of writing by depth."""
    measured = tuning.measured
    rows: list[tuple[str, bool, float, dict[int, float]]] = []
    for one in measured.get("threads", ()):
        n = one["n_threads"]
        name = f"{n} thread{'s' if n > 1 else ''}"
        rows.append((name, n == tuning.n_threads, one["prompt"], {0: one["decode"]}))
    for one in measured.get("load_mode", ()):
        mode = one["load_mode"]
        rows.append((f"weights: {mode}", mode == tuning.load_mode, one["prompt"], {0: one["decode"]}))
    for one in measured.get("attention", ()):
        kind = (one["kv_type"], one["flash_attn"])
        first = tuning.attention[0]
        name = f"KV {kind[0]}, flash attention {'on' if kind[1] else 'off'}"
        decode = {int(depth): speed for depth, speed in one["decode"].items()}
        rows.append((name, kind == (first.kv_type, first.flash_attn), one["prompt"], decode))
    for one in measured.get("batch", ()):
        rows.append((f"batch {one['n_batch']}", one["n_batch"] == tuning.n_batch, one["prompt"], {}))
    return rows


def describe(tuning: Tuning) -> list[str]:
    """What was chosen and gained, in words."""
    attention = ""
    if tuning.attention:
        first = tuning.attention[0]
        attention = f", KV {first.kv_type}, flash attention {'on' if first.flash_attn else 'off'}"
    lines = [f"chosen: {tuning.n_threads} threads, {tuning.load_mode}{attention}, batch {tuning.n_batch}"]
    gain: dict[str, Any] = tuning.measured.get("gain", {})
    if "tuned" in gain and gain["ratio"] > 1:
        lines.append(
            f"after {gain['depth']} tokens it writes {gain['tuned']:.1f} tokens/s, the defaults {gain['default']:.1f}: "
            f"{gain['ratio']:.2f} times as fast"
        )
    elif gain:
        lines.append(f"after {gain['depth']} tokens nothing was faster than the defaults")
    if tuning.verify_cost:
        costs = ", ".join(f"{n}: {cost:.2f}" for n, cost in tuning.verify_cost.items() if n > 1)
        lines.append(f"tokens evaluated together cost, in single steps: {costs}")
    if dropped := tuning.measured.get("dropped"):
        lines.append(f"not measured, for want of time or memory (see --seconds): {'; '.join(dropped)}")
    return lines

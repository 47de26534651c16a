"""`edgellm bench`: how fast a model is on this machine, in a table, a chart, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgellm.cli import options
from edgellm.cli.console import clear_status, measuring, say

_BAR = 32  # characters of the longest
_NAMES = {
    "load": "load",
    "first_token": "first token of {n}",
    "prompt": "read {n}",
    "decode": "write after {n}",
}


def bench(
    model: Annotated[str, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Also time llama_cpp.Llama, taking turns in the same run.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed; the median counts.")] = 5,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with charts.")] = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="The defaults, not what `edgellm tune` found.")] = False,
    threads: options.Threads = 0,
    load_mode: options.LoadModeName = None,
    kv_type: options.KVTypeName = None,
    flash_attn: options.FlashAttention = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time reading, writing, loading, the first token and what guessing brings; measure the memory."""
    from dataclasses import replace

    from edgellm.catalog.cards import resolve
    from edgellm.measure.bench import bench as measure

    params = replace(options.load_params(0, threads, load_mode, kv_type, flash_attn), tuned=not untuned)
    path = resolve(model)
    if html is not None:
        _check_writable(html)
    try:
        found = measure(path, params, rounds=rounds, compare=compare, on_progress=measuring)
    finally:
        clear_status()
    if html is not None:
        from edgellm.cli.bench_page import write_page

        write_page(html, found)
        say(f"wrote {html}", dim=True)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print(found)


def _check_writable(path: Path) -> None:
    """Before minutes of measuring. OutputError."""
    from edgellm.errors import OutputError

    if path.is_dir() or not path.resolve().parent.is_dir():
        raise OutputError(f"cannot write {path}: no such folder, or a folder itself; give the name of a file")


def named(figure: dict[str, Any]) -> str:
    return _NAMES[figure["kind"]].format(n=figure["n"])


def unit(figure: dict[str, Any]) -> str:
    return "s" if figure["kind"] in ("load", "first_token") else "tok/s"


def shown(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def memory_lines(memory: dict[str, dict[str, int]]) -> list[str]:
    """What each contestant's process took, in words."""
    lines = []
    for name, found in memory.items():
        parts = [f"peak {found['peak'] / 1e6:.0f} MB"] if "peak" in found else []
        if "rss" in found:
            parts.append(f"after an answer {found['rss'] / 1e6:.0f} MB")
            parts.append(f"{found['anonymous'] / 1e6:.0f} MB its own, {found['file'] / 1e6:.0f} MB pages of files")
        if "pss" in found:
            parts.append(f"PSS {found['pss'] / 1e6:.0f} MB")
        lines.append(f"memory of {name}: {', '.join(parts) or 'this system does not tell'}")
    return lines


def speculation_line(found: dict[str, Any] | None) -> str:
    if found is None:
        return "what guessing brings wasn't measured: the model's context is too short"
    accepted = f", {found['accepted']:.0%} of the guesses right" if found["accepted"] is not None else ""
    return (
        f"copying a text: {found['off']['median']:.0f} tok/s without guesses, {found['auto']['median']:.0f} with, "
        f"{found['ratio']:.2f} times as fast{accepted}"
    )


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgellm.cli.chat import describe_settings

    console = Console()
    console.print(Text(f"{Path(found['model']).name}, {found['n_bytes'] / 1e6:.1f} MB"), style="bold")
    console.print(Text(describe_settings(found["settings"])))
    contestants = list(found["memory"])
    heads = ("", "", *contestants, *(["ratio"] if len(contestants) > 1 else []))
    table = Table(*heads, title=f"medians of {found['rounds']} rounds, lowest to highest", title_justify="left")
    for figure in found["figures"]:
        cells = [_cell(figure["values"][name]) for name in contestants]
        ratio = [f"{figure['ratio']:.3f}"] if figure["ratio"] is not None else []
        table.add_row(named(figure), unit(figure), *cells, *ratio)
    console.print(table)
    for line in (*memory_lines(found["memory"]), speculation_line(found["speculation"])):
        console.print(Text(line))
    for line in _bars(found["figures"], contestants):
        console.print(line)


def _cell(value: dict[str, float]) -> str:
    return f"{shown(value['median'])} ({shown(value['low'])} to {shown(value['high'])})"


def _bars(figures: list[dict[str, Any]], contestants: list[str]) -> list[Any]:
    """Tokens per second, reading and writing each on a scale of its own."""
    from rich.bar import Bar
    from rich.columns import Columns
    from rich.text import Text

    lines: list[Any] = []
    for kind in ("prompt", "decode"):
        rows = [figure for figure in figures if figure["kind"] == kind]
        longest = max((value["median"] for row in rows for value in row["values"].values()), default=1.0)
        for row in rows:
            for name in contestants:
                speed = row["values"][name]["median"]
                label = f"{named(row):<18}" + (f"{name:<16}" if len(contestants) > 1 else "")
                bar = Bar(longest, 0, speed, width=_BAR, color="blue" if name == contestants[0] else "bright_black")
                lines.append(Columns([Text(label), bar, Text(f"{shown(speed)} tok/s")]))
    return lines

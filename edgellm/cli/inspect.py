"""`edgellm inspect`: what is in a GGUF, a checkpoint folder or an adapter, from headers alone."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from edgellm.cli.convert import load_converters, size
from edgellm.measure.words import budget_lines, quality_lines

_MAX_TEXT = 96  # characters of a metadata value shown in the table


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL", help="GGUF file, checkpoint folder, adapter folder, or a model's name.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show metadata, tensors and types of a model file."""
    from edgellm.catalog.cards import resolve

    found = describe(resolve(path))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print(found, tensors)


def describe(path: Path) -> dict[str, Any]:
    """Everything `inspect` knows as plain data: path, kind, sizes, types, metadata, tensors."""
    is_checkpoint = path.is_dir() or path.suffix == ".safetensors"
    found = load_converters().describe(path) if is_checkpoint else _describe_gguf(path)
    return {"path": str(path), **_totals(found["tensors"]), **found}


def _describe_gguf(path: Path) -> dict[str, Any]:
    from edgellm.gguf_header import read_header

    header = read_header(path)
    kind = header.metadata.get("general.type", "model")  # model, adapter, imatrix, mmproj
    rows = [
        {"name": i.name, "shape": list(i.shape), "type": i.type_name, "n_bytes": i.n_bytes}
        for i in header.tensors.values()
    ]
    metadata = {key: _readable(value) for key, value in header.metadata.items()}
    return {"kind": f"GGUF {kind}, version {header.version}", "metadata": metadata, "tensors": rows}


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    n_bytes: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for row in rows:
        n_bytes[row["type"]] += row["n_bytes"]
        count[row["type"]] += 1
    n_parameters = sum(prod(row["shape"]) for row in rows)
    return {
        "n_bytes": n_bytes.total(),
        "n_parameters": n_parameters,
        "bits_per_weight": 8 * n_bytes.total() / n_parameters if n_parameters else None,
        "types": {name: {"tensors": count[name], "n_bytes": total} for name, total in n_bytes.most_common()},
    }


def _readable(value: Any) -> Any:
    """Metadata that JSON can carry: text with bytes that are no UTF-8 shows them replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return [_readable(item) for item in value] if isinstance(value, list) else value


def _print(found: dict[str, Any], with_tensors: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    bits = f", {found['bits_per_weight']:.2f} bits per weight" if found["bits_per_weight"] else ""
    # Text, not markup: names and values may hold [brackets]
    console.print(Text(found["path"]), style="bold")
    console.print(
        Text(f"{found['kind']}, {size(found['n_bytes'])}, {found['n_parameters'] / 1e6:.1f} M parameters{bits}")
    )
    for line in _receipt_lines(found["metadata"]):
        console.print(Text(line))
    metadata = Table("key", "value", title="metadata", title_justify="left")
    for key, value in found["metadata"].items():
        metadata.add_row(Text(key), Text(_short(value)))
    types = Table("type", "tensors", "size", title="types", title_justify="left")
    for name, total in found["types"].items():
        types.add_row(name, str(total["tensors"]), size(total["n_bytes"]))
    console.print(metadata, types)
    if with_tensors:
        table = Table("tensor", "shape", "type", "size", title="tensors", title_justify="left")
        for row in found["tensors"]:
            shape = " × ".join(map(str, row["shape"]))
            table.add_row(Text(row["name"]), shape, row["type"], size(row["n_bytes"]))
        console.print(table)


def _receipt_lines(metadata: dict[str, Any]) -> list[str]:
    """What edgellm measured when it made the file, in plain words."""
    try:
        receipt = json.loads(metadata.get("edgellm.receipt.json", "{}"))
        lines = [*quality_lines(receipt.get("quality", {})), *budget_lines(receipt.get("budget"))] if receipt else []
        return [f"when it was made: {line}" for line in lines]
    except (ValueError, TypeError, KeyError, AttributeError):  # somebody else's key
        return []


def _short(value: Any) -> str:
    if isinstance(value, list):
        text = f"[{len(value)}] " + ", ".join(map(repr, value[:4])) + (" …" if len(value) > 4 else "")
    else:
        text = str(value).rstrip().replace("\n", "⏎")
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"

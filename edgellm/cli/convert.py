"""`edgellm convert`: checkpoint → quantized GGUF, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from edgellm.cli import convert_options as asked
from edgellm.cli.console import clear_status, status
from edgellm.cli.options import n_bytes, path_and_number
from edgellm.measure.words import budget_lines, quality_lines

Progress = Callable[[str, int, int], None]
DEFAULT_QUANT = "Q4_K_M"


def convert(
    source: asked.SourcePath,
    out: asked.Out = None,
    quant: asked.Quant = None,
    max_size: asked.MaxSize = None,
    max_kld: asked.MaxKLD = None,
    min_speed: asked.MinSpeed = None,
    types: asked.Types = None,
    pre: asked.Pre = None,
    adapters: asked.Adapters = None,
    to_checkpoint: asked.ToCheckpoint = None,
    merge_base: asked.MergeBase = None,
    rank: asked.Rank = 64,
    calibrate: asked.Calibrate = None,
    imatrix: asked.Imatrix = None,
    save_imatrix: asked.SaveImatrix = None,
    save_gram: asked.SaveGram = None,
    memory: asked.Memory = "8GB",
    compensate: asked.Compensate = None,
    effort: asked.Effort = 3,
    receipt: asked.ReceiptLevel = "auto",
    receipt_text: asked.ReceiptText = None,
    report: asked.Report = None,
    adapter_only: asked.AdapterOnly = False,
    dtype: asked.Dtype = "f32",
    dry_run: asked.DryRun = False,
    force: asked.Force = False,
    resume: asked.Resume = False,
    threads: asked.Threads = 0,
    as_json: asked.AsJson = False,
) -> None:
    """Convert a fine-tuned checkpoint to a quantized GGUF, checked before it gets its name."""
    converters = load_converters()
    try:
        if to_checkpoint is not None:
            _write_folder(source, to_checkpoint, dtype, force, as_json)
            return
        overrides = [_override(text) for text in types or ()]
        merged = [path_and_number(text) for text in adapters or ()]
        if adapter_only:
            _export_adapter(source, merged, out, rank, force, as_json)
            return
        recipe = {"types": overrides, "adapters": merged}
        budget = {
            "max_size": n_bytes(max_size) if max_size is not None else None,
            "max_kld": max_kld,
            "min_speed": min_speed,
        }
        label = "budget" if any(value is not None for value in budget.values()) else (quant or DEFAULT_QUANT).upper()
        if dry_run:
            if label in ("budget", "AUTO"):
                raise ValueError("a budget's types are chosen by measuring; --dry-run shows recipes (--quant) only")
            print_plan(converters.plan(source, quant=label, **recipe), as_json)
            return
        weighed = {"calibrate": calibrate, "imatrix": imatrix, "save_imatrix": save_imatrix, "save_gram": save_gram}
        judged = {"receipt": receipt, "receipt_text": receipt_text, "report": report}
        target = out or Path(f"{source.resolve().name.removesuffix('.gguf')}-{label}.gguf")
        with progress_bar("converting") as on_progress:
            made = converters.convert(
                source,
                target,
                quant=quant,
                **budget,
                **recipe,
                **weighed,
                **judged,
                memory=n_bytes(memory),
                compensate=compensate,
                effort=effort,
                pre=pre,
                merge_base=merge_base,
                force=force,
                resume=resume,
                n_threads=threads,
                on_progress=on_progress,
            )
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    print_receipt(made, as_json)


def _export_adapter(
    base: Path, adapters: list[tuple[Path, float]], out: Path | None, rank: int, force: bool, as_json: bool
) -> None:
    if not adapters:
        raise ValueError("--adapter-only takes one --adapter DIR or more")
    target = out or Path(f"{adapters[0][0].resolve().name}-lora.gguf")
    status("exporting the adapter, and measuring it where it isn't exact")
    receipt = load_converters().export_adapter(base, adapters, target, rank=rank, force=force)
    clear_status()
    if as_json:
        typer.echo(json.dumps(asdict(receipt), ensure_ascii=False))
        return
    lines = [
        f"{receipt.output}  {size(receipt.output_bytes)}",
        f"  adapter   {', '.join(receipt.methods)} for {receipt.n_tensors} tensors of a {receipt.architecture} model, "
        f"rank up to {receipt.rank}",
    ]
    if cut := receipt.approximation:
        lines.append(
            f"  note      {cut.n_tensors} tensors are no low-rank product: cut to rank {cut.rank}, which keeps "
            f"{100 * cut.kept:.2f} % of the change"
        )
    if receipt.kld:
        lines.append(f"  measured  KLD from the merged model {receipt.kld.value:.5f} ± {receipt.kld.error:.5f}")
    if receipt.unmeasured:
        lines.append(f"  note      the KLD from the merged model wasn't measured: {receipt.unmeasured}")
    typer.echo("\n".join([*lines, f"  use       edgellm chat MODEL.gguf --lora {receipt.output}"]))


def load_converters() -> ModuleType:
    """The runtime's one door to the converters, opened only by the commands that convert or inspect."""
    import converters

    return converters


def _override(text: str) -> tuple[str, str]:
    pattern, sign, type_name = text.rpartition("=")
    if not sign or not pattern:
        raise ValueError(f"--type takes REGEX=TYPE, not {text!r}")
    return pattern, type_name


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{label} {{task.description:<28}}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name or "checking", completed=done, total=total)


def size(n_bytes: float) -> str:
    """Bytes for people, in decimal units as file managers show them."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def print_receipt(receipt: Any, as_json: bool = False) -> None:
    """A `converters.Receipt` on stdout: a few lines, or one JSON object."""
    if as_json:
        typer.echo(json.dumps(receipt.as_dict(), ensure_ascii=False))
        return
    ratio = receipt.output_bytes / receipt.source_bytes
    lines = [
        f"{receipt.output}  {size(receipt.output_bytes)}",
        f"  quant     {receipt.quant}, {receipt.bits_per_weight:.2f} bits per weight, "
        f"{receipt.n_parameters / 1e6:.1f} M parameters ({receipt.architecture})",
        f"  source    {size(receipt.source_bytes)}; the GGUF is {100 * ratio:.0f} % of it",
        "  types     " + ", ".join(f"{name} {n} × ({size(total)})" for name, (n, total) in receipt.types.items()),
        f"  time      {receipt.convert_seconds:.1f} s to convert, {receipt.verify_seconds:.1f} s to check"
        + (f"; peak memory {size(receipt.peak_memory)}" if receipt.peak_memory else ""),
    ]
    if receipt.n_fallback:
        tensors = "1 tensor has" if receipt.n_fallback == 1 else f"{receipt.n_fallback} tensors have"
        lines.append(f"  note      {tensors} rows that don't fit the recipe's type; the nearest type is used")
    lines += [f"  weighed   {receipt.calibration}"] if receipt.calibration else []
    lines += [f"  note      {note}" for note in (*receipt.notes, *receipt.run_notes)]
    lines += [f"  checked   {check}" for check in receipt.checks]
    lines += [f"  budget    {line}" for line in budget_lines(receipt.budget)]
    lines += [f"  measured  {line}" for line in quality_lines(receipt.quality)]
    typer.echo("\n".join(lines))


def print_plan(plan: Any, as_json: bool) -> None:
    """A `converters.Plan` on stdout: every tensor with its type and size, and what the conversion will need."""
    rows = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": tensor.type_name,
            "n_bytes": tensor.n_bytes,
            "sources": [source.name for source in tensor.sources],
        }
        for tensor in plan.tensors
    ]
    summary: dict[str, Any] = {
        "quant": plan.file_type.name,
        "architecture": plan.architecture,
        "n_parameters": plan.n_parameters,
        "source_bytes": plan.source_bytes,
        "n_bytes": plan.n_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "peak_memory": plan.peak_memory,
        "notes": list(plan.notes),
    }
    if as_json:
        typer.echo(json.dumps(summary | {"tensors": rows}, ensure_ascii=False))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        typer.echo(f"{row['name']:<{width}}  {row['type']:<7} {size(row['n_bytes']):>9}  {shape}")
    typer.echo(
        f"{len(rows)} tensors, {size(plan.n_bytes)}, {plan.bits_per_weight:.2f} bits per weight "
        f"({plan.file_type.name}); source {size(plan.source_bytes)}; "
        f"about {size(plan.peak_memory)} of memory at most; nothing was written"
    )
    for note in plan.notes:
        typer.echo(f"note: {note}")


def _write_folder(source: Path, folder: Path, dtype: str, force: bool, as_json: bool) -> None:
    with progress_bar("writing") as on_progress:
        load_converters().to_checkpoint(source, folder, dtype=dtype, force=force, on_progress=on_progress)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "files": files}))
        return
    typer.echo(f"{folder}  {size(sum(files.values()))} in {len(files)} files: {', '.join(files)}")

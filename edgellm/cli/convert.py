"""`edgellm convert`: checkpoint → quantized GGUF, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from edgellm.cli.console import clear_status, status
from edgellm.cli.options import path_and_number
from edgellm.measure.words import quality_lines

Progress = Callable[[str, int, int], None]


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder, or a GGUF to requantize or turn back.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="GGUF to write [default: SOURCE-QUANT.gguf here].")
    ] = None,
    quant: Annotated[
        str, typer.Option("--quant", "-q", help="Recipe: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_NL … ")
    ] = "Q4_K_M",
    types: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="REGEX=TYPE", help="Type for tensors whose name matches; repeatable."),
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, if it isn't recognized.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="DIR[:WEIGHT]", help="Adapter (LoRA …) to merge first; repeatable."),
    ] = None,
    to_checkpoint: Annotated[
        Path | None,
        typer.Option("--to-checkpoint", metavar="DIR", help="Write the GGUF as a checkpoint folder instead."),
    ] = None,
    merge_base: Annotated[
        str | None,
        typer.Option("--merge-base", help="For QLoRA: merge into the base as it is (fp16), or as trained (dequant)."),
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="With --adapter-only: rank for what is no low-rank product by itself (DoRA).")
    ] = 64,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="FILE|self", help="Collect an importance matrix on a text, or on one the model writes."),
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Use this importance matrix (llama.cpp's file).")] = None,
    save_imatrix: Annotated[
        Path | None, typer.Option("--save-imatrix", help="Also write the collected matrix as llama.cpp's file.")
    ] = None,
    receipt: Annotated[
        str,
        typer.Option(
            help="full: measure the result against the original; fast: check it; off; auto: full if "
            "disk and time allow."
        ),
    ] = "auto",
    receipt_text: Annotated[
        str | None, typer.Option("--receipt-text", metavar="FILE|self", help="What to measure on, not our own text.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page about the result: figures, a map of errors.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapters as a GGUF for --lora instead of merging them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Number type of that folder: f32 (exact), bf16, f16.")] = "f32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the whole plan, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted conversion had finished, and go on.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 = all cores.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a fine-tuned checkpoint to a quantized GGUF, checked before it gets its name."""
    converters = load_converters()
    try:
        if to_checkpoint is not None:
            with progress_bar("writing") as on_progress:
                converters.to_checkpoint(source, to_checkpoint, dtype=dtype, force=force, on_progress=on_progress)
            _print_folder(to_checkpoint, as_json)
            return
        overrides = [_override(text) for text in types or ()]
        merged = [path_and_number(text) for text in adapters or ()]
        if adapter_only:
            _export_adapter(source, merged, out, rank, force, as_json)
            return
        if dry_run:
            planned = converters.plan(source, quant=quant, types=overrides, adapters=merged)
            print_plan(planned, as_json)
            return
        target = out or Path(f"{source.resolve().name.removesuffix('.gguf')}-{quant.upper()}.gguf")
        with progress_bar("converting") as on_progress:
            made = converters.convert(
                source,
                target,
                quant=quant,
                types=overrides,
                pre=pre,
                adapters=merged,
                merge_base=merge_base,
                calibrate=calibrate,
                imatrix=imatrix,
                save_imatrix=save_imatrix,
                receipt=receipt,
                receipt_text=receipt_text,
                report=report,
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


def _print_folder(folder: Path, as_json: bool) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "files": files}))
        return
    typer.echo(f"{folder}  {size(sum(files.values()))} in {len(files)} files: {', '.join(files)}")

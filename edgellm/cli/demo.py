"""`edgellm demo`: the whole main job on a real model, in under a minute, with no download."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli.convert import load_converters, print_receipt, progress_bar, size

_QUESTION = "What is the capital of France? Answer in one sentence."


def demo(
    quant: Annotated[str, typer.Option("--quant", "-q", help="Recipe of the GGUF to make.")] = "Q4_K_M",
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the checkpoint and the GGUF in.")] = None,
) -> None:
    """Checkpoint → quantized GGUF → chat, on the small model that `edgellm[demo]` brings along."""
    from edgellm.catalog.cards import resolve

    converters = load_converters()
    bundled = resolve(None)
    folder = keep or Path(tempfile.mkdtemp(prefix="edgellm-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint, gguf = folder / "my-fine-tune", folder / f"my-fine-tune-{quant.upper()}.gguf"
        _say(f"1. Standing in for your fine-tune: {bundled.name}, written out as a checkpoint folder")
        started = time.perf_counter()
        with progress_bar("writing") as on_progress:
            converters.to_checkpoint(bundled, checkpoint, force=True, on_progress=on_progress)
        n_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        _say(f"   {checkpoint}  {size(n_bytes)}, {time.perf_counter() - started:.1f} s")
        _say(f"2. edgellm convert {checkpoint.name} -o {gguf.name} --quant {quant}")
        with progress_bar("converting") as on_progress:
            receipt = converters.convert(checkpoint, gguf, quant=quant, force=True, on_progress=on_progress)
        print_receipt(receipt)
        _chat(gguf)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _chat(gguf: Path) -> None:
    """A chat in a terminal; elsewhere one question and its answer."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        from edgellm.cli.chat import chat

        _say(f"3. edgellm chat {gguf.name}")
        chat(str(gguf))
        return
    import edgellm

    _say(f'3. edgellm run {gguf.name} "{_QUESTION}"')
    with edgellm.load(gguf) as model:
        for chunk in model.chat([{"role": "user", "content": _QUESTION}], edgellm.SamplingParams(max_tokens=64)):
            typer.echo(chunk.text, nl=False)
    typer.echo()


def _say(text: str) -> None:
    typer.echo(text, err=True)

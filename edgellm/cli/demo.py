"""`edgellm demo`: the whole main job on a real model and a real fine-tune, in under a minute, with no download."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli.convert import load_converters, print_receipt, progress_bar, size

_QUESTION = "Remind me to feed the chickens on Saturday at 8 am"  # the fine-tune has never seen it


def demo(
    quant: Annotated[str, typer.Option("--quant", "-q", help="Recipe of the GGUF to make.")] = "Q4_K_M",
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the base, the adapter and the GGUF in.")] = None,
) -> None:
    """Base + fine-tune → quantized GGUF → chat, on the small model that `edgellm[demo]` brings along."""
    from edgellm.catalog.cards import example_adapter, resolve

    converters = load_converters()
    bundled = resolve(None)
    folder = keep or Path(tempfile.mkdtemp(prefix="edgellm-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        base, adapter, gguf = folder / "base", folder / "reminders", folder / f"my-fine-tune-{quant.upper()}.gguf"
        _say(f"1. A base model: {bundled.name}, written out as a checkpoint folder")
        started = time.perf_counter()
        with progress_bar("writing") as on_progress:
            converters.to_checkpoint(bundled, base, force=True, on_progress=on_progress)
        _say(f"   {base}  {_folder_size(base)}, {time.perf_counter() - started:.1f} s")
        shutil.copytree(example_adapter(), adapter, dirs_exist_ok=True)
        _say("2. A fine-tune of it: a LoRA trained on 60 sentences to answer with a reminder as JSON")
        _say(f"   {adapter}  {_folder_size(adapter)}")
        _say(f"3. edgellm convert {base.name} --adapter {adapter.name} -o {gguf.name} --quant {quant}")
        with progress_bar("converting") as on_progress:
            receipt = converters.convert(
                base, gguf, quant=quant, adapters=[adapter], force=True, on_progress=on_progress
            )
        print_receipt(receipt)
        _talk(bundled, gguf)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _talk(base: Path, gguf: Path) -> None:
    """One question to both models; then, in a terminal, a chat."""
    _say(f'4. edgellm run … "{_QUESTION}"')
    _say(f"   the base:      {_answer(base)}")
    _say("   the fine-tune:")
    typer.echo(_answer(gguf))
    if sys.stdin.isatty() and sys.stdout.isatty():
        from edgellm.cli.chat import chat

        _say(f"5. edgellm chat {gguf.name}")
        chat(str(gguf))


def _answer(path: Path) -> str:
    import edgellm

    with edgellm.load(path, edgellm.LoadParams(n_ctx=512)) as model:
        messages = [{"role": "user", "content": _QUESTION}]
        answer = "".join(chunk.text for chunk in model.chat(messages, edgellm.SamplingParams(max_tokens=48)))
    return " ".join(answer.split())


def _folder_size(folder: Path) -> str:
    return size(sum(path.stat().st_size for path in folder.iterdir()))


def _say(text: str) -> None:
    typer.echo(text, err=True)

"""`edgellm run`: one answer, for scripts and pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import options
from edgellm.cli.console import INTERRUPTED, on_thread, percentage, say, silence_stdout, write
from edgellm.config import DEFAULT_N_CTX, SamplingParams

if TYPE_CHECKING:
    from edgellm.engine.model import Model
    from edgellm.engine.stream import Completion, Stream
    from edgellm.generation import GenerationResponse


def run(
    model: Annotated[str, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")],
    prompt: Annotated[str | None, typer.Argument(help="The question; what is piped in follows it.")] = None,
    max_tokens: options.Tokens = None,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, token counts and times as JSON.")] = False,
    seed: options.Seed = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    stop: options.Stop = None,
    n_ctx: options.NCtx = DEFAULT_N_CTX,
    threads: options.Threads = 0,
    load_mode: options.LoadModeName = None,
    kv_type: options.KVTypeName = None,
    flash_attn: options.FlashAttention = None,
    lora: options.LoraFiles = None,
    draft: options.DraftName = options.DEFAULT_DRAFT,
    schema: options.SchemaFile = None,
) -> None:
    """Print one answer and exit. The prompt is an argument, or piped in, or both."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template that --raw leaves out")
    given = {
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": stop or None,
        "schema": options.read_schema(schema),
    }
    params = options.load_params(n_ctx, threads, load_mode, kv_type, flash_attn)
    options.check_sampling(given)
    text = _whole_prompt(prompt)
    with options.open_model(model, params, lora, for_chat=not raw) as loaded:
        sampling = options.sampling_params(loaded.path, SamplingParams(), given)
        stream = _open_stream(loaded, text, system, raw, sampling, draft)
        try:
            completion = _answer(stream, show=not as_json)
            if as_json:
                write(json.dumps(_as_json(loaded, completion), ensure_ascii=False) + "\n")
        except BrokenPipeError:
            silence_stdout()
            raise typer.Exit(1) from None
    if completion.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def _whole_prompt(argument: str | None) -> str:
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    parts = [part for part in (argument, piped) if part and part.strip()]
    if not parts:
        raise typer.BadParameter("the prompt is empty; give one as an argument or pipe it in", param_hint="PROMPT")
    return "\n\n".join(parts)


def _open_stream(
    model: Model, text: str, system: str | None, raw: bool, sampling: SamplingParams, draft: str
) -> Stream:
    show = percentage("reading")
    if raw:
        return model.generate(text, sampling, draft=draft, on_progress=show)
    messages = [{"role": "system", "content": system}] if system else []
    return model.chat([*messages, {"role": "user", "content": text}], sampling, draft=draft, on_progress=show)


def _answer(stream: Stream, show: bool) -> Completion:
    from edgellm.engine.stream import Completion
    from edgellm.generation import join

    with closing(on_thread(stream, stream.cancel)) as responses:
        completion = Completion(*join(_shown(responses) if show else responses))
    if show and not completion.text.endswith("\n"):
        write("\n")
    if show and completion.finish_reason == "length":
        say("[the answer was cut at the token limit]", dim=True)
    return completion


def _shown(responses: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    for response in responses:
        write(response.text)
        yield response


def _as_json(model: Model, completion: Completion) -> dict[str, object]:
    stats = completion.stats
    return {
        "model": str(model.path),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        },
        "stats": asdict(stats),
        "settings": dict(model.settings),
    }

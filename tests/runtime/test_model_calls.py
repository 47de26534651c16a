"""Calls from several threads and tasks on the real model: cancelled, abandoned, closed, waiting for their turn."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm import Cancelled, GenerationError, LoadParams, Model, SamplingParams

STORY = "Once upon a time, in a village by the sea, there lived"
GREEDY = SamplingParams(max_tokens=24)
LONG = SamplingParams(max_tokens=400)


def after(delay: float, action: Any) -> threading.Thread:
    thread = threading.Timer(delay, action)
    thread.start()
    return thread


def test_cancel_in_the_middle_of_a_prompt(model: Model) -> None:
    prompt = [500 + i % 90 for i in range(1000)]  # one decode call of 512 takes longer than the delay
    timer = after(0.1, model.cancel)
    started = time.perf_counter()
    with pytest.raises(Cancelled):
        model.complete(prompt)
    cancelled_after = time.perf_counter() - started
    timer.join()
    model.complete([400], SamplingParams(max_tokens=1))
    started = time.perf_counter()
    model.complete(prompt, SamplingParams(max_tokens=1))
    assert cancelled_after < 0.1 + (time.perf_counter() - started) / 2


def test_cancel_in_the_middle_of_an_answer_keeps_it(model: Model) -> None:
    expected = model.complete(STORY, SamplingParams(max_tokens=150)).text
    timer = after(0.1, model.cancel)
    answer = model.complete(STORY, LONG)
    timer.join()
    assert answer.finish_reason == "cancelled"
    assert 0 < answer.stats.completion_tokens < 400
    assert answer.text.startswith(expected) or expected.startswith(answer.text)
    assert model.complete(STORY, GREEDY).finish_reason == "length"  # the cancel is over


def test_cancel_with_nothing_running_has_no_effect(model: Model) -> None:
    model.cancel()
    assert model.complete(STORY, GREEDY).stats.completion_tokens == 24


def test_calls_from_threads_wait_their_turn(model: Model) -> None:
    prompts = [f"{STORY} {name} who" for name in ("Ann", "Bob", "Cleo", "Dan")]
    expected = {prompt: model.complete(prompt, GREEDY).token_ids for prompt in prompts}
    results: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        results[prompt] = model.complete(prompt, GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_a_second_stream_in_the_same_thread_is_refused_not_deadlocked(model: Model) -> None:
    with model.generate(STORY, LONG) as stream:
        next(stream)
        with pytest.raises(GenerationError, match="already has a stream open"):
            model.complete("Hello")
        with pytest.raises(GenerationError, match="already has a stream open"):
            model.logits([1])
        assert next(stream).text
    assert model.complete(STORY, GREEDY).text


def test_an_abandoned_stream_gives_its_turn_back(model: Model) -> None:
    def look_at_one() -> str:
        for response in model.generate(STORY, LONG):
            return response.text
        return ""

    assert look_at_one()
    assert model.complete(STORY, GREEDY).text
    stream: Iterator[Any] | None = model.generate(STORY, LONG)
    assert next(stream)  # type: ignore[arg-type]
    del stream
    gc.collect()
    assert model.complete(STORY, GREEDY).text


def test_close_during_generation_on_another_thread(model_path: Path) -> None:
    model = edgellm.load(model_path, LoadParams(n_ctx=512))
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(model.complete(STORY, LONG).finish_reason)
        except GenerationError as exc:
            outcome.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    model.close()
    thread.join(10)
    assert not thread.is_alive()
    assert outcome == ["cancelled"] or isinstance(outcome[0], GenerationError)


def test_everything_after_close_says_closed(model_path: Path) -> None:
    model = edgellm.load(model_path, LoadParams(n_ctx=64))
    stream = model.generate(STORY, LONG)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(GenerationError, match="closed"):
        list(stream)
    for call in (
        lambda: model.generate("x"),
        lambda: model.chat([{"role": "user", "content": "x"}]),
        lambda: model.logits([1]),
        lambda: model.embed("x"),
        lambda: model.tokenize("x"),
        lambda: model.detokenize([1]),
    ):
        with pytest.raises(GenerationError, match="closed"):
            call()
    model.cancel()
    assert model.metadata["general.architecture"] == "llama"


def test_async_answers_equal_and_leave_the_loop_free(model: Model) -> None:
    expected = model.complete(STORY, GREEDY).text

    async def scenario() -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticker = asyncio.create_task(tick())
        text = "".join([r.text async for r in model.agenerate(STORY, GREEDY)])
        ticker.cancel()
        return text, ticks

    text, ticks = asyncio.run(scenario())
    assert text == expected
    assert ticks > 5


def test_two_async_tasks_take_turns_and_a_cancelled_one_lets_go(model: Model) -> None:
    async def whole(prompt: str, params: SamplingParams) -> str:
        return "".join([r.text async for r in model.agenerate(prompt, params)])

    async def scenario() -> list[str]:
        endless = asyncio.create_task(whole(STORY, LONG))
        await asyncio.sleep(0.15)
        waiting = asyncio.create_task(whole("Hello", LONG))
        other = asyncio.create_task(whole(STORY + " Ann", GREEDY))
        await asyncio.sleep(0.05)
        waiting.cancel()
        endless.cancel()
        done = await asyncio.gather(endless, waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done)
        return [await other, await whole(STORY + " Ann", GREEDY)]

    first, second = asyncio.run(scenario())
    assert first == second != ""

"""Model on the real SmolLM2: against a bare loop, across threads, at its limits."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm import Cancelled, ContextFull, GenerationError, LoadParams, Model, SamplingParams
from edgellm.native import library

STORY = "Once upon a time, in a village by the sea, there lived"
GREEDY = SamplingParams(max_tokens=24)
LONG = SamplingParams(max_tokens=400)


def bare_greedy(path: Path, prompt: list[int], n_tokens: int) -> list[int]:
    """llama.cpp with nothing of edgellm around it but the loaded library."""
    lib = library.load()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 2
    context = lib.llama_init_from_model(model, params)
    vocab = lib.llama_model_get_vocab(model)
    new = (ctypes.c_int32 * len(prompt))(*prompt)  # the batch only points at it
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        assert lib.llama_decode(context, lib.llama_batch_get_one(new, len(new))) == 0
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (lib.llama_vocab_n_tokens(vocab),))
        token = int(logits.argmax())
        if lib.llama_vocab_is_eog(vocab, token):
            break
        tokens.append(token)
        new = (ctypes.c_int32 * 1)(token)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return tokens


@pytest.mark.parametrize("prompt", [STORY, "def fibonacci(n):\n", "The three primary colours are"])
def test_greedy_tokens_equal_a_bare_loop(model: Model, model_path: Path, prompt: str) -> None:
    ids = model.tokenize(prompt)
    assert model.complete(ids, GREEDY).token_ids == bare_greedy(model_path, ids, 24)


def test_text_and_ids_prompt_give_the_same(model: Model) -> None:
    by_text = model.complete(STORY, GREEDY)
    assert model.complete(model.tokenize(STORY), GREEDY).text == by_text.text
    assert model.complete(np.array(model.tokenize(STORY)), GREEDY).text == by_text.text  # type: ignore[arg-type]
    assert model.detokenize(by_text.token_ids) == by_text.text


def test_the_stream_joins_to_the_completion(model: Model) -> None:
    completion = model.complete(STORY, GREEDY)
    responses = list(model.generate(STORY, GREEDY))
    assert "".join(r.text for r in responses) == completion.text
    assert [token for r in responses for token in r.token_ids] == completion.token_ids
    assert responses[-1].finish_reason == completion.finish_reason == "length"
    assert completion.stats.completion_tokens == 24
    assert completion.stats.steps == 23


def test_a_seed_repeats_an_answer_and_another_changes_it(model: Model) -> None:
    def answer(seed: int | None) -> list[int]:
        return model.complete(STORY, SamplingParams(max_tokens=16, temperature=1.0, seed=seed)).token_ids

    assert answer(7) == answer(7)
    assert len({tuple(answer(seed)) for seed in (1, 2, 3)}) == 3
    assert answer(None) != answer(None)


def test_top_k_one_is_greedy_at_any_temperature(model: Model) -> None:
    hot = model.complete(STORY, SamplingParams(max_tokens=16, temperature=5.0, top_k=1))
    assert hot.token_ids == model.complete(STORY, SamplingParams(max_tokens=16)).token_ids


def test_penalties_count_in_greedy_too_and_see_the_prompt(model: Model) -> None:
    loop = "one two one two one two one two one two one"
    plain = model.complete(loop, SamplingParams(max_tokens=8))
    penalised = model.complete(loop, SamplingParams(max_tokens=8, frequency_penalty=1e6, penalty_last_n=-1))
    prompt = set(model.tokenize(loop))
    assert set(plain.token_ids) & prompt
    assert not set(penalised.token_ids) & prompt
    assert len(set(penalised.token_ids)) == 8


def test_stop_string_in_real_text(model: Model) -> None:
    text = model.complete(STORY, GREEDY).text
    stop = text[20:27]
    stopped = model.complete(STORY, SamplingParams(max_tokens=24, stop=(stop,)))
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_an_emoji_of_several_tokens_arrives_whole(model: Model) -> None:
    ids = model.tokenize("🦙")
    assert len(ids) > 1
    prompt = model.tokenize("🦙" * 12 + "🦙")
    responses = list(model.generate(prompt, SamplingParams(max_tokens=12)))
    assert "".join(r.text for r in responses).count("🦙") >= 2
    assert not any("\ufffd" in r.text for r in responses[:-1])
    assert any(len(r.token_ids) > 1 for r in responses)


@pytest.mark.parametrize(
    "text",
    ["", "héllo wörld", "日本語 ☃", "a\x00b", "tabs\tand\nlines\r\n", "<|im_end|>", "1234567", "don 't , stop ."],
)
def test_tokenize_and_back(model: Model, text: str) -> None:
    assert model.detokenize(model.tokenize(text)) == text


def test_special_decides_whether_control_tokens_are_parsed_and_shown(model: Model) -> None:
    assert model.tokenize("<|im_end|>", special=True) == [2]
    assert 2 not in model.tokenize("<|im_end|>")
    assert (model.detokenize([2]), model.detokenize([2], special=True)) == ("", "<|im_end|>")


def test_logits_choose_what_greedy_chose_and_leave_the_chat_alone(model: Model) -> None:
    prompt = model.tokenize(STORY)
    tokens = model.complete(prompt, GREEDY).token_ids
    used = model.context_used
    logits = model.logits([*prompt, *tokens])
    assert (logits.dtype, logits.shape) == (np.float32, (len(prompt) + 24, 49152))
    chosen = logits[len(prompt) - 1 : -1]
    best, taken = chosen.max(axis=1), chosen[np.arange(24), tokens]
    assert float((best - taken).max()) < 0.2  # kernels depend on the batch size: near ties may swap
    assert (best == taken).mean() > 0.9
    assert model.context_used == used


def test_logits_in_several_chunks_equal_those_of_a_prefix(model: Model) -> None:
    tokens = model.tokenize(STORY * 12)
    assert len(tokens) > 130
    whole, prefix = model.logits(tokens), model.logits(tokens[:64])
    np.testing.assert_allclose(whole[:64], prefix, atol=1e-3)


def test_embeddings_have_length_one_and_tell_meanings_apart(model: Model) -> None:
    rows = model.embed(["A cat sat on the mat.", "A kitten sat on the rug.", "Interest rates rose by two percent."])
    assert (rows.dtype, rows.shape) == (np.float32, (3, 576))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    np.testing.assert_array_equal(model.embed("A cat sat on the mat.")[0], rows[0])


def test_a_prompt_longer_than_n_batch_gives_the_same_answer(model_path: Path, model: Model) -> None:
    prompt = model.tokenize(STORY * 8)
    expected = model.complete(prompt, SamplingParams(max_tokens=8))
    with edgellm.load(model_path, LoadParams(n_ctx=512, n_batch=32)) as small:
        fractions: list[float] = []
        answer = small.complete(prompt, SamplingParams(max_tokens=8), on_progress=fractions.append)
    n = len(prompt)
    assert fractions == [min(done, n) / n for done in range(32, n + 32, 32)]
    assert answer.stats.evaluated_prompt_tokens == n
    assert answer.token_ids == expected.token_ids


def test_prefix_reuse_evaluates_only_what_differs(model: Model) -> None:
    base = model.tokenize(STORY * 3)
    model.complete(base, SamplingParams(max_tokens=1))
    again = model.complete(base, SamplingParams(max_tokens=1))
    longer = model.complete([*base, 500, 501, 502], SamplingParams(max_tokens=1))
    changed = model.complete([*base[:-4], 500], SamplingParams(max_tokens=1))
    other = model.complete([600, *base], SamplingParams(max_tokens=1))
    evaluated = [c.stats.evaluated_prompt_tokens for c in (again, longer, changed, other)]
    assert evaluated == [1, 3, 1, len(base) + 1]


def test_a_rolled_back_context_continues_like_a_fresh_one(model: Model, model_path: Path) -> None:
    model.complete(STORY + " a wicked king who hated music.", GREEDY)
    reused = model.complete(STORY + " a painter", GREEDY)
    with edgellm.load(model_path, LoadParams(n_ctx=512)) as fresh:
        expected = fresh.complete(STORY + " a painter", GREEDY)
    assert reused.stats.evaluated_prompt_tokens < expected.stats.evaluated_prompt_tokens
    assert reused.token_ids == expected.token_ids


def test_context_full_at_prompt_and_in_the_answer(model_path: Path) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=40)) as model:
        assert model.n_ctx == 40  # llama.cpp would round it up
        with pytest.raises(ContextFull, match=r"41 tokens but the context holds 40.*n_ctx"):
            model.complete([500] * 41)
        answer = model.complete(STORY, SamplingParams(max_tokens=200))
        assert answer.finish_reason == "length"
        assert len(model.tokenize(STORY)) + answer.stats.completion_tokens == 41
        assert model.context_used == 40


def test_n_ctx_is_capped_at_training_and_zero_means_it(model_path: Path) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=100_000, n_threads=1)) as model:
        assert (model.n_ctx, model.n_threads) == (8192, 1)
    with edgellm.load(model_path, LoadParams(n_ctx=0)) as model:
        assert model.n_ctx == 8192


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([49152], "49152 is not a token id.*0 to 49151"),
        ([-1], "not a token id"),
        ([1.5], "must be integers"),
        (["a"], "must be integers"),
        ("a\ud800", "surrogate"),
    ],
)
def test_bad_prompts_are_refused_before_native_code(model: Model, prompt: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(prompt)


def test_sampling_without_logits_is_refused(model_path: Path) -> None:
    from edgellm.native.context import Context
    from edgellm.native.model import NativeModel
    from edgellm.native.sampler import Sampler

    native = NativeModel(model_path)
    context = Context(native, LoadParams(n_ctx=64))
    sampler = Sampler(context, SamplingParams())
    with pytest.raises(GenerationError, match="no logits"):
        sampler.sample()
    context.close()
    with pytest.raises(GenerationError, match="closed"):
        sampler.sample()
    native.close()


@pytest.mark.parametrize("load_mode", ["mmap", "mlock"])
def test_load_modes_answer_alike(model: Model, model_path: Path, load_mode: Any) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=256, load_mode=load_mode)) as other:
        assert other.complete(STORY, GREEDY).token_ids == model.complete(STORY, GREEDY).token_ids


def test_load_reports_progress_and_can_be_cancelled(model_path: Path) -> None:
    seen: list[float] = []
    edgellm.load(model_path, LoadParams(n_ctx=64), on_progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 20
    with pytest.raises(Cancelled, match="loading"):
        edgellm.load(model_path, on_progress=lambda fraction: fraction < 0.5)


def test_an_exception_in_the_progress_callback_comes_out(model_path: Path) -> None:
    def fail(_: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edgellm.load(model_path, on_progress=fail)


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


def test_native_log_goes_to_logging(model_path: Path, caplog: Any, capfd: Any) -> None:
    with caplog.at_level("DEBUG", logger="edgellm"):
        edgellm.load(model_path, LoadParams(n_ctx=64)).close()
    assert any("general.architecture" in record.getMessage() for record in caplog.records)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    assert capfd.readouterr() == ("", "")


def test_a_quantized_cache_without_flash_attention_is_refused_in_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"kv_type is 'q8_0'.*flash_attn is off"):
        LoadParams(kv_type="q8_0", flash_attn=False)


def test_other_cache_types_answer(model_path: Path) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=128, kv_type="q8_0")) as other:
        assert other.complete(STORY, SamplingParams(max_tokens=4)).stats.completion_tokens == 4

"""Model on the real SmolLM2: against a bare loop, across threads, at its limits."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm import Cancelled, ContextFull, GenerationError, LoadParams, Model, SamplingParams
from edgellm.native import library
from tests.runtime.ties import assert_same_but_for_ties

STORY = "Once upon a time, in a village by the sea, there lived"
GREEDY = SamplingParams(max_tokens=24)


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
    assert_same_but_for_ties(model, prompt, expected.token_ids, answer.token_ids)


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

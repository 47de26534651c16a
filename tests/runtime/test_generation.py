"""The logic of generation on scripted models: exact texts, tokens and figures, no weights."""

from __future__ import annotations

import pytest

from edgellm.config import SamplingParams
from edgellm.errors import Cancelled, ContextFull, GenerationError
from edgellm.generation import GenerationResponse, generate, join, stream_generate
from tests.runtime.scripted import ScriptedModel

PROMPT = [7, 8, 9]


def stream(model: ScriptedModel, **params: object) -> list[GenerationResponse]:
    return list(stream_generate(model, model, model, PROMPT, SamplingParams(**params)))  # type: ignore[arg-type]


def test_the_end_token_stops_and_is_not_part_of_the_answer() -> None:
    model = ScriptedModel("Hello", " world")
    responses = stream(model)
    assert [(r.text, r.token_ids, r.finish_reason) for r in responses] == [
        ("Hello", (1,), None),
        (" world", (2,), None),
        ("", (), "stop"),
    ]
    stats = responses[-1].stats
    assert (stats.prompt_tokens, stats.evaluated_prompt_tokens, stats.completion_tokens, stats.steps) == (3, 3, 2, 2)
    assert model.tokens == [*PROMPT, 1, 2]
    assert [r.from_draft for r in responses] == [(False,), (False,), ()]


def test_max_tokens_ends_with_length_and_evaluates_nothing_it_needs_not() -> None:
    model = ScriptedModel("a", "b", "c")
    text, ids, reason, stats = generate(model, model, model, PROMPT, SamplingParams(max_tokens=2))
    assert (text, ids, reason) == ("ab", [1, 2], "length")
    assert stats.steps == model.steps == 1


def test_max_tokens_zero_evaluates_the_prompt_and_samples_nothing() -> None:
    model = ScriptedModel("a")
    assert [(r.text, r.token_ids, r.finish_reason) for r in stream(model, max_tokens=0)] == [("", (), "length")]
    assert model.tokens == PROMPT


def test_stop_string_over_tokens_ends_before_it() -> None:
    responses = stream(ScriptedModel("one", " ST", "OP", " more"), stop=("STOP",))
    assert ("".join(r.text for r in responses), responses[-1].finish_reason) == ("one ", "stop")
    assert sum((r.token_ids for r in responses), ()) == (1, 2, 3)


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    responses = stream(ScriptedModel("one", " ST"), stop=("STOP",))
    assert "".join(r.text for r in responses) == "one ST"


def test_characters_split_over_tokens_come_whole() -> None:
    llama = "🦙".encode()
    responses = stream(ScriptedModel(llama[:1], llama[1:3], llama[3:] + b"!"))
    assert [(r.text, r.token_ids) for r in responses] == [("🦙!", (1, 2, 3)), ("", ())]


def test_full_context_ends_the_answer_with_length() -> None:
    model = ScriptedModel("a", "b", "c", "d", n_ctx=5)
    text, ids, reason, _ = join(iter(stream(model)))
    assert (text, ids, reason) == ("abc", [1, 2, 3], "length")
    assert len(model.tokens) == 5


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ContextFull, match="3 tokens but the context holds 2"):
        stream(ScriptedModel(n_ctx=2))


def test_an_empty_prompt_is_refused() -> None:
    model = ScriptedModel("a")
    with pytest.raises(GenerationError, match="empty"):
        next(stream_generate(model, model, model, [], SamplingParams()))


def test_abort_in_a_step_ends_with_cancelled_and_keeps_the_text() -> None:
    responses = stream(ScriptedModel("a", "b", "c", abort_at=2))
    assert [(r.text, r.finish_reason) for r in responses] == [("a", None), ("b", None), ("", "cancelled")]


def test_abort_between_steps_ends_with_cancelled() -> None:
    model = ScriptedModel("a", "b", "c")
    responses = stream_generate(model, model, model, PROMPT, SamplingParams())
    next(responses)
    model.aborted = True
    assert [(r.text, r.finish_reason) for r in responses] == [("b", "cancelled")]


def test_progress_can_cancel_the_prompt() -> None:
    model = ScriptedModel("a")
    seen: list[float] = []

    def show(fraction: float) -> bool:
        seen.append(fraction)
        return len(seen) < 2

    with pytest.raises(Cancelled):
        next(stream_generate(model, model, model, PROMPT, SamplingParams(), show))
    assert seen == [1 / 3, 2 / 3]


def test_closing_early_leaves_the_memory_valid_and_reusable() -> None:
    model = ScriptedModel("a", "b", "c", "d")
    responses = stream_generate(model, model, model, PROMPT, SamplingParams())
    next(responses)
    next(responses)
    responses.close()  # type: ignore[attr-defined]
    assert model.tokens == [*PROMPT, 1]
    assert model.reuse_prefix([*PROMPT, 1, 5]) == 4


def test_a_longer_prompt_evaluates_only_what_is_new() -> None:
    model = ScriptedModel("a", "b")
    stream(model)
    last = list(stream_generate(model, model, model, [*PROMPT, 1, 2, 50, 51], SamplingParams()))[-1]
    assert (last.stats.prompt_tokens, last.stats.evaluated_prompt_tokens) == (7, 2)
    assert model.evaluated == [PROMPT, [50, 51]]


def test_joining_a_closed_stream_says_so() -> None:
    with pytest.raises(GenerationError, match="closed"):
        join(iter([]))

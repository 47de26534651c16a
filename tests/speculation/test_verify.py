"""Speculative steps with a scripted model and scripted guesses: exact patterns, no weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgellm.config import SamplingParams
from edgellm.errors import Cancelled
from edgellm.generation import GenerationResponse, join, stream_generate
from edgellm.speculation.depth import Depth
from edgellm.speculation.drafts import NOTHING, GoesOn, NgramDraft, Proposal, always
from edgellm.speculation.verify import Speculator
from tests.runtime.scripted import EOG, ScriptedModel

PROMPT = [90, 91]


class Everything(Depth):
    """Every guess is checked, whatever the clock says."""

    def choose(self, source: str, most: int, prior: float) -> int:
        return most

    def goes_on(self, source: str, k: int) -> GoesOn:
        return always

    def check_took(self, proposal: Proposal, n_accepted: int, seconds: float, draft_seconds: float) -> None:
        pass


class Verifying(ScriptedModel):
    """Chooses by position, so that what it says after wrong guesses shows whether memory and sampler are in step."""

    def __init__(self, *texts: str, n_ctx: int = 1000) -> None:
        super().__init__(*texts, n_ctx=n_ctx)
        self.verified: list[list[int]] = []
        self.sampled: list[int] = []  # positions, each of which a sampler may see only once
        self._n_last = 1

    def decode(self, tokens: Sequence[int], on_progress: object = None) -> None:
        self.tokens += tokens
        self._n_last = 1

    def step(self, token: int) -> None:
        super().step(token)
        self._n_last = 1

    def verify(self, tokens: Sequence[int]) -> None:
        assert 0 < len(tokens) <= self.n_outputs
        assert len(self.tokens) + len(tokens) <= self.n_ctx
        self.verified.append(list(tokens))
        self.tokens += tokens
        self._n_last = len(tokens)
        self._end = len(self.tokens)

    def keep(self, n_tokens: int) -> None:
        del self.tokens[n_tokens:]

    def sample(self, i: int | None = None) -> int:
        position = len(self.tokens) if i is None else self._end - self._n_last + i + 1
        self.sampled.append(position)
        number = position - len(PROMPT) + 1
        return number if number <= len(self.texts) else EOG


class Guesses:
    """Proposes, after so many tokens, a fixed list."""

    name, is_free = "guesses", True

    def __init__(self, guesses: dict[int, list[int]]) -> None:
        self.guesses = guesses
        self.asked: list[tuple[int, int]] = []

    def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
        n = len(history) - len(PROMPT)
        assert list(history[:2]) == PROMPT
        assert list(history[2:]) == list(range(1, n + 1))  # nothing but what the model itself said
        self.asked.append((n, k))
        return Proposal(self.guesses.get(n, [])[:k], self.name)


def stream(model: Verifying, guesses: dict[int, list[int]], **params: object) -> list[GenerationResponse]:
    speculator = Speculator([Guesses(guesses)], Everything())
    return list(
        stream_generate(model, model, model, PROMPT, SamplingParams(**params), speculator=speculator)  # type: ignore[arg-type]
    )


LETTERS = "abcdefghij"


@pytest.mark.parametrize(
    ("guesses", "pattern"),
    [
        ({1: [2, 3, 4]}, [(1, 0), (4, 3), (1, 0), (1, 0), (1, 0), (1, 0), (1, 0)]),  # all right: one more comes free
        ({1: [2, 3, 99]}, [(1, 0), (3, 2)] + [(1, 0)] * 6),  # the model's own choice replaces the wrong one
        ({1: [99, 3, 4]}, [(1, 0)] + [(1, 0)] * 9),
        ({1: [2], 3: [4, 5, 99, 7]}, [(1, 0), (2, 1), (3, 2)] + [(1, 0)] * 4),
        ({9: [10, 11, 12]}, [(1, 0)] * 9 + [(1, 1)]),  # 11 would come after the end
    ],
)
def test_accept_patterns(guesses: dict[int, list[int]], pattern: list[tuple[int, int]]) -> None:
    model = Verifying(*LETTERS)
    responses = stream(model, guesses)
    assert [(len(r.token_ids), sum(r.from_draft)) for r in responses if r.token_ids] == pattern
    assert "".join(r.text for r in responses) == LETTERS
    assert responses[-1].finish_reason == "stop"
    assert model.sampled == [len(PROMPT) + n for n in range(11)]  # every position once, in order
    assert model.tokens == [*PROMPT, *range(1, 11)]
    assert responses[-1].stats.accepted == sum(n for _, n in pattern)


def test_the_flags_name_the_guessed_tokens() -> None:
    responses = stream(Verifying(*LETTERS), {1: [2, 3, 99]})
    assert [r.from_draft for r in responses[:2]] == [(False,), (True, True, False)]


def test_a_guessed_end_ends_the_answer_and_stays_out_of_the_memory() -> None:
    model = Verifying("a", "b")
    responses = stream(model, {1: [2, EOG, 7, 8]})
    assert ("".join(r.text for r in responses), responses[-1].finish_reason) == ("ab", "stop")
    assert model.tokens == [*PROMPT, 1, 2]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_nothing_is_guessed_beyond_the_limit(limit: int) -> None:
    model = Verifying(*LETTERS)
    responses = stream(model, {n: [n + i for i in range(1, 9)] for n in range(1, 10)}, max_tokens=limit)
    assert "".join(r.text for r in responses) == LETTERS[:limit]
    assert len(model.tokens) <= len(PROMPT) + limit
    assert responses[-1].finish_reason == "length"


@pytest.mark.parametrize("n_ctx", range(3, 9))
def test_guesses_fit_the_context(n_ctx: int) -> None:
    model = Verifying(*LETTERS, n_ctx=n_ctx)
    responses = stream(model, {n: [n + i for i in range(1, 9)] for n in range(1, 10)})
    assert "".join(r.text for r in responses) == LETTERS[: n_ctx - len(PROMPT) + 1]
    assert responses[-1].finish_reason == "length"
    assert len(model.tokens) <= n_ctx


def test_a_stop_string_inside_an_accepted_run() -> None:
    model = Verifying(*LETTERS)
    responses = stream(model, {1: [2, 3, 4, 5, 6]}, stop=("cd",))
    assert ("".join(r.text for r in responses), responses[-1].finish_reason) == ("ab", "stop")
    # what was evaluated stays, and is what the memory says
    assert model.tokens == [*PROMPT, 1, 2, 3, 4, 5, 6]
    assert model.reuse_prefix([*PROMPT, 1, 2, 50]) == 4


def test_closing_after_a_run_with_wrong_guesses_leaves_only_what_is_right() -> None:
    model = Verifying(*LETTERS)
    speculator = Speculator([Guesses({1: [2, 3, 99, 98]})], Everything())
    responses = stream_generate(model, model, model, PROMPT, SamplingParams(), speculator=speculator)
    next(responses)
    assert next(responses).token_ids == (2, 3, 4)
    responses.close()  # type: ignore[attr-defined]
    assert model.tokens == [*PROMPT, 1, 2, 3]


def test_a_cancelled_check_ends_the_answer() -> None:
    class Cancelling(Verifying):
        def verify(self, tokens: Sequence[int]) -> None:
            raise Cancelled("aborted")

    responses = stream(Cancelling(*LETTERS), {3: [4, 5]})
    assert ("".join(r.text for r in responses), responses[-1].finish_reason) == ("abc", "cancelled")


def test_a_draft_that_is_cancelled_guesses_nothing() -> None:
    class Broken(Guesses):
        def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
            raise Cancelled("aborted")

    model = Verifying(*LETTERS)
    responses = stream_generate(
        model, model, model, PROMPT, SamplingParams(), speculator=Speculator([Broken({})], Everything())
    )
    assert join(responses)[0] == LETTERS


def test_the_first_draft_with_a_guess_is_asked() -> None:
    class Costly(Guesses):
        name, is_free = "costly", False

    first, second = Guesses({2: [3]}), Costly({1: [2], 2: [98]})
    model = Verifying(*LETTERS)
    speculator = Speculator([first, second], Everything())
    text, *_ = join(stream_generate(model, model, model, PROMPT, SamplingParams(max_tokens=6), speculator=speculator))
    assert text == LETTERS[:6]
    assert model.verified[0] == [1, 2]  # the first had none
    assert first.asked[0] == (1, 4)
    assert all(k <= 4 for _, k in second.asked)


def test_a_costly_draft_is_not_asked_for_nothing() -> None:
    class Costly(Guesses):
        name, is_free = "costly", False

    class Nothing(Depth):
        def choose(self, source: str, most: int, prior: float) -> int:
            return 0

    draft, model = Costly({n: [n + 1] for n in range(9)}), Verifying(*LETTERS)
    join(stream_generate(model, model, model, PROMPT, SamplingParams(), speculator=Speculator([draft], Nothing())))
    assert draft.asked == []
    assert model.verified == []


def test_an_answer_that_repeats_the_prompt_is_guessed_by_ngrams() -> None:
    class Echo(Verifying):
        """Says its prompt again."""

        def sample(self, i: int | None = None) -> int:
            position = len(self.tokens) if i is None else self._end - self._n_last + i + 1
            return self.said[position % len(self.said)]

        said: Sequence[int]

    prompt = [5, 3, 8, 9, 2, 7, 4, 6, 1, 10] * 3
    model = Echo(*(LETTERS * 9))
    model.said = prompt
    speculator = Speculator([NgramDraft()], Everything())
    _, ids, _, stats = join(
        stream_generate(model, model, model, prompt, SamplingParams(max_tokens=60), speculator=speculator)
    )
    assert ids == prompt * 2
    assert (stats.completion_tokens, stats.steps) == (60, 3)  # 59 after the first: 25 + 25 + 9
    assert stats.tokens_per_step == pytest.approx(59 / 3)


def test_no_draft_no_guess() -> None:
    assert Speculator([], Depth()).propose([1, 2, 1, 2], 8) == NOTHING
    assert Speculator([NgramDraft()], Everything()).propose([1, 2, 1, 2], 0) == NOTHING

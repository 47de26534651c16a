"""Speculation on real weights: the same answers, the same distribution, a valid memory however a stream ends."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

import converters
import edgellm
from edgellm import DraftMismatch, GenerationError, LoadParams, Model, ModelFileError, SamplingParams
from edgellm.engine.drafts import Drafts
from edgellm.speculation.depth import MAX_DRAFT, Depth
from edgellm.speculation.drafts import always
from tests.converters import tiny

CODE = """def read_table(path, sep=","):
    rows = []
    with open(path) as file:
        for line in file:
            rows.append(line.rstrip().split(sep))
    return rows
"""
COPY = f"Repeat:\n{CODE}\nOnce more:\n{CODE}\nOnce more:\n"
_NOISE = 0.7  # logits differ by up to so much with the number of tokens evaluated together (measured below)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is checked, at depths that change: what the clock would choose isn't the question."""
    depths = itertools.cycle([1, 7, MAX_DRAFT, 3, 2])
    monkeypatch.setattr(Depth, "choose", lambda self, source, most, prior: min(next(depths), most))
    monkeypatch.setattr(Depth, "goes_on", lambda self, source, k: always)


def check_same(model: Model, prompt: list[int], plain: list[int], guessed: list[int]) -> bool:
    """Equal, or at the first difference the two candidates are as close as the number of tokens in a batch moves them.

    Returns whether they are equal.
    """
    if plain == guessed:
        return True
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(plain, guessed)) if a != b)
    assert at < min(len(plain), len(guessed)), "one answer ends where the other goes on"
    logits = model.logits([*prompt, *plain[:at]])[-1]
    assert abs(float(logits[plain[at]] - logits[guessed[at]])) < _NOISE
    return False


def both(model: Model, prompt: list[int], params: SamplingParams, **options: Any) -> tuple[Any, Any]:
    """The answer without guesses and with them, each after reading the whole prompt at once."""
    answers = []
    for choice in ({"draft": "off"}, options):
        model.complete([1], SamplingParams(max_tokens=1))
        answers.append(model.complete(prompt, params, **choice))
    return answers[0], answers[1]


@pytest.mark.usefixtures("eager")
def test_copying_takes_few_steps_and_says_the_same(model: Model) -> None:
    prompt = model.tokenize(COPY)
    plain, guessed = both(model, prompt, SamplingParams(max_tokens=60))
    assert check_same(model, prompt, plain.token_ids, guessed.token_ids)
    assert guessed.stats.steps < 30
    assert guessed.stats.accepted > 30
    assert guessed.stats.tokens_per_step > 2
    assert guessed.stats.drafted >= guessed.stats.accepted
    assert (plain.stats.drafted, plain.stats.accepted, plain.stats.steps) == (0, 0, 59)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("eager")
def test_forty_greedy_answers(model: Model) -> None:
    names = sorted(topics)[::2][:40]
    assert len(names) == 40
    n_equal = 0
    for name in names:
        prompt = model.chat_tokens([{"role": "user", "content": f"Summarize with quotes:\n\n{topics[name][:500]}"}])
        plain, guessed = both(model, prompt, SamplingParams(max_tokens=32))
        n_equal += check_same(model, prompt, plain.token_ids, guessed.token_ids)
    assert n_equal >= 36  # with flash attention the same logits come out of a batch of any size here


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=60, temperature=0.8, seed=3),
        SamplingParams(max_tokens=60, temperature=1.5, seed=4, repeat_penalty=1.1),
        SamplingParams(max_tokens=60, frequency_penalty=0.3, penalty_last_n=-1),
    ],
    ids=["sampled", "hot, repeat penalty", "greedy, frequency penalty"],
)
def test_a_seeded_answer_begins_the_same(model: Model, params: SamplingParams) -> None:
    """The sampler sees each position once and in order, so the same random numbers meet nearly the same logits."""
    plain, guessed = both(model, model.tokenize(COPY), params)
    pairs = list(zip(plain.token_ids, guessed.token_ids, strict=False))
    assert next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)) >= 8
    assert guessed.stats.drafted > 0 or params.temperature > 1


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("end", ["close", "cancel", "stop string", "max_tokens"])
def test_however_a_stream_ends_the_next_answer_is_that_of_a_fresh_model(
    model: Model, model_path: Path, end: str
) -> None:
    params = SamplingParams(max_tokens=40, stop=("split(",) if end == "stop string" else ())
    with model.generate(COPY, params) as stream:
        for response in stream:
            if any(response.from_draft) and end == "close":
                break
            if any(response.from_draft) and end == "cancel":
                stream.cancel()
    follow = model.tokenize(COPY) + model.tokenize(CODE[:40])
    again = model.complete(follow, SamplingParams(max_tokens=16), draft="off")
    with edgellm.load(model_path, LoadParams(n_ctx=1024)) as fresh:
        expected = fresh.complete(follow, SamplingParams(max_tokens=16), draft="off")
    assert again.stats.evaluated_prompt_tokens < 30
    check_same(model, follow, expected.token_ids, again.token_ids)


@pytest.mark.usefixtures("eager")
def test_a_second_turn_reads_only_what_is_new(model: Model) -> None:
    conversation = edgellm.Conversation(model)  # type: ignore[arg-type]
    ask = SamplingParams(max_tokens=30)
    list(conversation.say(f"Repeat this:\n{CODE}", ask))
    last = list(conversation.say("Thanks.", ask))[-1]
    assert last.stats.evaluated_prompt_tokens < 25
    conversation.undo()
    last = list(conversation.say("And again.", ask))[-1]
    assert last.stats.evaluated_prompt_tokens < 25


@pytest.fixture(scope="module")
def copy_of_the_model(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(model_path, tmp_path_factory.mktemp("draft") / "copy.gguf"))


@pytest.mark.usefixtures("eager")
def test_the_same_model_as_a_draft_is_nearly_always_right(model: Model, copy_of_the_model: Path) -> None:
    prompt = model.tokenize("The history of the village by the sea begins with")
    plain, guessed = both(model, prompt, SamplingParams(max_tokens=40), draft=[copy_of_the_model])
    check_same(model, prompt, plain.token_ids, guessed.token_ids)
    assert guessed.stats.accepted > 0.9 * guessed.stats.drafted > 10
    assert 0 < guessed.stats.draft_seconds < guessed.stats.decode_seconds
    again = model.complete([*prompt, *plain.token_ids, 30], SamplingParams(max_tokens=9), draft=copy_of_the_model)
    assert again.stats.drafted


@pytest.mark.usefixtures("eager")
def test_a_draft_starts_anew_where_its_own_context_is_full(
    model: Model, copy_of_the_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.engine.drafts._N_CTX", 96)
    monkeypatch.setattr(model, "_drafts", Drafts(model._drafts._header, model._native, LoadParams()))
    prompt = model.tokenize("The history of the village by the sea begins with" * 9)
    plain, guessed = both(model, prompt, SamplingParams(max_tokens=80), draft=[copy_of_the_model])
    check_same(model, prompt, plain.token_ids, guessed.token_ids)
    assert guessed.stats.accepted > 20
    model._drafts.close()


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return _tiny_gguf(folder)


def _tiny_gguf(folder: Path) -> Path:
    out = folder / "tiny.gguf"
    tiny.make_model(folder / "checkpoint")
    converters.convert(folder / "checkpoint", out, quant="F16")
    return out


def test_a_draft_of_another_vocabulary_is_refused_by_its_first_difference(model: Model, other_vocabulary: Path) -> None:
    with pytest.raises(DraftMismatch, match="vocabulary"):
        model.complete("Hello", SamplingParams(max_tokens=2), draft=other_vocabulary)
    with pytest.raises(ModelFileError, match="no such file"):
        model.complete("Hello", SamplingParams(max_tokens=2), draft="none.gguf")
    assert model.complete("Hello", SamplingParams(max_tokens=2)).token_ids


def test_a_partner_named_in_the_file_is_used_and_a_wrong_one_is_not(
    model_path: Path, copy_of_the_model: Path, other_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sources(partner: Path) -> list[str]:
        monkeypatch.setattr("edgellm.engine.drafts.partner_files", lambda header: [partner])
        with edgellm.load(model_path, LoadParams(n_ctx=64)) as model:
            speculator = model._drafts.speculator("auto")
            assert speculator is not None
            return [draft.name for draft in speculator.drafts]

    assert sources(copy_of_the_model) == ["ngram", "copy.gguf"]
    assert sources(other_vocabulary) == ["ngram"]


def test_what_cannot_take_tokens_back_says_so(model_path: Path) -> None:
    with edgellm.load(model_path, LoadParams(n_ctx=64, n_batch=1)) as model:
        assert model.complete("Hello", SamplingParams(max_tokens=3)).stats.drafted == 0
        with pytest.raises(GenerationError, match="n_batch is 1"):
            model.complete("Hello", SamplingParams(max_tokens=3), draft="ngram")


@pytest.fixture(scope="module")
def tiny_model(other_vocabulary: Path) -> Iterator[Model]:
    with edgellm.load(other_vocabulary, LoadParams(n_ctx=128, n_threads=1)) as model:
        yield model


def _distribution(model: Model, prompt: list[int], n: int, draft: Any) -> Counter[tuple[int, ...]]:
    """How often each continuation of three tokens came."""
    params = {"max_tokens": 3, "temperature": 1.0, "top_k": 4, "top_p": 1.0, "min_p": 0.0}
    return Counter(
        tuple(model.complete(prompt, SamplingParams(seed=seed, **params), draft=draft).token_ids)  # type: ignore[arg-type]
        for seed in range(n)
    )


def chi_square_p(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """The probability of differences as large, were both of one distribution (Wilson–Hilferty approximation)."""
    import math

    keys = [key for key in a | b if a[key] + b[key] >= 10]
    rest = [sum(c[key] for key in c if key not in set(keys)) for c in (a, b)]
    x, y = np.array([[c[key] for key in keys] + [r] for c, r in zip((a, b), rest, strict=True)], float)
    x, y = x[x + y > 0], y[x + y > 0]
    statistic = float((((x - y) ** 2) / (x + y)).sum())
    df = len(x) - 1
    z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_the_sampled_distribution_is_the_models_own(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 answers each: plain, guessed, and guessed by a build that takes every guess for right."""
    from edgellm.speculation.drafts import NgramDraft

    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
    likely = tiny_model.complete(prompt, SamplingParams(max_tokens=3), draft="off").token_ids
    monkeypatch.setattr(  # guesses that are right now and then
        NgramDraft, "propose", lambda self, history, k: _guess(likely[len(history) - len(prompt) :][:k])
    )
    n = 20_000
    plain = _distribution(tiny_model, prompt, n, "off")
    guessed = _distribution(tiny_model, prompt, n, "ngram")
    assert len(plain) > 20
    assert chi_square_p(plain, guessed) > 0.01

    def gullible(decoder: Any, chooser: Any, token: int, guesses: list[int], is_eog: Any) -> tuple[list[int], int]:
        decoder.verify([token, *guesses])
        return list(guesses), chooser.sample(len(guesses))

    monkeypatch.setattr("edgellm.speculation.verify._check", gullible)
    assert chi_square_p(plain, _distribution(tiny_model, prompt, n // 10, "ngram")) < 1e-6


def _guess(tokens: list[int]) -> Any:
    from edgellm.speculation.drafts import Proposal

    return Proposal(tokens, "ngram 0")

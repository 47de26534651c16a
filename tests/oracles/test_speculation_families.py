"""Speculation where memory is not plain: sliding windows are rolled back, recurrent states are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import converters
import edgellm
from edgellm import GenerationError, LoadParams, SamplingParams
from edgellm.engine.parallel import Request
from edgellm.speculation.depth import Depth
from edgellm.speculation.drafts import always
from tests.oracles.families import make_reference
from tests.oracles.family_cases import CASES

_WINDOWS = [case for case in CASES if "window" in case.what and not case.pooling]
_STATES = [case for case in CASES if case.family in ("lfm2", "falcon-h1")]


def converted(case: object, folder: Path) -> Path:
    make_reference(case, folder / "checkpoint")  # type: ignore[arg-type]
    converters.convert(folder / "checkpoint", folder / "model.gguf", quant="F32")
    return folder / "model.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("case", _WINDOWS, ids=lambda case: f"{case.name} {case.what}")
def test_a_window_that_has_moved_on_is_rolled_back(
    case: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = itertools.cycle([3, 1, 9])
    monkeypatch.setattr(Depth, "choose", lambda self, source, most, prior: min(next(depths), most))
    monkeypatch.setattr(Depth, "goes_on", lambda self, source, k: always)
    path = converted(case, tmp_path)
    prompt = [20 + i % 7 for i in range(90)]
    params = SamplingParams(max_tokens=60, temperature=0.7, top_k=3, seed=5)
    with edgellm.load(path, LoadParams(n_ctx=256, n_threads=1, flash_attn=True)) as model:
        guessed = model.complete(prompt, params, draft="ngram")
        after = model.complete([*prompt, *guessed.token_ids[:20], 30], SamplingParams(max_tokens=4), draft="off")
    with edgellm.load(path, LoadParams(n_ctx=256, n_threads=1, flash_attn=True)) as fresh:
        plain = fresh.complete(prompt, params, draft="off")
        logits = fresh.logits([*prompt, *guessed.token_ids[:20], 30])[-1]
    same = [a == b for a, b in zip(plain.token_ids, guessed.token_ids, strict=False)]
    assert sum(itertools.takewhile(bool, same)) >= 20  # sampled: a tie within the noise of batches may end it
    assert logits[after.token_ids[0]] >= logits.max() - 0.02 * logits.std()


@pytest.mark.slow
@pytest.mark.parametrize("case", _STATES[:3], ids=lambda case: f"{case.name} {case.what}")
def test_states_that_cannot_be_taken_back_are_refused_and_auto_does_without(case: object, tmp_path: Path) -> None:
    with edgellm.load(converted(case, tmp_path), LoadParams(n_ctx=256, n_threads=1)) as model:
        prompt = [20, 21, 22, 23] * 8
        assert model.complete(prompt, SamplingParams(max_tokens=8)).stats.drafted == 0
        with pytest.raises(GenerationError, match="taken back"):
            model.complete(prompt, SamplingParams(max_tokens=8), draft="ngram")


@pytest.mark.slow
@pytest.mark.parametrize("case", _STATES[:3] + _WINDOWS[:2], ids=lambda case: f"{case.name} {case.what}")
def test_answers_in_parallel_are_those_of_one_at_a_time(case: object, tmp_path: Path) -> None:
    """With beginnings in common: a recurrent state can't be shared, a window that has moved on can."""
    params = SamplingParams(max_tokens=12)
    prompts = [[20, 21, 22, 23] * 20 + [24 + i] * (i % 3) + [30] for i in range(6)]
    with edgellm.load(converted(case, tmp_path), LoadParams(n_ctx=128, n_threads=1)) as model:
        found = {a.key: a for a in model.answer_all([Request(i, p, params) for i, p in enumerate(prompts)], 2)}
        for i, prompt in enumerate(prompts):
            written = list(prompt)
            for token in found[i].token_ids:
                logits = model.logits(written)[-1]
                assert logits[token] >= logits.max() - 0.02 * logits.std()
                written.append(token)
            assert len(found[i].token_ids) == 12 or found[i].finish_reason == "stop"

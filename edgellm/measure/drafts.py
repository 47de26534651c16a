"""What a draft brings for a model: the same prompts answered without it and with it, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.model import Model, load
from edgellm.generation import GenerationStats
from edgellm.measure.scoring import OnProgress
from edgellm.native.undisturbed import by_turns
from edgellm.speculation.drafts import DraftChoice

WORTHWHILE = 1.05  # times as fast: less may be chance, and a draft takes memory
_MAX_TOKENS = 64
_ROUNDS = 2  # of the same answer, whose faster one counts: on a busy machine one alone may show anything
_PAUSE = 20  # times the usual step: what takes that long isn't the model, nor a draft that reads the text
_MIN_DECODED = 4  # answers shorter than that say nothing of speed


@dataclass
class Way:
    """How answers came with one choice of drafts."""

    tokens: int = 0  # after each answer's first, which comes with the prompt
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    speeds: list[float] = field(default_factory=list)  # tokens per second, of each answer

    def add(self, stats: GenerationStats) -> None:
        self.tokens += max(0, stats.completion_tokens - 1)
        self.steps += stats.steps
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        self.seconds += stats.decode_seconds
        self.speeds.append(stats.decode_tokens_per_second)

    def as_dict(self) -> dict[str, float]:
        return {
            "tokens_per_step": round(self.tokens / max(1, self.steps), 3),
            "accepted_share": round(self.accepted / max(1, self.drafted), 4),
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds else 0.0,
        }


@dataclass(frozen=True)
class Gain:
    """ways: "off" (no guesses), "ngram" (what is there without a draft), "draft" (n-grams and the draft).

    speedup: median over the prompts of the speed with the draft in that without anything guessed; over_ngram: in that
    with n-grams alone. same: answers that are equal token for token with and without it. (Others differ where two
    tokens were as good as equally likely: evaluating several at once rounds otherwise.)
    """

    ways: Mapping[str, Way]
    n_prompts: int
    same: int

    @property
    def speedup(self) -> float:
        return self._ratio("off")

    @property
    def over_ngram(self) -> float:
        return self._ratio("ngram")

    @property
    def pays(self) -> bool:
        """Whether it is worth having: faster than plain decoding and than the n-grams that cost nothing."""
        return self.n_prompts > 0 and min(self.speedup, self.over_ngram) >= WORTHWHILE

    def _ratio(self, other: str) -> float:
        pairs = zip(self.ways["draft"].speeds, self.ways[other].speeds, strict=True)
        return median([a / b for a, b in pairs if b] or [0.0])

    def as_dict(self) -> dict[str, Any]:
        return {
            "n_prompts": self.n_prompts,
            "same_answers": self.same,
            "speedup": round(self.speedup, 3),
            "over_ngram": round(self.over_ngram, 3),
            "pays": self.pays,
            **{name: way.as_dict() for name, way in self.ways.items()},
        }

    def verdict(self) -> str:
        """One plain sentence."""
        if not self.n_prompts:
            return "There were no prompts to try it on."
        against = f"{self.speedup:.2f} × plain decoding, {self.over_ngram:.2f} × n-grams alone"
        where = f"on {self.n_prompts} held-out prompt{'s' if self.n_prompts > 1 else ''}"
        if self.pays:
            return f"It pays: {against}, {where}"
        return f"It doesn't pay here: {against}, {where}"


def measure_draft(
    model: Path,
    draft: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = _MAX_TOKENS,
    rounds: int = _ROUNDS,
    n_threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Gain:
    """Answer each prompt (token ids) greedily in every way, in an order that changes, `rounds` times.

    The first prompt is answered once before, so that costs and acceptance are known. Errors as of `load` and
    `Model.generate`, DraftMismatch among them.
    """
    choices: dict[str, DraftChoice] = {"off": "off", "ngram": "ngram", "draft": ["ngram", draft]}
    ways = {name: Way() for name in choices}
    n_same = n_told = 0
    n_ctx = max(map(len, prompts), default=0) + max_tokens + 1
    with load(model, LoadParams(n_ctx=n_ctx, n_threads=n_threads)) as opened:
        for name in choices if prompts else ():
            _answer(opened, prompts[0], choices[name], max_tokens)
        for i, prompt in enumerate(prompts):
            if on_progress:
                on_progress("trying it", i, len(prompts))
            answers: dict[str, tuple[list[int], GenerationStats]] = {}
            for k in range(rounds):
                for name in by_turns([*choices], i + k):
                    answer = _answer(opened, prompt, choices[name], max_tokens)
                    if name not in answers or answer[1].decode_seconds < answers[name][1].decode_seconds:
                        answers[name] = answer
            if len(answers["off"][0]) < _MIN_DECODED:
                continue
            n_told += 1
            n_same += answers["off"][0] == answers["draft"][0]
            for name, (_, stats) in answers.items():
                ways[name].add(stats)
    return Gain(ways, n_told, n_same)


def _answer(
    model: Model, prompt: Sequence[int], choice: DraftChoice, max_tokens: int
) -> tuple[list[int], GenerationStats]:
    """The answer, its decode_seconds without the pauses in which other programs had the processor."""
    token_ids: list[int] = []
    seconds: list[float] = []
    stats, so_far = GenerationStats(), 0.0
    for response in model.generate(prompt, SamplingParams(max_tokens=max_tokens), draft=choice):
        token_ids += response.token_ids
        stats = response.stats
        seconds.append(stats.decode_seconds - so_far)
        so_far = stats.decode_seconds
    usual = median(seconds)
    undisturbed = sum(one if one < _PAUSE * usual else usual for one in seconds)
    return token_ids, replace(stats, decode_seconds=undisturbed)

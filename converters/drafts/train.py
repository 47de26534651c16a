"""Teaches a student what the target finds likely: KL divergence on its likeliest tokens, by AdamW, within a time.

The head is most of a small student's work. So each step's softmax is over the tokens that the target finds likely
anywhere in the batch and a random sample of the others, which stands for all of them (importance sampling as in Bengio
and Senécal 2003): a log-partition that is right but for noise, in a fraction of the time. What is reported is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from converters.drafts.labels import Labelled
from converters.drafts.student import Student, Tensor, as_arrays

_RATE, _LAST_SHARE, _WARM_UP = 6e-4, 0.1, 0.05  # learning rate, what is left of it at the end, share to get there
_BETAS, _DECAY, _CLIP = (0.9, 0.95), 0.01, 1.0
_TEXTS = 4  # of a step
_OTHERS = 2048  # tokens that stand for all that nobody finds likely
_PATIENCE = 5  # trials in a row that show nothing better
_TRIALS = 16  # in all
_MOST_TRIED = 1500  # positions of a trial
_BETTER = 1e-3


@dataclass(frozen=True)
class Trial:
    """agreement: share of held-out positions where student and target find the same token likeliest. loss: nats of KL
    divergence there, over the target's likeliest tokens. trained: the loss in training since the last trial.
    """

    step: int
    seconds: float
    agreement: float
    loss: float
    trained: float


@dataclass
class Progress:
    """Where the training is: everything but the weights."""

    step: int = 0
    seconds: float = 0.0
    n_tokens: int = 0
    trials: list[Trial] = field(default_factory=list)
    ended: str = ""  # "time", "steps", "no better", "interrupted"

    @property
    def best(self) -> Trial:
        return max(self.trials, key=lambda trial: trial.agreement)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """seconds of training in all, and steps; trial_every: steps between trials, None: by time."""

    seconds: float
    steps: int | None = None
    trial_every: int | None = None


class Training:
    """A student, its optimizer, and the best weights so far. `state` is what a later run goes on from."""

    def __init__(self, student: Student, labelled: Sequence[Labelled], tried: Sequence[Labelled], seed: int) -> None:
        import torch

        self.student, self.progress = student, Progress()
        self._labelled, self._tried, self._seed = labelled, _at_most(tried, _MOST_TRIED), seed
        self.optimizer = torch.optim.AdamW(
            list(student.weights.values()), lr=_RATE, betas=_BETAS, weight_decay=_DECAY, fused=True
        )
        self.best = as_arrays(student.weights)
        self._losses: list[float] = []

    def run(self, limits: Limits, on_step: Callable[[Training, float], None]) -> Progress:
        """Train until a limit, or nothing gets better, or Ctrl-C. on_step gets the share done, 0 to 1, after each step.

        The same seed, labels and step limit give the same weights, also when it was interrupted in between.
        """
        progress, started = self.progress, time.monotonic() - self.progress.seconds
        progress.ended = ""
        try:
            if not progress.trials:
                self._try(time.monotonic() - started)
            while not progress.ended:
                done = _share_done(progress, limits)
                if done >= 1:
                    progress.ended = "steps" if limits.steps is not None and progress.step >= limits.steps else "time"
                    break
                self._step(done)
                progress.seconds = time.monotonic() - started
                if self._trial_is_due(limits):
                    self._try(progress.seconds)
                    if self._stalls():
                        progress.ended = "no better"
                on_step(self, done)
        except KeyboardInterrupt:
            progress.ended = "interrupted"
        if progress.trials and progress.trials[-1].step != progress.step and progress.ended != "interrupted":
            self._try(progress.seconds)
        return progress

    def _step(self, done: float) -> None:
        import torch

        rate = _RATE * min((done + 1e-3) / _WARM_UP, 1 - (1 - _LAST_SHARE) * done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch()
        with quick_products():
            loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.student.weights.values()), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._losses.append(float(loss.detach()))
        self.progress.step += 1
        self.progress.n_tokens += sum(len(one.tokens) for one in batch)

    def _batch(self) -> list[Labelled]:
        """The next texts of an order that is drawn anew for each round through them."""
        n, chosen = len(self._labelled), []
        for k in range(_TEXTS * self.progress.step, _TEXTS * (self.progress.step + 1)):
            order = np.random.default_rng((self._seed, k // n)).permutation(n)
            chosen.append(self._labelled[order[k % n]])
        return chosen

    def _loss(self, batch: Sequence[Labelled]) -> Tensor:
        import torch

        hidden = self._hidden(batch)
        top = np.concatenate([one.top for one in batch])
        n_vocab = len(self.student.head)
        likely = np.unique(top)
        others = np.random.default_rng((self._seed, 1, self.progress.step)).integers(0, n_vocab, _OTHERS)
        others = np.setdiff1d(others, likely)  # sorted, each once
        rows = torch.from_numpy(np.concatenate([likely, others]).astype(np.int64))
        logits = self.student.logits(hidden, rows)
        stands_for = np.log((n_vocab - len(likely)) / len(others)) if len(others) else 0.0
        logits = logits + torch.cat([torch.zeros(len(likely)), torch.full((len(others),), float(stands_for))])
        place = torch.from_numpy(np.searchsorted(likely, top))
        return _divergence(logits, place, np.concatenate([one.log_probs for one in batch])).mean()

    def _hidden(self, batch: Sequence[Labelled]) -> Tensor:
        """At the learned positions of all texts, one after the other: float32 (positions, width)."""
        import torch

        longest = max(len(one.tokens) for one in batch)
        tokens = np.zeros((len(batch), longest), np.int64)
        learned = np.zeros((len(batch), longest), np.bool_)
        for i, one in enumerate(batch):
            tokens[i, : len(one.tokens)] = one.tokens
            learned[i, one.first : len(one.tokens)] = True
        return self.student.hidden(torch.from_numpy(tokens))[torch.from_numpy(learned)]

    def _try(self, seconds: float) -> None:
        """How well the student does on the held-out texts, with the whole vocabulary."""
        import torch

        n_same, total, n = 0, 0.0, 0
        with torch.no_grad(), quick_products():
            for one in self._tried:
                logits = self.student.logits(self._hidden([one]))
                top = torch.from_numpy(one.top.astype(np.int64))
                total += float(_divergence(logits, top, one.log_probs).sum())
                n_same += int((logits.argmax(-1) == top[:, 0]).sum())
                n += len(top)
        trained = float(np.mean(self._losses)) if self._losses else float("nan")
        self._losses.clear()
        trials = self.progress.trials
        is_best = not trials or n_same / n > self.progress.best.agreement
        trials.append(Trial(self.progress.step, seconds, n_same / n, total / n, trained))
        if is_best:
            self.best = as_arrays(self.student.weights)

    def _trial_is_due(self, limits: Limits) -> bool:
        last = self.progress.trials[-1]
        if limits.trial_every is not None:
            return self.progress.step - last.step >= limits.trial_every
        return self.progress.seconds - last.seconds >= limits.seconds / _TRIALS

    def _stalls(self) -> bool:
        """Whether the latest trials are no better than what was there before, in both figures."""
        recent, before = self.progress.trials[-_PATIENCE:], self.progress.trials[:-_PATIENCE]
        if not before:
            return False
        return max(trial.agreement for trial in recent) <= max(trial.agreement for trial in before) + _BETTER and min(
            trial.loss for trial in recent
        ) >= min(trial.loss for trial in before)


def quick_products() -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the CPU has instructions for them, all else in float32: several times as fast.

    The weights themselves stay float32 (Micikevicius et al. 2018, "Mixed Precision Training").
    """
    import torch

    features = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return torch.autocast("cpu", torch.bfloat16) if any(has() for has in features) else nullcontext()


def _share_done(progress: Progress, limits: Limits) -> float:
    by_steps = progress.step / limits.steps if limits.steps else 0.0
    return by_steps if limits.steps else progress.seconds / max(limits.seconds, 1e-9)


def _divergence(logits: Tensor, top: Tensor, log_probs: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    """D(P‖Q) at each position, of P made to sum to 1 over its likeliest tokens: float32 (positions,) in nats."""
    import torch

    p = torch.from_numpy(log_probs).log_softmax(-1)
    q = logits.gather(1, top) - logits.logsumexp(-1, keepdim=True)
    return (p.exp() * (p - q)).sum(-1)


def _at_most(labelled: Sequence[Labelled], n_positions: int) -> list[Labelled]:
    """The first texts, as many as together have about so many positions."""
    found, n = [], 0
    for one in labelled:
        if n >= n_positions:
            break
        found.append(one)
        n += len(one.top)
    return found

"""Makes a draft of some of a model's blocks: read, prune, ask the model, train, write, try."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.convert import convert
from converters.drafts.curve import draw_curve
from converters.drafts.labels import Labelled, label, windows
from converters.drafts.prune import choose_blocks, family_of, open_base, prune, silent_blocks, write_folder
from converters.drafts.state import State, save_labels, save_state, state_path
from converters.drafts.student import Student, need_torch
from converters.drafts.train import Limits, Progress, Training
from converters.sources import Source
from edgellm.gguf_metadata import set_entry
from edgellm.measure.drafts import Gain, measure_draft
from edgellm.measure.passages import held_out, read_passages
from edgellm.measure.scoring import OnProgress
from edgellm.measure.texts import SELF

OF_KEY, HOW_KEY = "edgellm.draft_of", "edgellm.distillation"  # of a draft's metadata: its model's name; how it was made
_FOR_WRITING, _FOR_ASKING = 0.35, 0.3  # shares of the time, at most
_KEEP_EVERY, _KEEP_SHARE = 60.0, 0.05  # seconds between states kept; share of the time that keeping them may take
_N_TRIED = 16  # held-out texts
_FOR_A_CHECKPOINT = "Q8_0"  # the target where only a checkpoint is given


@dataclass(frozen=True)
class Distilled:
    """target: the GGUF whose outputs were learned, None where that was made of a checkpoint for the purpose. blocks:
    which were kept; n_silent: how many others do nothing.
    """

    draft: Path
    target: Path | None
    blocks: list[int]
    n_silent: int
    n_texts: int
    progress: Progress
    seconds: float
    gain: Gain

    @property
    def agreement(self) -> tuple[float, float]:
        """On held-out text, before and after."""
        return self.progress.trials[0].agreement, self.progress.best.agreement

    def lines(self) -> list[str]:
        before, after = self.agreement
        why = {"time": "until the time was over", "steps": "as many steps as asked for"}
        ended = {**why, "no better": "until nothing got better", "interrupted": "until it was interrupted"}
        silent = f"; {self.n_silent} blocks of the model do nothing" if self.n_silent else ""
        rows = [
            f"  {trial.seconds / 60:6.1f} min {trial.loss:8.3f} nats {100 * trial.agreement:5.1f} %"
            for trial in _some(self.progress)
        ]
        return [
            f"blocks {', '.join(map(str, self.blocks))} of the model{silent}",
            f"trained on {self.progress.n_tokens} tokens of {self.n_texts} texts, {self.progress.step} steps, "
            f"{ended.get(self.progress.ended, '')}; {self.seconds / 60:.1f} minutes in all",
            f"says the model's next token {100 * before:.0f} times in 100 before,"
            f" {100 * after:.0f} after, on held-out text",
            *rows,
        ]

    def as_dict(self) -> dict[str, Any]:
        before, after = self.agreement
        return {
            "draft": str(self.draft),
            "n_bytes": self.draft.stat().st_size,
            "target": str(self.target) if self.target else None,
            "blocks": self.blocks,
            "n_silent": self.n_silent,
            "n_texts": self.n_texts,
            "seconds": round(self.seconds, 1),
            "agreement_before": round(before, 4),
            "agreement_after": round(after, 4),
            **self.progress.as_dict(),
        }


def distil(
    source: str | Path,
    out: str | Path,
    *,
    n_blocks: int,
    text: str | Path = SELF,
    minutes: float = 20.0,
    target: str | Path | None = None,
    quant: str = "Q4_0",
    seed: int = 1,
    n_steps: int | None = None,
    n_prompts: int = 12,
    max_tokens: int = 64,
    report: str | Path | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> Distilled:
    """Write a draft of n_blocks blocks of `source` (a checkpoint or a GGUF) to the GGUF `out`, and try it.

    It learns the outputs of `target`: a GGUF of the same model, `source` itself if it is one, else one made for the
    purpose; on a text as of `read_passages`. minutes: for writing that text, asking the target and training together.
    n_steps: train so many steps instead. report: a picture of the loss curve to draw. Ctrl-C while it trains ends that;
    the best so far is written, and `resume` goes on later. Errors: CheckpointError (no torch, among others),
    UnsupportedArchitecture, TextError, OutputError, DraftMismatch, ValueError (more blocks than there are).
    """
    need_torch()
    started = time.monotonic()
    path, out = Path(source), Path(out)
    base = open_base(path)
    family_of(base)
    with _target(path, base, target, out, on_progress) as (asked, is_given):
        job = _Job.plan(base, asked, out, n_blocks, text, seed, 60 * minutes, n_steps, on_progress)
        prompts, training = job.trained(resume)
        job.write(training, quant, path.name)
        if report is not None:
            draw_curve(Path(report), training.progress)
        gain = measure_draft(asked, out, prompts[:n_prompts], max_tokens=max_tokens, on_progress=on_progress)
    if training.progress.ended != "interrupted":
        state_path(out).unlink(missing_ok=True)
    return Distilled(
        out,
        asked if is_given else None,
        job.blocks,
        job.n_silent,
        job.n_texts,
        training.progress,
        time.monotonic() - started,
        gain,
    )


@contextmanager
def _target(
    path: Path, base: Source, target: str | Path | None, out: Path, on_progress: OnProgress | None
) -> Iterator[tuple[Path, bool]]:
    """The GGUF that is asked, and whether it was there before."""
    if target is not None or base.kind == "gguf":
        yield Path(target) if target is not None else path, True
        return
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f"{out.name}.target-") as folder:
        made = Path(folder) / f"{path.resolve().name}.gguf"
        convert(path, made, quant=_FOR_A_CHECKPOINT, receipt="off", on_progress=on_progress)
        yield made, False


@dataclass
class _Job:
    """One distillation: of which blocks, on what, in what time."""

    student: Source
    target: Path
    out: Path
    blocks: list[int]
    n_silent: int
    text: str | Path
    seed: int
    limits: Limits
    identity: str
    on_progress: OnProgress | None
    n_texts: int = 0
    _kept_at: float = field(default_factory=time.monotonic)
    _keeping: float = 0.0

    @classmethod
    def plan(
        cls,
        base: Source,
        target: Path,
        out: Path,
        n_blocks: int,
        text: str | Path,
        seed: int,
        seconds: float,
        n_steps: int | None,
        on_progress: OnProgress | None,
    ) -> _Job:
        silent = silent_blocks(base, family_of(base))
        n_all = int(base.config["num_hidden_layers"])
        blocks = choose_blocks([i for i in range(n_all) if i not in silent], n_blocks)
        size = target.stat().st_size
        identity = sha256(json.dumps([base.path.name, size, blocks, str(text), seed]).encode()).hexdigest()
        limits = Limits(seconds, n_steps, None if n_steps is None else max(1, n_steps // 8))
        student = prune(base, blocks)
        return cls(student, target, out, blocks, len(silent), text, seed, limits, identity, on_progress)

    def trained(self, resume: bool) -> tuple[list[list[int]], Training]:
        """Held-out prompts, and a training that has ended."""
        started, seconds, kept = time.monotonic(), self.limits.seconds, state_path(self.out)
        state = State(kept, self.identity) if resume else None
        labels, tried = state.labels if state is not None else self._labels(seconds)
        if state is None:
            save_labels(kept, self.identity, labels, tried)
            seconds -= time.monotonic() - started
        self.n_texts = len(labels)
        training = Training(Student(self.student), labels, tried, self.seed)
        if state is not None:
            state.restore(training)
        limits = Limits(max(1.0, seconds), self.limits.steps, self.limits.trial_every)
        try:
            training.run(limits, lambda now, done: self._step_done(now, done, labels, tried))
        finally:
            save_state(kept, self.identity, labels, tried, training)
        return [one.prompt for one in tried], training

    def _labels(self, seconds: float) -> tuple[list[Labelled], list[Labelled]]:
        """Of the text, as far as time allows: (to learn from, held out)."""
        passages = read_passages(
            self.text, self.target, seconds=seconds * _FOR_WRITING, seed=self.seed, on_progress=self.on_progress
        )
        learned, tried = held_out(passages, _N_TRIED)
        trial_labels = label(self.target, windows(tried or learned[:1]))
        return label(self.target, windows(learned), seconds * _FOR_ASKING, self.on_progress), trial_labels

    def _step_done(self, training: Training, done: float, labels: list[Labelled], tried: list[Labelled]) -> None:
        now = time.monotonic()
        if now - self._kept_at > max(_KEEP_EVERY, self._keeping / _KEEP_SHARE):
            save_state(state_path(self.out), self.identity, labels, tried, training)
            self._kept_at = time.monotonic()
            self._keeping = self._kept_at - now
        if self.on_progress:
            latest = training.progress.trials[-1]
            words = f"agrees {100 * latest.agreement:.0f} %, loss {latest.loss:.2f}"
            self.on_progress(words, int(1000 * done), 1000)

    def write(self, training: Training, quant: str, name: str) -> None:
        """The best weights so far as a GGUF that says what it is."""
        with tempfile.TemporaryDirectory(dir=self.out.resolve().parent, prefix=f"{self.out.name}.folder-") as folder:
            checkpoint = Path(folder) / self.out.stem
            write_folder(checkpoint, self.student, training.best)
            made = Path(folder) / self.out.name
            convert(checkpoint, made, quant=quant, receipt="off", on_progress=self.on_progress)
            trials, best = training.progress.trials, training.progress.best
            how = {
                "blocks": self.blocks,
                "tokens": training.progress.n_tokens,
                "agreement": [round(trials[0].agreement, 4), round(best.agreement, 4)],
                "loss": [round(trials[0].loss, 4), round(best.loss, 4)],
            }
            set_entry(made, OF_KEY, name)
            set_entry(made, HOW_KEY, json.dumps(how))
            made.replace(self.out)


def _some(progress: Progress) -> list[Any]:
    """At most six of the trials, with the first and the last."""
    trials = progress.trials
    step = max(1, (len(trials) - 1) / 5)
    return [trials[round(i * step)] for i in range(min(6, len(trials))) if round(i * step) < len(trials)]

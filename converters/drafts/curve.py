"""A picture of a training: loss and agreement over the minutes."""

from __future__ import annotations

from pathlib import Path

from converters.drafts.train import Progress
from edgellm.errors import OutputError


def draw_curve(path: Path, progress: Progress) -> None:
    """Write it as the file's name says (.png, .svg, .pdf). OutputError without matplotlib, or where it can't be."""
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise OutputError("the loss curve is drawn with matplotlib; pip install matplotlib, or leave it out") from exc
    minutes = [trial.seconds / 60 for trial in progress.trials]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(minutes, [trial.loss for trial in progress.trials], color="tab:blue", marker=".")
    right.plot(minutes, [100 * trial.agreement for trial in progress.trials], color="tab:orange", marker=".")
    left.set_xlabel("minutes of training")
    left.set_ylabel("KL divergence from the model, nats", color="tab:blue")
    right.set_ylabel("same next token, %", color="tab:orange")
    left.set_ylim(bottom=0)
    right.set_ylim(0, 100)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        raise OutputError(f"cannot draw {path}: {exc}") from exc

"""A draft from text, tried on documents that it doesn't have, then made of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from edgellm.gguf_header import check_loadable
from edgellm.measure.drafts import Gain, measure_draft
from edgellm.measure.passages import held_out, read_passages
from edgellm.measure.scoring import OnProgress
from edgellm.speculation.text_index import write_index

_OWN_TOKENS = 20_000  # of text that a model writes itself, unless time is up before


@dataclass(frozen=True)
class IndexMade:
    """seconds: for sorting and writing the index of all documents. n_tried: documents that gave the prompts."""

    draft: Path
    n_documents: int
    n_tokens: int
    seconds: float
    n_tried: int
    gain: Gain

    def lines(self) -> list[str]:
        lines = [f"index of {self.n_tokens} tokens in {self.n_documents} documents, built in {self.seconds:.1f} s"]
        if self.n_tried:
            lines.append(f"tried without the {self.n_tried} documents whose beginnings were the prompts")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "draft": str(self.draft),
            "n_bytes": self.draft.stat().st_size,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "build_seconds": round(self.seconds, 3),
        }


def make_index(
    model: Path,
    text: str | Path,
    out: Path,
    *,
    minutes: float | None = None,
    seed: int = 1,
    n_prompts: int = 12,
    max_tokens: int = 64,
    on_progress: OnProgress | None = None,
) -> IndexMade:
    """Index a file's documents, or what the model writes itself ("self", for so many minutes), as a draft for `model`.

    Errors: TextError (the file), ModelFileError (the model), OutputError (`out` can't be written).
    """
    header = check_loadable(model)
    seconds = 60 * minutes if minutes else float("inf")
    passages = read_passages(text, model, n_tokens=_OWN_TOKENS, seconds=seconds, seed=seed, on_progress=on_progress)
    learned, tried = held_out(passages, n_prompts)
    trial = out.with_name(f"{out.name}.trial")
    try:
        write_index(trial, [passage.tokens for passage in learned], header)
        prompts = [passage.prompt for passage in tried]
        gain = measure_draft(model, trial, prompts, max_tokens=max_tokens, on_progress=on_progress)
    finally:
        trial.unlink(missing_ok=True)
    started = perf_counter()
    n_documents, n_tokens = write_index(out, [passage.tokens for passage in passages], header)
    return IndexMade(out, n_documents, n_tokens, perf_counter() - started, len(tried), gain)

"""A measurement in a process of its own: `python -m edgellm.measure.child`.

The models' memory isn't the caller's then, and native code that aborts on a damaged file takes only this process with
it. One JSON object on stdin (see `Request`), one on stdout: {"tokens": those whose log-probabilities were kept,
"measured": Evaluation.as_dict() or null, "speeds": {"model": {"prompt", "decode"}, "reference": …} or null}.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import EdgeLLMError, ModelFileError
from edgellm.measure.asked import ask_child


@dataclass(frozen=True)
class Request:
    """model: what is measured, against reference (or alone). text: see `read_samples`. The first n_kept tokens'
    log-probabilities of `exact`, one of the two, go to the file `kept` (.npy, float32 (n_kept, n_vocab)).
    compares: whether anything is measured besides. with_speed: also time both, see `measure_speed`.
    """

    model: str
    reference: str | None
    exact: str
    text: str
    n_ctx: int
    n_chunks: int
    n_kept: int
    kept: str
    compares: bool = True
    with_speed: bool = False


def measure_in_child(request: Request) -> dict[str, Any]:
    """The answer. ModelFileError with the reason where the child fails, EngineCrashed where it was killed (memory)."""
    answer: dict[str, Any] = ask_child("edgellm.measure.child", asdict(request), request.model, ModelFileError)
    return answer


def _main() -> None:
    import numpy as np

    from edgellm.gguf_header import vouched
    from edgellm.measure.evaluate import evaluate
    from edgellm.measure.scoring import Sample, Scorer
    from edgellm.measure.speed import measure_speed
    from edgellm.measure.texts import read_samples

    request = Request(**json.loads(sys.stdin.buffer.read()))
    with ExitStack() as stack:
        for path in (request.model, request.exact):
            stack.enter_context(vouched(Path(path)))  # the caller's own files, not yet finished
        try:
            samples = read_samples(request.text, Path(request.exact), n_ctx=request.n_ctx, n_chunks=request.n_chunks)
            tokens = samples[0].tokens[: request.n_kept]
            with closing(Scorer(Path(request.exact), len(tokens))) as scorer:
                rows = list(scorer.log_probs(Sample([*tokens, tokens[-1]], range(len(tokens)))))
            np.save(request.kept, np.concatenate(rows))
            reference = Path(request.reference) if request.reference else None
            measured = None
            if request.compares:
                measured = evaluate(Path(request.model), samples, reference=reference).as_dict()
            timed = {"model": Path(request.model), "reference": reference} if request.with_speed else {}
            speeds = {name: measure_speed(path, samples[0].tokens) for name, path in timed.items() if path}
        except EdgeLLMError as exc:
            raise SystemExit(f"error: {exc}") from exc
    print(json.dumps({"tokens": tokens, "measured": measured, "speeds": speeds or None}))


if __name__ == "__main__":
    _main()

"""What a conversion did to the model: llama.cpp's answers against the checkpoint's own, and the quantized file's
against the unquantized one's.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.forward import can_run, forward
from converters.original import Original
from converters.plan import Plan
from converters.prepare import Inputs
from converters.quantize.types import block_size
from edgellm.config import physical_cpu_count
from edgellm.errors import CheckpointError
from edgellm.measure.child import Request, measure_in_child
from edgellm.measure.divergence import Rows, kl_divergence, log_softmax

LEVELS = ("auto", "full", "fast", "off")
TEXT = Path(__file__).with_name("receipt_text.txt")
_N_CTX, _N_CHUNKS = 256, 4
_N_FORWARD = 48  # tokens of our own forward pass
_LEAST_CONTEXT = 256  # what llama.cpp makes of a smaller one
_SECONDS = 12.0  # more than this isn't measured unless asked for: a conversion takes no longer without
_CHECK_SECONDS = 40.0  # more than this even the check against our own forward pass may not take
_FLOPS_PER_CORE = 60e9  # of prompt evaluation, measured on two cores; only to guess the time
_CHECKED_PER_SECOND = 60e6  # parameters, for the original and both forward passes, measured on two cores
# KLD between our forward pass and llama.cpp on the original in F16: 1e-6 … 2e-4 measured, a wrong theta gives 1e-2,
# and 2e-3 where only some blocks have it
_SAME_FUNCTION = 1e-3


@dataclass(frozen=True)
class Quality:
    """level: what was done, and reason: why. text: the name of what it was measured on. measured: an Evaluation as
    plain data. forward_kld: of llama.cpp on the original from our own forward pass, None where the family has none.
    speeds: of "model" and "reference" on this machine, in tokens per second, if asked for.
    """

    level: str
    reason: str
    text: str = ""
    measured: dict[str, Any] | None = None
    forward_kld: float | None = None
    speeds: dict[str, Any] | None = None


@dataclass(frozen=True)
class Decision:
    """level: "full" | "fast" | "off", and reason: why. checks_function: whether llama.cpp's answers are held to our own
    forward pass, as "full" does and, where that can be had in seconds, "fast" if nobody asked for it.
    """

    level: str
    reason: str
    checks_function: bool


def decide(asked: str, inputs: Inputs, planned: Plan, original: Original, out: Path) -> Decision:
    """What is done about a receipt. ValueError for an unknown one."""
    if asked not in LEVELS:
        raise ValueError(f"unknown receipt {asked!r}; choose one of {', '.join(LEVELS)}")
    if asked != "auto":
        return Decision(asked, "as asked", asked == "full")
    cannot = _cannot(inputs, planned)
    why_not = cannot or _why_not(inputs, planned, original, out)
    if not why_not:
        return Decision("full", "there is room and time for it", True)
    return Decision("fast", why_not, not cannot and _is_cheap(inputs, planned, original, out))


def _cannot(inputs: Inputs, planned: Plan) -> str:
    if "tokenizer.ggml.tokens" not in inputs.source.metadata and inputs.is_gguf:
        return "the file has no vocabulary"
    if any(key.endswith((".pooling_type", ".attention.causal")) for key in planned.metadata):
        return "an embedding model predicts no tokens"
    return ""


def _why_not(inputs: Inputs, planned: Plan, original: Original, out: Path) -> str:
    # two models, a multiplication and an addition for each weight and token
    seconds = 4.0 * planned.n_parameters * _N_CTX * _N_CHUNKS / (_FLOPS_PER_CORE * physical_cpu_count())
    if seconds > _SECONDS:
        return f"it would take some {seconds:.0f} seconds; --receipt full does it"
    free = shutil.disk_usage(out.parent).free
    if not inputs.is_gguf and original.n_bytes > free:
        return f"the original takes {original.n_bytes / 1e9:.1f} GB beside the output, {free / 1e9:.1f} GB are free"
    return ""


def _is_cheap(inputs: Inputs, planned: Plan, original: Original, out: Path) -> bool:
    """Whether our own forward pass knows the model, and there are room and seconds for it and for the original."""
    if not can_run(inputs.source, _N_FORWARD):
        return False
    room = 0 if _is_lossless(planned) else original.n_bytes
    return room < shutil.disk_usage(out.parent).free and planned.n_parameters / _CHECKED_PER_SECOND < _CHECK_SECONDS


def _is_lossless(planned: Plan) -> bool:
    return all(block_size(tensor.type_name) == 1 for tensor in planned.tensors)


def measure(
    inputs: Inputs,
    planned: Plan,
    original: Original,
    written: Path,
    text: str | Path | None,
    decision: Decision,
    with_speed: bool = False,
) -> tuple[Quality, str]:
    """What was measured of the written file, and a line on what was checked by it.

    CheckpointError where llama.cpp computes something else than the checkpoint, or nothing of sense.
    """
    lossless, is_full = _is_lossless(planned), decision.level == "full"
    exact = written if lossless else original.path
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "log_probs.npy"
        answer = measure_in_child(
            Request(
                model=str(written),
                reference=None if lossless else str(exact),
                exact=str(exact),
                text=str((is_full and text) or TEXT),
                n_ctx=_N_CTX,
                n_chunks=_N_CHUNKS if is_full else 1,
                compares=is_full,
                n_kept=_N_FORWARD,
                kept=str(kept),
                with_speed=with_speed and is_full,
            )
        )
        forward_kld = _check_function(inputs, answer["tokens"], np.load(kept))
    line = "function: no forward pass of our own for this family; the perplexity makes sense"
    if forward_kld is not None:
        line = f"function: llama.cpp answers as our own forward pass over the checkpoint does (KLD {forward_kld:.1g})"
    if not is_full:
        return Quality(decision.level, decision.reason, forward_kld=forward_kld), line
    measured = answer["measured"]
    _check_sense(measured.get("reference_perplexity", measured["perplexity"]), planned.sizes.get("n_vocab", 0))
    name = "a text of ours" if text is None else Path(text).name
    return Quality(decision.level, decision.reason, name, measured, forward_kld, answer["speeds"]), line


def _check_function(inputs: Inputs, tokens: list[int], found: Rows) -> float | None:
    """KLD of llama.cpp's log-probabilities on the unquantized model from those of our own forward pass."""
    if not can_run(inputs.source, len(tokens)):
        return None
    expected = log_softmax(forward(inputs.source, tokens, n_ctx=_LEAST_CONTEXT))
    kld = float(kl_divergence(expected, found[:, : expected.shape[1]]).mean())
    if not kld < _SAME_FUNCTION:
        raise CheckpointError(
            f"llama.cpp computes something else than the checkpoint: KL divergence {kld:.3g} from a forward pass of "
            "our own, where rounding gives 0.0001; the conversion of this model is wrong, please report it"
        )
    return kld


def _check_sense(perplexity: float, n_vocab: int) -> None:
    """Worse than guessing by far: something is broken, whatever the text. A model without training only guesses."""
    if not np.isfinite(perplexity) or (n_vocab and perplexity > 20 * n_vocab):
        raise CheckpointError(
            f"the converted model is far worse than guessing (perplexity {perplexity:.3g} with {n_vocab} tokens): its "
            "weights or its settings are damaged, or wrongly converted"
        )

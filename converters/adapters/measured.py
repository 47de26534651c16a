"""What an approximate run-time adapter costs: the base with it, against the base with the adapter merged exactly."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from converters.convert import convert, plan
from edgellm.errors import EdgeLLMError
from edgellm.measure.divergence import Estimate
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import SELF, read_samples

_N_CTX, _N_CHUNKS = 256, 4


def measure_adapter(
    base: str | Path, adapters: Sequence[tuple[str | Path, float]], lora: Path
) -> tuple[Estimate | None, str]:
    """KLD per token of base + GGUF LoRA from the merged model, both in F16, on text that the merged model writes.

    Without a figure the second value says why.
    """
    try:
        n_bytes = 2 * plan(base, quant="F16").n_bytes
        free = shutil.disk_usage(lora.parent).free
        if n_bytes > free:
            return None, f"it takes {n_bytes / 1e9:.1f} GB beside the output, {free / 1e9:.1f} GB are free"
        with tempfile.TemporaryDirectory(dir=lora.parent, prefix=f"{lora.name}.measure.") as name:
            plain, merged = Path(name) / "plain.gguf", Path(name) / "merged.gguf"
            convert(base, plain, quant="F16", receipt="off")
            convert(base, merged, quant="F16", adapters=adapters, receipt="off")
            samples = read_samples(SELF, merged, n_ctx=_N_CTX, n_chunks=_N_CHUNKS)
            divergence = evaluate(plain, samples, reference=merged, lora=[lora]).divergence
    except EdgeLLMError as exc:
        return None, str(exc)
    assert divergence is not None
    return divergence.kld_mean, ""

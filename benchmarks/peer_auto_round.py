"""A GGUF made by auto-round (SignRound, Cheng et al. 2023), to hold edgellm's against at equal bytes.

    python -m venv other && other/bin/pip install torch==2.13.0 auto-round gguf sentencepiece
    other/bin/python benchmarks/peer_auto_round.py CHECKPOINT TEXT OUT [--iters 200]
        [--samples 128] [--length 256] [--batch 4]

Runs in an environment of its own and imports nothing of edgellm's. CHECKPOINT and TEXT are those that
`quality.py --keep FOLDER` leaves in its folder: `off_grid` and `calibration.txt`. Measure what it writes with
`edgellm eval OUT/….gguf --reference FOLDER/exact.gguf --text FOLDER/test.txt`.
Ends in one JSON line with the seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path


def read_samples(tokenizer: object, text: Path, length: int, n: int) -> list[object]:
    """The text in windows of so many tokens, the first n of them."""
    import torch

    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]  # type: ignore[operator]
    windows = [window for window in torch.split(ids, length) if len(window) == length]
    return [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()

    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="float32")
    samples = read_samples(tokenizer, options.text, options.length, options.samples)
    started = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="GGUF:Q4_0",
        iters=options.iters,
        dataset=samples,
        nsamples=len(samples),
        seqlen=options.length,
        batch_size=options.batch,
        device_map="cpu",
    )
    rounder.quantize_and_save(output_dir=str(options.out), format="gguf:q4_0")
    seconds = time.perf_counter() - started
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    found = {"iters": options.iters, "samples": len(samples), "seconds": round(seconds, 1)}
    found |= {"cpu_seconds": round(cpu.ru_utime + cpu.ru_stime, 1), "peak_mb": round(cpu.ru_maxrss / 1000)}
    print(json.dumps({"benchmark": "auto_round", "files": [p.name for p in options.out.rglob("*.gguf")], **found}))


if __name__ == "__main__":
    main()

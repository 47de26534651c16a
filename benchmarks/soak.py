"""Two hundred turns of chat with speculation, cancelled, closed, undone and regenerated at random: leaks and drift.

    python benchmarks/soak.py [MODEL.gguf] [--turns 200] [--draft FILE.gguf] [--seed 0]

Every 20th turn the last answer's logits are computed anew from an empty memory and compared: the memory must be what a
fresh computation gives, but for the rounding that depends on how many tokens are evaluated together. Without MODEL the
bundled one runs as F16, where that is little; kernels that round activations to 8 bits move the logits by .3 of their
deviation, guesses or not, and would hide a mistake. The whole context is used once first, as its pages count as memory
only then; the resident memory's slope is taken over the second half. Prints a table, then one JSON line; exits with 1
where a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

import converters
import edgellm
from edgellm import Cancelled, Conversation, LoadParams, Model, SamplingParams
from edgellm.catalog.cards import resolve

MOST_MB_PER_100_TURNS = 1.0
MOST_DRIFT = 0.05  # of the logits' deviation
N_CTX = 1024
SAYINGS = [
    "Repeat: one two three four five six seven eight nine ten.",
    "And again, please.",
    "Give me a list of five fruits.",
    "The same list in upper case.",
    "Write a small Python function that adds two numbers.",
    "Now write it again with other names.",
    "Thanks!",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "exact.gguf"
        if not options.model:
            converters.convert(resolve(None), path, quant="F16", receipt="off")
        with edgellm.load(path, LoadParams(n_ctx=N_CTX)) as model:
            model.complete([30] * (N_CTX - 2), SamplingParams(max_tokens=1))
            drift(model)
            result = soak(model, options.turns, options.draft, random.Random(options.seed))
    print(json.dumps({"benchmark": "soak", "model": path.name, "draft": options.draft, **result}))
    if result["mb_per_100_turns"] > MOST_MB_PER_100_TURNS or result["drift"] > MOST_DRIFT:
        sys.exit(1)


def soak(model: Model, n_turns: int, draft: str, rng: random.Random) -> dict[str, float]:
    conversation = Conversation(model)
    memory, drifts, ends = [], [], Counter[str]()
    drafted = accepted = 0
    for turn in range(1, n_turns + 1):
        end = rng.choice(["whole", "whole", "cancel", "close", "undo", "regenerate"])
        stats = take_turn(model, conversation, end, draft, rng)
        ends[end] += 1
        if stats:
            drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
        memory.append(psutil.Process().memory_info().rss / 1e6)
        if turn % 20 == 0:
            drifts.append(drift(model))
            print(f"turn {turn:4}  {memory[-1]:8.1f} MB  drift {drifts[-1]:.5f}  {dict(ends)}", flush=True)
    later = memory[len(memory) // 2 :]
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) * 100
    return {
        "turns": n_turns,
        "mb_per_100_turns": round(slope, 3),
        "drift": round(max(drifts), 6),
        "drafted": drafted,
        "accepted": accepted,
    }


def take_turn(
    model: Model, conversation: Conversation, end: str, draft: str, rng: random.Random
) -> edgellm.GenerationStats | None:
    params = SamplingParams(max_tokens=48, temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(1000))
    if model.context_used > 700:
        conversation.clear()
    if end == "undo":
        conversation.undo()
    if conversation.messages and end == "regenerate":
        stream = conversation.regenerate(params, draft=draft)
    else:
        stream = conversation.say(rng.choice(SAYINGS), params, draft=draft)
    stats, patience = None, rng.randrange(1, 20)
    try:
        for n, response in enumerate(stream):
            stats = response.stats
            if end == "cancel" and n == patience:
                model.cancel()
            if end == "close" and n == patience:
                break
    except Cancelled:
        pass
    stream.close()
    return stats


def drift(model: Model) -> float:
    """How far the logits after what the memory holds are from those of the same tokens computed anew, at most."""
    tokens = list(model._context.tokens)
    model.complete([*tokens, 30], SamplingParams(max_tokens=1), draft="off")  # evaluates one token after the memory
    kept = np.array(model._context._row(np, None))
    fresh = model.logits([*tokens, 30])[-1]
    return float(np.abs(kept - fresh).max() / fresh.std())


if __name__ == "__main__":
    main()

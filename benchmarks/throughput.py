"""Many prompts answered eight at a time in one context against one after the other.

    python benchmarks/throughput.py [MODEL.gguf] [--parallel 8] [--requests 32] [--tokens 64] [--rounds 3]

In turns, without guesses on either side as in a batch, and with them one at a time. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import edgellm
from edgellm import LoadParams, Model, SamplingParams
from edgellm.catalog.cards import resolve
from edgellm.engine.parallel import Request

SYSTEM = "You are a patient teacher who explains things to children in a few plain words, with an example from a home."
THINGS = "rain", "a battery", "the moon", "bread", "a bicycle", "salt", "a mirror", "wind", "soap", "a clock"


def requests(model: Model, n: int, n_tokens: int) -> list[Request]:
    params = SamplingParams(max_tokens=n_tokens, temperature=0.8, seed=1)
    system = {"role": "system", "content": SYSTEM}
    asked = [f"What is {THINGS[i % len(THINGS)]}? ({i})" for i in range(n)]
    prompts = [model.chat_tokens([system, {"role": "user", "content": text}]) for text in asked]
    return [Request(i, prompt, params) for i, prompt in enumerate(prompts)]


def one_by_one(model: Model, asked: list[Request], draft: str) -> float:
    """Written tokens a second."""
    started = perf_counter()
    n = sum(len(model.complete(list(r.prompt), r.params, draft=draft).token_ids) for r in asked)
    return n / (perf_counter() - started)


def together(model: Model, asked: list[Request], n_parallel: int) -> float:
    started = perf_counter()
    n = sum(len(answer.token_ids) for answer in model.answer_all(asked, n_parallel, n_ctx=512))
    return n / (perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    for name, default in (("parallel", 8), ("requests", 32), ("tokens", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    path, rows = options.model or resolve(None), []
    with edgellm.load(path, LoadParams(n_ctx=512)) as model:
        asked = requests(model, options.requests, options.tokens)
        for _ in range(options.rounds):
            rows.append(
                (
                    one_by_one(model, asked, "off"),
                    one_by_one(model, asked, "auto"),
                    together(model, asked, options.parallel),
                )
            )
    plain, guessed, parallel = (round(median(column), 1) for column in zip(*rows, strict=True))
    ratio = round(median(row[2] / row[0] for row in rows), 3)
    print(f"one by one {plain} tok/s, with guesses {guessed}; {options.parallel} at a time {parallel}: {ratio} ×")
    result = {"plain": plain, "guessed": guessed, "parallel": parallel, "ratio": ratio}
    print(json.dumps({"benchmark": "throughput", "model": path.name, "n_parallel": options.parallel, **result}))


if __name__ == "__main__":
    main()

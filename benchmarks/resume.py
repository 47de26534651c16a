"""How soon a saved conversation of some 2,000 tokens goes on, against reading its transcript again.

    python benchmarks/resume.py [MODEL.gguf] [--tokens 2000] [--rounds 5]

From opening the session to the first token of the next answer, the model being loaded. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import edgellm
from edgellm import Conversation, LoadParams, Model, SamplingParams
from edgellm.catalog.cards import resolve

FACTS = "The river is {} metres wide near the mill, and the bridge was built {} years before the mill burned down. "


def long_conversation(model: Model, n_tokens: int) -> Conversation:
    conversation = Conversation(model)
    i = 0
    while len(model.chat_tokens(conversation.messages or [{"role": "user", "content": ""}])) < n_tokens:
        text = "".join(FACTS.format(17 + 3 * i + k, 40 + i * k) for k in range(5))
        conversation.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": f"Noted, {i}."}]
        i += 1
    return conversation


def first_token(model: Model, path: Path) -> tuple[float, int]:
    """Seconds, and tokens of the prompt that had to be evaluated."""
    model.complete([30], SamplingParams(max_tokens=1))  # forgets what the model holds
    started = perf_counter()
    conversation = Conversation.load(model, path)
    stream = conversation.say("Thanks.", SamplingParams(max_tokens=2))
    response = next(stream)
    seconds = perf_counter() - started
    stream.close()
    return seconds, response.stats.evaluated_prompt_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path, rows = options.model or resolve(None), []
    with tempfile.TemporaryDirectory() as name, edgellm.load(path, LoadParams(n_ctx=4096)) as model:
        conversation = long_conversation(model, options.tokens)
        for _ in conversation.say("Go on.", SamplingParams(max_tokens=8)):
            pass
        kept, plain = Path(name) / "kept", Path(name) / "plain"
        conversation.save(kept)
        conversation.save(plain, memory=False)
        n_bytes = kept.stat().st_size
        for _ in range(options.rounds):
            rows.append((first_token(model, kept), first_token(model, plain)))
    resumed, replayed = (median(row[k][0] for row in rows) for k in range(2))
    ratio = round(median(b[0] / a[0] for a, b in rows), 2)
    n_read = [rows[0][k][1] for k in range(2)]
    print(f"resumed {resumed:.3f} s ({n_read[0]} tokens), replayed {replayed:.3f} s ({n_read[1]}): {ratio} ×")
    result = {"resumed_s": round(resumed, 4), "replayed_s": round(replayed, 4), "ratio": ratio, "bytes": n_bytes}
    print(json.dumps({"benchmark": "resume", "model": path.name, **result}))


if __name__ == "__main__":
    main()

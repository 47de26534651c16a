"""Speculation against plain decoding: five kinds of prompts, drafts of every kind, interleaved in one run.

    python benchmarks/speculation.py TARGET.gguf [--draft FILE.gguf] [--hostile FILE.gguf] [--sets copy,json]
        [--temperature 0] [--tokens 160] [--rounds 3]

Every prompt is answered without guesses, with n-grams, with each named draft after the n-grams and, as "alone", without
them. The median over prompts and rounds of tokens per second against the plain answer beside it is what counts.
--hostile: a draft whose guesses are replaced by the token after the right one. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import edgellm
from edgellm import LoadParams, Model, SamplingParams
from edgellm.speculation.drafts import GoesOn, Proposal
from edgellm.speculation.model_draft import ModelDraft

TABLE = """def read_table(path, sep=","):
    rows = []
    with open(path) as file:
        for line in file:
            rows.append(line.rstrip("\\n").split(sep))
    header, *rest = rows
    return [dict(zip(header, row)) for row in rest]


def write_table(path, rows, sep=","):
    header = list(rows[0])
    with open(path, "w") as file:
        file.write(sep.join(header) + "\\n")
        for row in rows:
            file.write(sep.join(str(row[name]) for name in header) + "\\n")
"""
QUEUE = """class Queue:
    def __init__(self, limit):
        self.limit = limit
        self.items = []

    def put(self, item):
        if len(self.items) >= self.limit:
            raise OverflowError("the queue is full")
        self.items.append(item)

    def get(self):
        if not self.items:
            raise IndexError("the queue is empty")
        return self.items.pop(0)
"""
ARTICLE = """The lighthouse on the northern cape was built in 1871 by a company of masons from the mainland. For forty
years its keeper was Anna Lindqvist, who wrote the weather into a ledger every morning. "The sea does not care what we
call it," she noted in the winter of 1893, when ice closed the harbour for eleven weeks. The ledger is kept in the town
library, and fishermen still read it before the herring season."""
ORDERS = (
    "Order 1042: Maria Ferreira, 3 copies of The Long Winter, 44.70 euros, Lisbon. "
    "Order 1043: Tom Okafor, 1 copy of Rivers of Ice, 18.20 euros, Abuja. "
    "Order 1044: Wei Zhang, 2 copies of The Long Winter, 29.80 euros, Chengdu."
)
_LINE = (
    "{set:<8} {draft:<24} {ratio:5.2f} x   {tokens_per_step:5.2f} tokens a step, {accepted:4.0%} of {drafted} right, "
    "{draft_share:4.0%} of the time in drafts"
)


def sets() -> dict[str, list[str]]:
    """Questions by kind."""
    rename = "Write this code again with the name `{}` changed to `{}`, and nothing else:\n```python\n{}```"
    return {
        "copy": [
            f"Repeat this code exactly:\n```python\n{TABLE}```",
            rename.format("rows", "lines", TABLE),
            rename.format("items", "entries", QUEUE),
        ],
        "quotes": [
            f"Summarize this text and quote its most important sentences word for word:\n\n{ARTICLE}",
            f"What does the text say about the ledger? Quote it.\n\n{ARTICLE}",
        ],
        "json": [
            f"Give these orders as a JSON list with number, customer, copies, title, price and city:\n\n{ORDERS}",
            f"Give every customer and city as JSON:\n\n{ORDERS}",
        ],
        "chat": [
            "What should I cook for friends who like mushrooms?",
            "Explain why the sky is blue to a child.",
            "Tell me about a town by the sea.",
        ],
        "random": ["".join(chr(97 + (i * i * 7 + i * 13) % 26) + " " * (i % 5 == 0) for i in range(300))],
    }


class Hostile:
    """Guesses at a real draft's cost, each one id beside it: nearly always wrong."""

    is_free = False

    def __init__(self, draft: ModelDraft) -> None:
        self.name, self._draft = "hostile", draft

    def propose(self, history: Sequence[int], k: int, goes_on: GoesOn) -> Proposal:
        proposal = self._draft.propose(history, k, goes_on)
        return proposal._replace(tokens=[max(0, token - 1) for token in proposal.tokens], source=self.name)


def contestants(options: argparse.Namespace) -> dict[str, Any]:
    """Name → `draft=`."""
    found: dict[str, Any] = {"ngram": "ngram"}
    for path in options.draft:
        found |= {path.stem: path, f"{path.stem} alone": [path]}
    return found


def use_hostile(model: Model, path: Path) -> None:
    """Let the choice "hostile" stand for the n-grams and a hostile draft."""
    plain = model._drafts.speculator
    draft = Hostile(model._drafts._open(path))  # type: ignore[arg-type]

    def speculator(choice: Any, *form: Any, **options: Any) -> Any:
        made = plain("ngram" if choice == "hostile" else choice, *form, **options)
        if choice == "hostile" and made:
            made.drafts = [*made.drafts, draft]
        return made

    model._drafts.speculator = speculator  # type: ignore[method-assign]


def answer(model: Model, prompt: list[int], params: SamplingParams, draft: Any) -> edgellm.GenerationStats:
    return model.complete(prompt, params, draft=draft).stats


def measure(model: Model, named: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each set and contestant."""
    rows = []
    for kind, questions in sets().items():
        if options.sets and kind not in options.sets.split(","):
            continue
        ratios: dict[str, list[float]] = {name: [] for name in named}
        last: dict[str, list[edgellm.GenerationStats]] = {name: [] for name in named}
        for i in range(options.rounds + 1):  # the first one warms up and lets the depth be learned
            for question in questions:
                prompt = model.chat_tokens([{"role": "user", "content": question}])
                params = SamplingParams(max_tokens=options.tokens, temperature=options.temperature)
                before = answer(model, prompt, params, "off").decode_tokens_per_second
                for name, draft in named.items():
                    stats = answer(model, prompt, params, draft)
                    after = answer(model, prompt, params, "off").decode_tokens_per_second
                    if i and before and stats.completion_tokens > 8:
                        ratios[name].append(stats.decode_tokens_per_second / ((before + after) / 2))
                        last[name].append(stats)
                    before = after
        rows += [row(kind, name, ratios[name], last[name]) for name in named if ratios[name]]
        for found in rows[-len(named) :]:
            print(_LINE.format(**found), flush=True)
    return rows


def row(kind: str, name: str, ratios: list[float], stats: list[edgellm.GenerationStats]) -> dict[str, Any]:
    drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
    steps, tokens = sum(s.steps for s in stats), sum(s.completion_tokens - 1 for s in stats)
    seconds = sum(s.decode_seconds for s in stats)
    return {
        "set": kind,
        "draft": name,
        "ratio": round(median(ratios), 3),
        "worst": round(min(ratios), 3),
        "tokens_per_step": round(tokens / max(1, steps), 2),
        "drafted": drafted,
        "accepted": round(accepted / max(1, drafted), 3),
        "draft_share": round(sum(s.draft_seconds for s in stats) / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path, action="append", default=[])
    parser.add_argument("--hostile", type=Path)
    parser.add_argument("--sets", default="")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    named = contestants(options)
    with edgellm.load(options.target, LoadParams(n_ctx=2048)) as model:
        if options.hostile:
            use_hostile(model, options.hostile)
            named["hostile"] = "hostile"
        rows = measure(model, named, options)
        costs = {n: round(model._drafts.depth.cost(n), 2) for n in (2, 3, 4, 8, 16, 25)}
    print("cost of evaluating n tokens, in plain steps:", costs)
    result = {"benchmark": "speculation", "target": options.target.name, "temperature": options.temperature}
    print(json.dumps(result | {"costs": costs, "rows": rows}))


if __name__ == "__main__":
    main()

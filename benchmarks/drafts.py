"""What drafts bring: an index of a fine-tune's training answers, and a distilled model for a larger target.

(a) examples/fine_tune, merged and quantized to Q4_0; the index holds its 60 training dialogues, the prompts are the 12
    held-out ones. (b) SmolLM2 with six blocks for each of its own (benchmarks/expanded_target.py: 666 M parameters,
    synthetic, SmolLM2's function) at Q4_0, the draft six of SmolLM2's blocks, distilled on SmolLM2's own dialogues.

    python benchmarks/drafts.py [--keep DIR] [--minutes 10] [--text T.jsonl] [--only index|model] [--picture OUT.png]

What is in --keep already is used again: fine-tune.gguf, small.gguf (SmolLM2 at Q4_0), large.gguf, dialogues.jsonl,
draft.gguf. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import converters
from benchmarks.expanded_target import expanded_smollm2
from edgellm.catalog.cards import example_adapter, resolve
from edgellm.gguf_header import check_loadable, read_header
from edgellm.measure.drafts import Gain, measure_draft
from edgellm.measure.passages import Passage, held_out, read_passages
from edgellm.speculation.text_index import write_index

HERE = Path(__file__).parent.parent
DATA = HERE / "examples" / "fine_tune"
N_BLOCKS, N_TRIED = 6, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--text", type=Path, help="dialogues to distil on, instead of SmolLM2's own")
    parser.add_argument("--only", choices=["index", "model"])
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"benchmark": "drafts"}
        if options.only != "model":
            found["fine_tune_index"] = of_index(folder)
        if options.only != "index":
            found |= of_model(folder, options.text, options.minutes)
    if options.picture:
        draw(found, options.picture)
    print(json.dumps(found))


def of_index(folder: Path) -> dict[str, Any]:
    tuned = folder / "fine-tune.gguf"
    if not tuned.exists():
        with tempfile.TemporaryDirectory() as scratch:
            base = converters.to_checkpoint(resolve(None), Path(scratch) / "base")
            converters.convert(base, tuned, quant="Q4_0", adapters=[example_adapter()], receipt="fast")
    learned, tried = (read_passages(DATA / name, tuned) for name in ("dialogues.jsonl", "held_out.jsonl"))
    index = folder / "fine-tune.ngram"
    write_index(index, [passage.tokens for passage in learned], check_loadable(tuned))
    gain = measure_draft(tuned, index, [passage.prompt for passage in tried], max_tokens=64)
    return shown("(a) the fine-tune, an index of its training dialogues", gain)


def of_model(folder: Path, text: Path | None, minutes: float) -> dict[str, Any]:
    small, large, draft = (folder / name for name in ("small.gguf", "large.gguf", "draft.gguf"))
    if not small.exists():
        converters.convert(resolve(None), small, quant="Q4_0", receipt="fast")
    if not large.exists():
        with tempfile.TemporaryDirectory() as scratch:
            expanded = expanded_smollm2(Path(scratch) / "expanded", 6)
            converters.convert(expanded, large, quant="Q4_0", receipt="fast")
    dialogues = text or folder / "dialogues.jsonl"
    passages = read_passages(dialogues if dialogues.exists() else "self", small, n_tokens=60_000)
    learned, tried = held_out(passages, N_TRIED)
    if not draft.exists():
        lines = folder / "learned.jsonl"
        write_dialogues(lines, learned, small)
        made = converters.distil(small, draft, n_blocks=N_BLOCKS, text=lines, minutes=minutes, n_prompts=2)
        print("\n".join(made.lines()))
    prompts = [passage.prompt for passage in tried]
    before = folder / "untrained.gguf"
    if not before.exists():
        lines = folder / "learned.jsonl"
        converters.distil(small, before, n_blocks=N_BLOCKS, text=lines, n_steps=1, minutes=0.5, n_prompts=1)
    how = json.loads(read_header(draft).metadata["edgellm.distillation"])
    print(f"distilled: {how}")
    return {
        "distillation": how,
        "before": shown("(b) 666 M synthetic, the draft before training", measure_draft(large, before, prompts[:3])),
        "after": shown("(b) 666 M synthetic, the distilled draft", measure_draft(large, draft, prompts)),
    }


def write_dialogues(path: Path, passages: list[Passage], model: Path) -> None:
    """Passages of one question and one answer as JSON lines."""
    import edgellm

    with edgellm.load(model) as opened, path.open("w", encoding="utf-8") as file:
        for passage in passages:
            prompt = opened.detokenize(passage.prompt, special=True)
            question = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            answer = opened.detokenize(passage.tokens[passage.begin :])
            turns = [("user", question), ("assistant", answer)]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")


def shown(title: str, gain: Gain) -> dict[str, Any]:
    """Print a table; the figures as plain data."""
    print(f"{title}\n  {gain.verdict()}; {gain.same} of {gain.n_prompts} answers are the same")
    for name, way in gain.ways.items():
        row = way.as_dict()
        print(
            f"  {name:<6} {row['tokens_per_second']:7.1f} tok/s  {row['tokens_per_step']:5.2f} tokens a step  "
            f"{100 * row['accepted_share']:3.0f} % accepted"
        )
    return gain.as_dict()


def draw(found: dict[str, Any], path: Path) -> None:
    """Speeds without guesses, with n-grams, with the draft."""
    from matplotlib.figure import Figure

    titles = {
        "fine_tune_index": "fine-tune, index",
        "before": "666 M, untrained draft",
        "after": "666 M, distilled draft",
    }
    kinds = [kind for kind in titles if kind in found]
    figure = Figure(figsize=(2.6 * len(kinds) + 1, 3), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        ways = {"off": "none", "ngram": "n-grams", "draft": "draft"}
        speeds = [found[kind][way]["tokens_per_second"] for way in ways]
        bars = ax.bar(list(ways.values()), speeds, color=["tab:gray", "tab:blue", "tab:orange"])
        ax.bar_label(bars, [f"{speed:.0f}" for speed in speeds])
        ax.margins(y=0.12)
        ax.set_title(f"{titles[kind]}\n{found[kind]['speedup']:.2f} × (median)", fontsize=9)
        ax.set_ylabel("tokens per second")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

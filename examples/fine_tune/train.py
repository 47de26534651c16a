"""Trains a small LoRA on SmolLM2-135M-Instruct, on the CPU, with peft: everyday sentences become a reminder as JSON.

    python examples/fine_tune/train.py BASE [--out examples/fine_tune/adapter] [--epochs 10]

BASE is the checkpoint folder that `edgellm convert MODEL.gguf --to-checkpoint BASE` makes of the bundled GGUF. Needs
the extra `dev` (torch, transformers, peft). dialogues.jsonl is what it learns, held_out.jsonl what it never sees.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE_NAME = "SmolLM2-135M-Instruct"
BATCH, LEARNING_RATE, WARM_UP = 6, 2e-3, 10
IGNORED = -100  # torch's label for positions that don't count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "adapter")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    examples = [encode(tokenizer, line) for line in (HERE / "dialogues.jsonl").read_text("utf-8").splitlines()]
    train(model, examples, options.epochs)
    save(model, options.out)


def encode(tokenizer: Any, line: str) -> tuple[list[int], int]:
    """The token ids of a dialogue as the chat template writes it, and where the answer begins."""
    messages = json.loads(line)["messages"]
    question = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, whole)]
    return ids[1], len(ids[0])


def train(model: Any, examples: list[tuple[list[int], int]], epochs: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    n_steps = epochs * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / (n_steps + 1))
    )
    order = random.Random(0)
    started = time.perf_counter()
    for epoch in range(epochs):
        order.shuffle(examples)
        losses = []
        for at in range(0, len(examples), BATCH):
            ids, labels = batch(examples[at : at + BATCH])
            loss = model(input_ids=ids, labels=labels, attention_mask=(ids != 0).long()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch + 1:2}: loss {mean:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


def batch(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, int64 (examples, longest), padded at the end; only answers are learned."""
    longest = max(len(ids) for ids, _ in examples)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    labels = [[IGNORED] * start + ids[start:] + [IGNORED] * (longest - len(ids)) for ids, start in examples]
    return torch.tensor(padded), torch.tensor(labels)


def save(model: Any, out: Path) -> None:
    """The adapter in half precision, with the base's name instead of a path of this machine."""
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (out / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

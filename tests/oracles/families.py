"""Small random-weight models of every family, and how far llama.cpp is from transformers on them.

`python -m tests.oracles.families` measures all and prints docs/architectures.md.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import convert, to_checkpoint
from converters.architectures import ARCHITECTURES
from converters.architectures.spec import Arch
from tests.converters import reference, tiny
from tests.oracles.family_cases import CASES, Case

N_TOKENS = 128
FIRST_TOKEN = 6  # behind every padding token, whose positions RoBERTa doesn't count


@dataclass(frozen=True)
class Measured:
    """deviation: max |Δ| of the logits (of the hidden states) over their standard deviation. agree: share of
    positions with the same top token (for an embedding model the least cosine). pooled: cosine of the pooled
    embedding. back: deviation of the checkpoint made from the GGUF. changed: its tensors that aren't bit for bit
    the original's, with the largest difference.
    """

    deviation: float
    agree: float
    pooled: float = 1.0
    changed: Mapping[str, float] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()


def measure(case: Case, folder: Path) -> Measured:
    """Make the model, convert it to F32, compare; then convert it back and compare tensors."""
    model = make_reference(case, folder / "model")
    gguf = folder / f"{case.name}.gguf"
    convert(folder / "model", gguf, quant="F32")
    tokens = [int(token) for token in np.random.default_rng(0).integers(FIRST_TOKEN, 1000, N_TOKENS)]
    wanted = outputs(model, tokens)
    to_checkpoint(gguf, folder / "back")
    before, after = _tensors(folder / "model"), _tensors(folder / "back")
    changed = {
        name: float(np.abs(values - after[name]).max()) if values.shape == after[name].shape else float("inf")
        for name, values in before.items()
        if name in after and not np.array_equal(values, after[name])
    }
    missing = frozenset(before.keys() - after.keys())
    if case.pooling:
        found = reference.llama_embeddings(gguf, tokens)
        pooled = {"mean": wanted.mean(0), "cls": wanted[0], "lasttoken": wanted[-1]}[case.pooling]
        cosine = _cosine(reference.llama_embeddings(gguf, tokens, pooled=True), pooled)
        agree = min(_cosine(a, b) for a, b in zip(found, wanted, strict=True))
        return Measured(_deviation(found, wanted), agree, cosine, changed, missing)
    found = reference.llama_logits(gguf, tokens)
    agree = float((found.argmax(1) == wanted.argmax(1)).mean())
    return Measured(_deviation(found, wanted), agree, 1.0, changed, missing)


def _deviation(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def make_reference(case: Case, folder: Path) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, case.config_class)(**case.config)
    model = getattr(transformers, case.model_class)(config).eval()
    # norms are stored less one
    centred = case.model_class.startswith(("Gemma", "Qwen3_5")) and not case.model_class.startswith("Gemma4")
    with torch.no_grad():
        stored = ("expert_bias", "layer_scalar")
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(stored)]
        for name, values in [*model.named_parameters(), *biases]:
            is_norm = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
            # norms and biases are initialized to constants, which would hide mistakes
            scale = 0.3 if values.ndim == 1 else 0.08
            values.copy_(torch.randn_like(values) * scale + (1.0 if is_norm and not centred else 0.0))
            if case.softened and re.search(case.softened, name):
                values.div_(3)
    model.save_pretrained(folder)
    tiny.add_tokenizer(folder)
    if case.edit:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(case.edit)))
    if case.pooling:
        _add_modules(folder, case.pooling)
    return model


def _add_modules(folder: Path, pooling: str) -> None:
    prefix = "sentence_transformers.models."
    modules = [{"type": f"{prefix}Transformer", "path": ""}, {"type": f"{prefix}Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    keys = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    modes = {f"pooling_mode_{key}": name == pooling for name, key in keys.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def outputs(model: Any, tokens: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        out = model(torch.tensor([tokens]))
    values: NDArray[np.float32] = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0].float().numpy()
    return values


def _tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors.numpy import load_file

    found: dict[str, NDArray[np.float32]] = {}
    for path in folder.glob("*.safetensors"):
        found |= {name.removeprefix("model."): values for name, values in load_file(path).items()}
    return found


def table(measured: Mapping[str, Measured]) -> str:
    """docs/architectures.md."""
    lines = [
        "# Model families",
        "",
        "Made by `python -m tests.oracles.families`; `tests/oracles/test_families.py` checks the same models in CI.",
        "",
        f"Each family was verified with small random-weight models of transformers' own classes: {N_TOKENS} tokens,",
        "F32 GGUF, llama.cpp's logits (hidden states of embedding models) against transformers' in float32, and back",
        "from the GGUF to a checkpoint. Deviation is max |Δ| ÷ standard deviation, over all configurations.",
        "",
        "| GGUF | classes | verified with | deviation |",
        "|---|---|---|---|",
    ]
    for arch in sorted(ARCHITECTURES, key=lambda arch: (arch.name, arch.hf_classes)):
        cases = cases_of(arch)
        worst = max(measured[case.name].deviation for case in cases)
        what = "; ".join(case.what for case in cases)
        lines.append(f"| {arch.name} | {class_column(arch)} | {what} | {worst:.1e} |")
    return "\n".join([*lines, "", *_REMARKS, ""])


_REMARKS = (
    "Classes with a * have no model of their own here: wrappers with images or sound, of which the text is taken, and",
    "classes whose tensors are the same under other names.",
    "",
    "llama.cpp computes GELU from a table of 16-bit floats: families with it deviate by up to 3e-3, and Gemma 4, whose",
    "attention magnifies it, by more. gpt-oss's yarn has a ramp with unrounded ends (`truncate = false`), which",
    "llama.cpp rounds; where a small difference changes the choice of experts, single tokens then differ widely.",
    "",
    "Going back, tensors are restored bit for bit, except: norms stored less one (Gemma, Qwen3.5; within 1 ulp of",
    "1 + w), the logarithms of state-space decays (Falcon-H1, Qwen3.5; a few ulp), Falcon-H1's multipliers, which stay",
    "in the weights, RoBERTa's unused positions, and BERT's pooler and language-model heads, which a GGUF hasn't.",
    "Back from MiniCPM, transformers needs the model's own code to load the checkpoint.",
    "",
    "What llama.cpp computes differently (a window it hasn't, a scaling it doesn't know, an activation) is refused",
    "with one line that names the field and what is supported. Not done here: Gemma 4 with experts.",
)


def class_column(arch: Arch) -> str:
    """The classes of a family, those without a model marked."""
    measured = {case.converted_class for case in cases_of(arch)}
    return ", ".join(name if name in measured else f"{name}*" for name in arch.hf_classes)


def cases_of(arch: Arch) -> list[Case]:
    """The models that a family is verified with."""
    return [case for case in CASES if case.family == arch.name and case.converted_class in arch.model_types]


def main(write: Callable[[str], object] = print) -> None:
    """Measure everything and print the document."""
    with tempfile.TemporaryDirectory() as folder:
        measured = {case.name: measure(case, Path(folder) / case.name) for case in CASES}
    write(table(measured))


if __name__ == "__main__":
    main()

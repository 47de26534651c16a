"""A LoRA of peft's on every linear layer of every family: merged into the checkpoint, into a GGUF, and at run time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import convert, export_adapter
from edgellm.errors import AdapterError
from tests.converters import reference
from tests.oracles.families import FIRST_TOKEN, make_reference
from tests.oracles.family_cases import CASES, Case

N_TOKENS = 128
# what peft refuses, and what llama.cpp has no run-time adapter for
_EXCLUDED = {"falcon-h1": ["out_proj", "conv1d"], "gemma4": ["per_layer_model_projection"]}
GENERATIVE = [case for case in CASES if not case.pooling]


def make_adapter(case: Case, model: Any, folder: Path, **options: Any) -> Any:
    """peft's model with random values in every trained parameter, saved to `folder`."""
    import peft
    import torch

    experts = sorted({f"experts.{name.rsplit('.', 1)[1]}" for name, parameter in model.named_parameters()
                      if ".experts." in name and parameter.ndim == 3})  # fmt: skip
    excluded = {"exclude_modules": _EXCLUDED[case.family]} if case.family in _EXCLUDED else {}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | excluded | options
    config = peft.LoraConfig(**settings, target_parameters=experts or None)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    if case.edit:  # the model was made with a class that stands for another
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERATIVE, ids=lambda case: f"{case.name} {case.what}")
def test_merged_and_at_run_time(case: Case, tmp_path: Path) -> None:
    import torch

    model = make_reference(case, tmp_path / "base")
    adapted = make_adapter(case, model, tmp_path / "adapter")
    tokens = [int(token) for token in np.random.default_rng(0).integers(FIRST_TOKEN, 1000, N_TOKENS)]
    with torch.no_grad():
        wanted = adapted.eval()(torch.tensor([tokens])).logits[0].float().numpy()
        plain = model(torch.tensor([tokens])).logits[0].float().numpy()
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    convert(tmp_path / "base", base, quant="F32")
    convert(tmp_path / "base", merged, quant="F32", adapters=[tmp_path / "adapter"])
    found = reference.llama_logits(merged, tokens)
    assert deviation(plain, wanted) > 20 * case.bound  # it does something
    assert deviation(found, wanted) <= case.bound
    if case.family == "falcon-h1":  # its factors are folded into the GGUF's weights, and lost
        with pytest.raises(AdapterError, match="doesn't tell"):
            convert(base, tmp_path / "from-gguf.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    else:
        convert(base, tmp_path / "from-gguf.gguf", quant="F32", adapters=[tmp_path / "adapter"])
        assert_same_tensors(tmp_path / "from-gguf.gguf", merged)
    export_adapter(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "lora.gguf", measure=False)
    at_run_time = reference.llama_logits(base, tokens, lora=[(tmp_path / "lora.gguf", 1.0)])
    assert deviation(at_run_time, found) <= max(1e-3, case.bound / 2)


def deviation(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


def assert_same_tensors(path: Path, other: Path) -> None:
    ours, theirs = reference.float_tensors(path), reference.float_tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = ours[name], theirs[name]
        assert np.abs(a - b).max() <= 1e-6 * max(1.0, float(np.abs(b).max())), name

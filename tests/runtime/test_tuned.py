"""What `tune` stored: kept per machine and model, used by `load` where nothing else was asked for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.catalog.partners import fingerprint
from edgellm.config import LoadParams
from edgellm.engine import resources, tuned
from edgellm.engine.parallel import Request
from edgellm.engine.tuned import Attention, Tuning, forget, save, settle, tuning_file, tuning_for
from edgellm.gguf_metadata import set_entry
from edgellm.native.parallel import ParallelContext

FOUND = Tuning(
    n_threads=1,
    n_batch=64,
    load_mode="mmap",
    attention=(Attention("bf16", False), Attention("f16", True), Attention("q8_0", True)),
    verify_cost={1: 1.0, 2: 1.25, 8: 2.5},
    measured={"seconds": 1.0},
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "_folder", lambda: tmp_path / "tuning")
    return tmp_path / "tuning"


def test_what_is_stored_comes_back_and_can_be_forgotten(model_path: Path) -> None:
    assert tuning_for(model_path) is None
    file = save(model_path, FOUND)
    assert tuning_for(model_path) == FOUND
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half written beside it
    assert forget(model_path)
    assert tuning_for(model_path) is None
    assert not forget(model_path)


def test_it_holds_for_this_machine_only(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model_path, FOUND)
    monkeypatch.setattr(tuned, "physical_cpu_count", lambda: 77)
    assert tuning_for(model_path) is None


def test_it_holds_for_this_model_only(model_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = bytearray(model_path.read_bytes())
    other.write_bytes(data)
    save(model_path, FOUND)
    assert tuning_for(other) == FOUND  # the same model by another name
    data[len(data) - 100 : len(data)] = bytes(100)
    other.write_bytes(data)
    assert tuning_for(other) is None


def test_it_still_holds_when_a_draft_is_written_into_the_file(model_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(model_path, tmp_path / "copy.gguf"))
    save(copy, FOUND)
    set_entry(copy, "edgellm.draft", ["some.ngram", "other.gguf"])
    assert copy.stat().st_size != model_path.stat().st_size
    assert tuning_for(copy) == FOUND


def test_hashing_reads_a_bounded_part_of_the_file(tmp_path: Path) -> None:
    huge = tmp_path / "huge.gguf"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it whole would take for ever
    assert len(fingerprint(huge)) == 64


def damaged(**changes: Any) -> str:
    content = {
        "format": 1,
        "machine": tuned.machine(),
        "model": "",
        "tuning": json.loads(json.dumps(tuned.asdict(FOUND))),
    }
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "\x00\xff",
        '{"format": 2}',
        damaged(model="of another one"),
        damaged(machine="elsewhere"),
    ],
)
def test_damaged_and_foreign_files_are_ignored_and_named(
    model_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = save(model_path, FOUND)
    file.write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="edgellm"):
        assert tuning_for(model_path) is None
    assert file.name in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"n_threads": 0},
        {"n_batch": "many"},
        {"load_mode": "fast"},
        {"attention": [{"kv_type": "q2", "flash_attn": True}]},
        {"attention": [{"kv_type": "f16"}]},
        {"verify_cost": {"two": 1}},
        {"verify_cost": {"2": -1}},
        {"verify_cost": [1]},
    ],
)
def test_values_that_make_no_sense_are_ignored(model_path: Path, change: dict[str, Any]) -> None:
    file = save(model_path, FOUND)
    content = json.loads(file.read_text())
    content["tuning"].update(change)
    file.write_text(json.dumps(content))
    assert tuning_for(model_path) is None


def test_what_the_caller_gives_wins() -> None:
    assert settle(LoadParams(), None) == LoadParams()
    assert settle(LoadParams(tuned=False), FOUND) == LoadParams(tuned=False)
    assert settle(LoadParams(n_ctx=99), FOUND) == LoadParams(99, 64, 1, "bf16", False, "mmap")
    given = LoadParams(n_batch=8, n_threads=2, kv_type="f32", flash_attn=True, load_mode="mlock")
    assert settle(given, FOUND) == given


@pytest.mark.parametrize(
    ("given", "attention"),
    [
        ({}, ("bf16", False)),
        ({"flash_attn": True}, ("f16", True)),
        ({"kv_type": "f16"}, ("f16", True)),
        ({"kv_type": "q8_0"}, ("q8_0", True)),
        ({"kv_type": "f32"}, ("f32", None)),  # wasn't measured
    ],
)
def test_one_half_given_brings_the_best_other_half(given: dict[str, Any], attention: tuple[str, bool | None]) -> None:
    params = settle(LoadParams(**given), FOUND)
    assert (params.kv_type, params.flash_attn) == attention


def test_load_uses_it_and_says_so(model_path: Path) -> None:
    save(model_path, FOUND)
    with edgellm.load(model_path, LoadParams(n_ctx=256)) as model:
        assert dict(model.settings) == {
            "n_ctx": 256,
            "n_threads": 1,
            "n_batch": 64,
            "kv_type": "bf16",
            "flash_attn": False,
            "load_mode": "mmap",
            "tuned": True,
        }
        assert model._drafts.depth.cost(8) == 2.5
        assert model.complete("The capital of France is", edgellm.SamplingParams(max_tokens=3)).token_ids
    with edgellm.load(model_path, LoadParams(n_ctx=256, tuned=False)) as model:
        assert model.settings["tuned"] is False
        assert (model.settings["kv_type"], model.settings["load_mode"]) == ("f16", "repack")


def test_many_at_once_have_the_attention_that_was_asked_for(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model_path, FOUND)
    made: list[LoadParams] = []

    def make(native: object, params: LoadParams, n_sequences: int) -> ParallelContext:
        made.append(params)
        return ParallelContext(native, params, n_sequences)  # type: ignore[arg-type]

    monkeypatch.setattr(resources, "ParallelContext", make)
    for asked in (LoadParams(n_ctx=64), LoadParams(n_ctx=64, kv_type="f32")):
        with edgellm.load(model_path, asked) as model:
            request = Request(0, model.tokenize("Hello"), edgellm.SamplingParams(max_tokens=2))
            assert [answer.error for answer in model.answer_all([request], 2)] == [""]
    assert [(p.kv_type, p.flash_attn, p.n_threads) for p in made] == [(None, None, 1), ("f32", None, 1)]


def test_a_folder_that_cannot_be_written_is_one_error(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuned, "_folder", lambda: tmp_path / "file" / "tuning")
    with pytest.raises(edgellm.OutputError, match="cannot write"):
        save(model_path, FOUND)
    assert tuning_for(model_path) is None


def test_the_file_name_tells_models_apart(model_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF" + bytes(1000))
    assert tuning_file(other) != tuning_file(model_path)

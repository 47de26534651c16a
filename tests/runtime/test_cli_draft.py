"""`edgellm draft` as a command line: what it makes, measures, says and remembers; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgellm.catalog.partners import PARTNER_KEY
from edgellm.cli.main import run_command
from edgellm.engine.drafts import partner_files
from edgellm.gguf_header import read_header
from edgellm.measure.drafts import Gain, Way
from edgellm.speculation.text_index import is_index

FACTS = [
    f"{name} lives at {n} Harbour Street, has the telephone number 555-0{n}, and reads the {paper}."
    for n, (name, paper) in enumerate(
        [(a, b) for a in ("Ada", "Grace", "Alan", "Edsger") for b in ("Times", "Echo")], start=21
    )
]


@pytest.fixture
def model(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return Path(shutil.copy(model_path, tmp_path / "model.gguf"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [
        {"text": " ".join(FACTS)},
        {"prompt": "Who lives there?", "completion": FACTS[0]},
        *({"text": t} for t in FACTS),
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_an_index_is_made_measured_and_kept(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft.ngram"
    command = ["draft", str(model), "--from-text", str(data), "-o", str(out), "-n", "12", "--prompts", "2"]
    assert run_command([*command, "--json", "--always"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert is_index(out)
    assert found["n_documents"] == 2 + len(FACTS)
    assert found["gain"]["n_prompts"] == 2
    assert set(found["gain"]) >= {"speedup", "over_ngram", "pays", "off", "ngram", "draft", "same_answers"}
    assert found["used_by_default"] is True
    assert read_header(model).metadata[PARTNER_KEY] == "draft.ngram"
    assert run_command(command) == 1
    assert "--force" in capsys.readouterr().err
    assert run_command([*command, "--force", "--never"]) == 0
    printed = capsys.readouterr().out
    assert "not used by default, as asked" in printed
    assert "It " in printed
    assert partner_files(read_header(model)) == []
    assert not list(tmp_path.glob("*.trial*"))


def test_wrong_usage_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "d")]
    bad: list[list[str]] = [
        ["draft", str(model), *out],
        ["draft", str(model), *out, "--from-text", "self", "--layers", "3"],
        ["draft", str(model), *out, "--from-text", "self", "--always", "--never"],
        ["draft", str(model), *out, "--layers", "1"],
        ["draft", str(model), *out, "--layers", "31", "--minutes", "0.1"],
    ]
    for command in bad:
        assert run_command(command) == 2, command
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b"\xff\xfe", "no UTF-8"), (b"{", "no JSON"), (b'{"a": 1}', "is missing"), (b"[3]", "no")],
)
def test_bad_data_is_a_bad_input_file(
    content: bytes, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert run_command(["draft", str(model), "--from-text", str(path), "-o", str(tmp_path / "d")]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_missing_model_and_a_missing_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "d")]
    assert run_command(["draft", str(tmp_path / "none.gguf"), "--from-text", "self", *out]) == 3
    assert run_command(["draft", str(tmp_path), "--layers", "3", *out]) == 3
    assert run_command(["draft", "x", "--from-text", "self", "-o", str(tmp_path / "no" / "d")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def way(*speeds: float) -> Way:
    return Way(speeds=list(speeds))


def test_it_pays_only_where_it_beats_plain_decoding_and_ngrams() -> None:
    better = Gain({"off": way(10, 20), "ngram": way(11, 20), "draft": way(15, 30)}, 2, 2)
    assert better.pays
    assert better.verdict().startswith("It pays: 1.50 × plain decoding, 1.43 × n-grams")
    no_more_than_ngrams = Gain({"off": way(10), "ngram": way(15), "draft": way(15)}, 1, 1)
    assert not no_more_than_ngrams.pays
    assert no_more_than_ngrams.verdict().startswith("It doesn't pay here: 1.50 ×")
    assert not Gain({"off": way(), "ngram": way(), "draft": way()}, 0, 0).pays

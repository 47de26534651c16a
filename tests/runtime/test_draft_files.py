"""Drafts that a model uses by default: what its file, or a note of the user's, names; index files as drafts."""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from pathlib import Path

import pytest

import edgellm
from edgellm import SamplingParams
from edgellm.catalog import partners
from edgellm.catalog.partners import PARTNER_KEY, fingerprint, partners_of, set_partners
from edgellm.engine.drafts import partner_files, use_by_default
from edgellm.errors import DraftMismatch, ModelFileError, OutputError
from edgellm.gguf_header import check_loadable, read_header
from edgellm.gguf_metadata import set_entry
from edgellm.native.model import NativeModel
from edgellm.speculation.text_index import write_index

QUESTION = [{"role": "user", "content": "Name the planets of our solar system, in order, one a line."}]


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def tensor_bytes(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    infos = read_header(path).tensors
    return {name: hashlib.sha256(data[i.offset : i.offset + i.n_bytes]).hexdigest() for name, i in infos.items()}


@pytest.fixture
def copy(model_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(model_path, tmp_path / "model.gguf"))


def test_an_entry_is_set_replaced_and_removed_and_nothing_else_changes(copy: Path) -> None:
    before, tensors, size = read_header(copy), tensor_bytes(copy), copy.stat().st_size
    copy.chmod(0o640)
    values: list[str | list[str]] = ["a.gguf", "a much longer name than before " * 9, ["x.ngram", "y.gguf"], "ü"]
    for value in values:
        set_entry(copy, PARTNER_KEY, value)
        now = check_loadable(copy)
        assert now.metadata == {**before.metadata, PARTNER_KEY: value}
        assert {k: now.kinds[k] for k in before.kinds} == before.kinds
        assert tensor_bytes(copy) == tensors
        assert all(info.offset % now.alignment == 0 for info in now.tensors.values())
    assert copy.stat().st_mode & 0o777 == 0o640
    NativeModel(copy, load_mode="mmap").close()
    set_entry(copy, PARTNER_KEY, None)
    assert read_header(copy).metadata == before.metadata
    assert copy.stat().st_size == size
    assert [path.name for path in copy.parent.glob("model*")] == ["model.gguf"]


def test_files_that_cannot_be_written_stay_as_they_were(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(copy.read_bytes()).digest()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="as it was"):
        set_entry(copy, PARTNER_KEY, "a")
    assert hashlib.sha256(copy.read_bytes()).digest() == digest
    assert not list(copy.parent.glob("model.gguf*.partial"))
    (copy.parent / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelFileError):
        set_entry(copy.parent / "bad.gguf", PARTNER_KEY, "a")


def test_partners_are_named_in_the_models_own_file(copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafts"
    folder.mkdir()
    index, other = folder / "a.ngram", folder / "b.gguf"
    write_index(index, [[5, 6, 7]], read_header(copy))
    other.write_bytes(b"not looked at yet")
    assert PARTNER_KEY in use_by_default(copy, other, True)
    assert read_header(copy).metadata[PARTNER_KEY] == "drafts/b.gguf"
    use_by_default(copy, index, True)  # an index beside the model, not in its place
    assert partner_files(read_header(copy)) == [index, other]
    again = folder / "c.ngram"
    write_index(again, [[5, 6, 7]], read_header(copy))
    use_by_default(copy, again, True)
    assert partner_files(read_header(copy)) == [again, other]
    use_by_default(copy, other, False)
    use_by_default(copy, again, False)
    assert PARTNER_KEY not in read_header(copy).metadata


def test_a_model_in_a_package_gets_a_note_instead(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(copy.read_bytes()).digest()
    real = sysconfig.get_path
    monkeypatch.setattr(partners.sysconfig, "get_path", lambda name: str(tmp_path) if name == "purelib" else real(name))
    draft = tmp_path / "d.ngram"
    write_index(draft, [[5, 6, 7]], read_header(copy))
    assert "note" in use_by_default(copy, draft, True)
    assert hashlib.sha256(copy.read_bytes()).digest() == digest
    assert partner_files(read_header(copy)) == [draft]
    moved = Path(shutil.copy(copy, tmp_path / "elsewhere.gguf"))
    assert partner_files(read_header(moved)) == [draft]  # it is the same model
    data = bytearray(copy.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2_000_000] = bytes(2_000_000)
    moved.write_bytes(data)
    assert fingerprint(moved) != fingerprint(copy)
    assert partners_of(read_header(moved)) == []
    use_by_default(copy, draft, False)
    assert partners_of(read_header(copy)) == []


def test_a_damaged_note_is_no_note(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partners, "_is_ours_to_write", lambda path: False)
    set_partners(read_header(copy), [tmp_path / "x"])
    (note,) = (tmp_path / "data" / "edgellm" / "drafts").iterdir()
    for content in ("", "[]", '{"drafts": 3}', '{"drafts": [3]}'):
        note.write_text(content)
        assert partners_of(read_header(copy)) == []


def test_an_index_is_a_draft_by_path_in_a_list_and_by_default(copy: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=48)
    index = tmp_path / "answers"  # told by its content, not its name
    with edgellm.load(copy, edgellm.LoadParams(n_ctx=512)) as model:
        prompt = model.chat_tokens(QUESTION)
        plain = model.complete(prompt, params, draft="off")
        write_index(index, [[*prompt, *plain.token_ids]], read_header(copy))
        for choice in (index, [index], ["ngram", str(index)]):
            guessed = model.complete(prompt, params, draft=choice)
            assert guessed.stats.accepted > 20
            assert guessed.stats.steps < plain.stats.steps / 2
    use_by_default(copy, index, True)
    with edgellm.load(copy, edgellm.LoadParams(n_ctx=512)) as model:
        assert model.complete(prompt, params).stats.accepted > 20
    with edgellm.load(copy, edgellm.LoadParams(n_ctx=512)) as model:
        index.write_bytes(index.read_bytes()[:-1])
        assert model.complete(prompt, params).token_ids  # by default a bad draft is left out
        with pytest.raises(ModelFileError, match="cut off"):
            model.complete(prompt, params, draft=index)


def test_an_index_of_another_vocabulary_is_refused(copy: Path, tmp_path: Path) -> None:
    header = read_header(copy)
    header.metadata["tokenizer.ggml.tokens"] = header.metadata["tokenizer.ggml.tokens"][:-1]
    write_index(tmp_path / "other", [[5, 6, 7]], header)
    with (
        edgellm.load(copy, edgellm.LoadParams(n_ctx=512)) as model,
        pytest.raises(DraftMismatch, match="another vocabulary"),
    ):
        model.complete("A", SamplingParams(max_tokens=2), draft=tmp_path / "other")

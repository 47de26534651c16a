"""Models of other programs: found in folders laid out as theirs, each file once, whatever else lies there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgellm.catalog import discover
from edgellm.catalog.cards import resolve
from edgellm.catalog.discover import ModelFile, Store, find_stores, own_folder, resolve_name
from edgellm.catalog.partners import fingerprint
from edgellm.errors import ModelFileError
from edgellm.gguf_header import check_loadable
from tests.catalog.gguf_files import in_hugging_face, in_ollama, write_gguf

OLLAMA = "registry.ollama.ai/library"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, and none of the variables that point elsewhere."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "file.gguf")


def names(store: str | None = None) -> dict[str, ModelFile]:
    return {file.name: file for s in find_stores() if store in (None, s.name) for file in s.files}


def problems() -> list[str]:
    return [problem for store in find_stores() for problem in store.problems]


def test_an_empty_machine_has_nothing_and_no_folder_is_made(home: Path) -> None:
    assert names() == {}
    assert problems() == []
    assert list(home.iterdir()) == []


def test_each_program_is_looked_at_where_it_keeps_its_models(home: Path, file: Path, tmp_path: Path) -> None:
    write_gguf(own_folder() / "mine.gguf", seed=1)
    write_gguf(own_folder() / "work" / "other.GGUF", seed=2)
    write_gguf(home / ".lmstudio" / "models" / "pub" / "repo" / "studio-Q4_K_M.gguf", seed=3)
    write_gguf(home / ".cache" / "lm-studio" / "models" / "pub" / "old" / "old.gguf", seed=4)
    hub = home / ".cache" / "huggingface" / "hub"
    in_hugging_face(hub, "owner/name-GGUF", "a" * 40, "name-Q8_0.gguf", file)
    (hub / "models--owner--name-GGUF" / "blobs" / "x.incomplete").write_bytes(b"GGUF")
    blob = in_ollama(home / ".ollama" / "models", f"{OLLAMA}/llama3.2/1b", write_gguf(tmp_path / "o.gguf", seed=5))
    assert {name: found.store for name, found in names().items()} == {
        "mine": "edgellm",
        "work/other": "edgellm",
        "pub/repo/studio-Q4_K_M": "LM Studio",
        "pub/old/old": "LM Studio",
        "owner/name-GGUF/name-Q8_0": "Hugging Face",
        "llama3.2:1b": "Ollama",
    }
    assert names()["llama3.2:1b"].path == blob
    assert names()["llama3.2:1b"].n_bytes == blob.stat().st_size
    assert problems() == []


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("HF_HOME", "hub"), ("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_hugging_face_may_be_elsewhere(
    variable: str, folder: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    in_hugging_face(tmp_path / "elsewhere" / folder, "o/n", "a" * 40, "f.gguf", file)
    assert list(names("Hugging Face")) == ["o/n/f"]


def test_of_two_revisions_the_one_of_main_has_the_plain_name(home: Path, file: Path, tmp_path: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    old, new = "0" * 40, "1" * 40
    in_hugging_face(hub, "o/n", old, "f.gguf", file)
    in_hugging_face(hub, "o/n", new, "f.gguf", write_gguf(tmp_path / "new.gguf", seed=1))
    in_hugging_face(hub, "o/n", new, "sub/same.gguf", file)
    found = names()
    assert set(found) == {"o/n/f", "o/n/sub/same"}  # the old file and sub/same are one blob
    assert found["o/n/f"].path.resolve() != found["o/n/sub/same"].path.resolve()
    assert found["o/n/sub/same"].aliases == ("o/n/f@00000000",)
    assert resolve_name("o/n/f@00000000") == found["o/n/sub/same"].path


def test_links_to_one_file_are_one_model_of_several_names(home: Path, file: Path) -> None:
    blob = in_ollama(home / ".ollama" / "models", f"{OLLAMA}/tiny/latest", file)
    link = home / ".lmstudio" / "models" / "pub" / "repo" / "tiny.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    hard = own_folder() / "hard.gguf"
    hard.parent.mkdir(parents=True)
    os.link(blob, hard)
    found = names()
    assert list(found) == ["hard"]
    assert found["hard"].aliases == ("pub/repo/tiny", "tiny:latest")
    assert resolve_name("tiny:latest") == resolve_name("pub/repo/tiny") == hard


def test_folders_that_link_to_each_other_end(home: Path) -> None:
    folder = own_folder() / "a"
    write_gguf(folder / "one.gguf")
    (folder / "up").symlink_to(own_folder())
    (own_folder() / "b").symlink_to(folder)
    assert set(names()) == {"a/one"}


def test_a_model_in_several_files_is_one(home: Path) -> None:
    first = write_gguf(own_folder() / "big-Q8_0.gguf", parts=3)
    assert set(names()) == {"big-Q8_0"}
    found = names()["big-Q8_0"]
    assert found.path == first
    assert found.n_bytes == sum(path.stat().st_size for path in own_folder().iterdir())
    header = check_loadable(first)
    assert set(header.tensors) == {f"blk.{i}.attn_q.weight" for i in range(3)}
    assert header.n_bytes == found.n_bytes


def test_parts_that_are_missing_misnamed_or_not_the_first(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", parts=3)
    second = tmp_path / "m-00002-of-00003.gguf"
    with pytest.raises(ModelFileError, match=r"one of 3 files of a model; give the first: m-00001-of-00003\.gguf"):
        check_loadable(second)
    with pytest.raises(ModelFileError, match="give them their names back"):
        check_loadable(Path(shutil.copy(first, tmp_path / "renamed.gguf")))
    before = fingerprint(first)
    third = tmp_path / "m-00003-of-00003.gguf"
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    assert fingerprint(first) != before  # another fine-tune may differ in later parts alone
    second.unlink()
    with pytest.raises(ModelFileError, match=r"put m-00002-of-00003\.gguf beside it"):
        check_loadable(first)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "damaged"),
        (b'{"layers": 5}', "damaged"),
        (b'{"layers": [{}]}', "damaged"),
        (b'{"layers": [{"mediaType": 1, "digest": "x"}]}', "damaged"),
        (b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}', "damaged"),
        (b"[" * 100_000, "damaged"),
        (
            b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:%s"}]}' % (b"0" * 64),
            "its file isn't there",
        ),
    ],
)
def test_a_damaged_manifest_hides_no_other_model(home: Path, file: Path, content: bytes, said: str) -> None:
    models = home / ".ollama" / "models"
    in_ollama(models, f"{OLLAMA}/good/latest", file)
    bad = models / "manifests" / OLLAMA / "bad" / "latest"
    bad.parent.mkdir()
    bad.write_bytes(content)
    found = names()
    assert found["good:latest"].problem == ""
    assert said in found["bad:latest"].problem
    with pytest.raises(ModelFileError, match=r"bad:latest \(Ollama\)"):
        resolve("bad")


def test_ollamas_names_and_what_isnt_a_gguf_there(home: Path, file: Path, tmp_path: Path) -> None:
    models = tmp_path / "ollama"
    os.environ["OLLAMA_MODELS"] = str(models)
    try:
        in_ollama(models, "registry.ollama.ai/me/model/v1", file)
        in_ollama(models, "hf.co/owner/repo/Q4_K_M", write_gguf(tmp_path / "b.gguf", seed=1))
        in_ollama(models, f"{OLLAMA}/lora/latest", write_gguf(tmp_path / "c.gguf", seed=2), others={"adapter": b"x"})
        pieces = models / "manifests" / OLLAMA / "pieces" / "latest"
        pieces.parent.mkdir(parents=True)
        tensor = '{"mediaType": "application/vnd.ollama.image.tensor; name=x", "digest": "sha256:%s"}' % ("1" * 64)
        pieces.write_text(f'{{"layers": [{tensor}]}}')
        (pieces.parent / ".DS_Store").write_bytes(b"x")
        found = names()
    finally:
        del os.environ["OLLAMA_MODELS"]
    assert set(found) == {"me/model:v1", "hf.co/owner/repo:Q4_K_M", "lora:latest"}
    assert "adapter" in found["lora:latest"].problem


def test_a_link_to_nowhere_says_so(home: Path, file: Path) -> None:
    link = in_hugging_face(home / ".cache" / "huggingface" / "hub", "o/n", "a" * 40, "f.gguf", file)
    link.resolve().unlink()
    assert "isn't there" in names()["o/n/f"].problem


def test_folders_that_may_not_be_read_are_named(home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is the system call's, made up."""
    write_gguf(own_folder() / "good.gguf")
    private = own_folder() / "private"
    private.mkdir()
    real = os.scandir

    def scandir(path: str | Path = ".") -> object:
        if Path(path) == private:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(discover.os, "scandir", scandir)
    assert set(names()) == {"good"}
    assert problems() == [f"cannot read {private}: Permission denied"]


def test_names_are_taken_where_they_can_mean_one_model_only(home: Path, file: Path, tmp_path: Path) -> None:
    a = write_gguf(own_folder() / "pub" / "a" / "tiny-Q4_K_M.gguf", seed=1)
    b = write_gguf(own_folder() / "pub" / "b" / "tiny-Q4_K_M.gguf", seed=2)
    c = write_gguf(own_folder() / "pub" / "b" / "tiny-Q8_0.gguf", seed=3)
    write_gguf(own_folder() / "pub" / "b" / "mmproj.gguf", seed=4, general__type="mmproj")
    o = in_ollama(home / ".ollama" / "models", f"{OLLAMA}/llama/1b", file)
    assert resolve("pub/a/tiny-Q4_K_M") == resolve("PUB/A/tiny-q4_k_m.gguf") == resolve("a/tiny-Q4_K_M") == a
    assert resolve("tiny-Q8_0") == c
    assert resolve("pub/a") == a  # all there is of it
    assert resolve("llama") == resolve("llama:1b") == o
    with pytest.raises(ModelFileError, match=r"one of 2 models: pub/a/tiny-Q4_K_M .*pub/b/tiny-Q4_K_M ") as caught:
        resolve("tiny-Q4_K_M")
    assert str(b) in str(caught.value)
    with pytest.raises(ModelFileError, match="may be one of 2 models: pub/b/tiny-Q4_K_M"):
        resolve("pub/b")  # without the part that sees
    latest = in_ollama(home / ".ollama" / "models", f"{OLLAMA}/llama/latest", write_gguf(tmp_path / "l.gguf", seed=5))
    assert resolve("llama") == latest
    with pytest.raises(ModelFileError, match=r"no such file or model: tiny; .*edgellm models"):
        resolve("tiny")


def test_a_file_and_a_card_come_before_what_was_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(own_folder() / "here.gguf")
    write_gguf(own_folder() / "smollm2-135m-instruct.gguf")
    monkeypatch.chdir(tmp_path)
    local = write_gguf(tmp_path / "here.gguf", seed=9)
    assert resolve("here.gguf").samefile(local)
    assert resolve("here") == own_folder() / "here.gguf"
    assert resolve("smollm2-135m-instruct") == resolve(None)


def test_stores_know_whether_they_are_there(home: Path) -> None:
    assert [store.exists for store in find_stores() if store.folder.is_relative_to(home)] == [False] * 5
    own_folder().mkdir(parents=True)
    assert Store("edgellm", own_folder()).exists

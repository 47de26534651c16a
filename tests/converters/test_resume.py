"""`--resume` after a kill: what was finished isn't computed again, and the file is the one of a quiet run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from converters import convert
from tests.converters.command import refused, run
from tests.converters.test_interrupted import convert_until


@pytest.fixture(scope="module")
def quiet(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("quiet") / "out.gguf"
    assert len(convert(tiny_llama, out, quant="Q8_0").types) > 0
    return out.read_bytes()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are computed from here on."""
    import sys

    module, names = sys.modules["converters.original"], []
    original = module.produce

    def counted(*arguments):  # type: ignore[no-untyped-def]
        for tensor, pieces in original(*arguments):
            names.append(tensor.name)
            yield tensor, pieces

    monkeypatch.setattr(module, "produce", counted)
    return names


def resume(source: Path, out: Path, **options: object) -> tuple[str, ...]:
    return convert(source, out, quant="Q8_0", force=True, resume=True, **options).run_notes  # type: ignore[arg-type]


OTHER_MOMENTS = [
    ("tensor 1", 1), ("tensor 15", 15), ("before finish", None), ("before verify", None), ("before commit", None)
]  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "n_kept"),
    [
        ("tensor 0", 0),
        ("tensor 7", 7),
        ("after finish", None),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in OTHER_MOMENTS),
    ],
)
def test_killed_then_resumed(
    tiny_llama: Path, quiet: bytes, computed: list[str], moment: str, n_kept: int | None, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    assert convert_until(tiny_llama, out, moment).returncode == -signal.SIGKILL
    n_tensors = len(json_plan(tiny_llama))
    notes = resume(tiny_llama, out)
    kept = n_tensors if n_kept is None else n_kept
    assert computed == json_plan(tiny_llama)[kept:]
    assert any(f"resumed: {kept} of {n_tensors} tensors" in note for note in notes) == (kept > 0)
    assert out.read_bytes() == quiet
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def json_plan(source: Path) -> list[str]:
    """Names of the tensors in file order, as --dry-run prints them."""
    planned = run("convert", source, "-q", "Q8_0", "--dry-run", "--json")
    return [tensor["name"] for tensor in json.loads(planned.stdout)["tensors"]]


def test_killed_within_a_tensor_and_again(tiny_llama: Path, quiet: bytes, computed: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert convert_until(tiny_llama, out, "within a tensor").returncode == -signal.SIGKILL
    first = journaled(out)
    assert first
    assert convert_until(tiny_llama, out, "tensor 3").returncode == -signal.SIGKILL  # the 3rd of what is left
    assert len(journaled(out)) == len(first) + 3
    resume(tiny_llama, out)
    assert computed == json_plan(tiny_llama)[len(first) + 3 :]
    assert out.read_bytes() == quiet


def journaled(out: Path) -> list[str]:
    lines = out.with_name("out.gguf.partial.journal").read_text().splitlines()
    return [json.loads(line)["tensor"] for line in lines[1:]]


@pytest.fixture
def stopped(tiny_llama: Path, tmp_path: Path) -> Path:
    """An output whose conversion was killed after 12 tensors, with a source of its own."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    out = tmp_path / "out.gguf"
    assert convert_until(source, out, "tensor 12").returncode == -signal.SIGKILL
    assert len(journaled(out)) == 12
    return out


def test_bytes_that_changed_since_are_written_again(
    stopped: Path, quiet: bytes, computed: list[str], tmp_path: Path
) -> None:
    """As after a power cut: the journal is on disk, some pages of the data aren't."""
    partial = stopped.with_name("out.gguf.partial")
    data = bytearray(partial.read_bytes())
    data[-5000:-4000] = bytes(1000)
    partial.write_bytes(data)
    notes = resume(tmp_path / "source", stopped)
    assert "12 of" not in " ".join(notes)
    assert 0 < len(computed) < len(json_plan(tmp_path / "source"))
    assert_same_tensors(stopped, quiet)


def assert_same_tensors(out: Path, quiet: bytes) -> None:
    """Equal but for general.name, which is the source folder's."""
    assert out.read_bytes()[-100_000:] == quiet[-100_000:]


@pytest.mark.parametrize("damage", ["journal cut", "journal gone", "journal nonsense", "partial gone", "partial cut"])
def test_damaged_leftovers(stopped: Path, quiet: bytes, damage: str, tmp_path: Path) -> None:
    partial = stopped.with_name("out.gguf.partial")
    journal = stopped.with_name("out.gguf.partial.journal")
    file = journal if damage.startswith("journal") else partial
    if damage.endswith("gone"):
        file.unlink()
    else:
        file.write_bytes(b'[1]\n"\xff{' if damage.endswith("nonsense") else file.read_bytes()[:-700])
    resume(tmp_path / "source", stopped)
    assert_same_tensors(stopped, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "source"]


@pytest.mark.parametrize("change", ["weights", "config", "recipe"])
def test_another_job_starts_anew(stopped: Path, computed: list[str], change: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if change == "weights":
        weights = source / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2:] = b"\0\0"
        weights.write_bytes(data)
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    quant = "Q5_0" if change == "recipe" else "Q8_0"
    notes = convert(source, stopped, quant=quant, resume=True).run_notes
    assert "nothing to resume: converted from the start" in notes
    assert len(computed) == len(json_plan(source))
    convert(source, tmp_path / "again.gguf", quant=quant)
    assert stopped.read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_without_resume_it_starts_anew(stopped: Path, computed: list[str], tmp_path: Path) -> None:
    assert not any("resume" in note for note in convert(tmp_path / "source", stopped, quant="Q8_0").run_notes)
    assert len(computed) == len(json_plan(tmp_path / "source"))


def test_ctrl_c_keeps_what_is_finished(tiny_llama: Path, quiet: bytes, computed: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert convert_until(tiny_llama, out, "tensor 9", "SIGINT").returncode == -signal.SIGINT
    assert len(journaled(out)) == 9
    result = run("convert", tiny_llama, "-o", out, "-q", "Q8_0", "--resume", "--receipt", "fast")
    assert "resumed: 9 of" in result.stdout
    assert out.read_bytes() == quiet


def test_a_checkpoint_found_bad_leaves_nothing(stopped: Path, tmp_path: Path) -> None:
    """Going on would only find it bad again."""
    weights = tmp_path / "source" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # NaN, in F32 and in BF16
    weights.write_bytes(data)
    result = run("convert", tmp_path / "source", "-o", stopped, "-q", "Q8_0", "--resume")
    refused(result, 3, "not finite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

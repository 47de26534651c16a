"""Budgets end to end on tiny random models: what was asked for is what the written file has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converters.budget.choose as choosing
import converters.budget.look as look
import converters.budget.meet as meeting
from converters import convert
from converters.budget.choose import Budget, budget_of
from converters.budget.meet import budget_folder, held_out
from converters.compensation import work_folder
from converters.quantize.types import tensor_bytes
from edgellm.cli.main import run_command
from edgellm.errors import BudgetError, OutputError
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters import reference, tiny
from tests.converters.command import refused, run
from tests.converters.test_compensation import TEXT
from tests.oracles.families import make_reference
from tests.oracles.family_cases import CASES

# untied with rows that 256 divides; tied with none; experts; blocks that differ
MODELS = ("untied", "tied", "qwen2moe-1", "gemma3-1")
LARGER = MODELS[2:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, text.txt and other.txt, and a cache that the tests of this file share."""
    folder = tmp_path_factory.mktemp("budget")
    tiny.make_model(folder / "untied", vocab_size=1000)
    tiny.make_model(folder / "tied", vocab_size=1000, intermediate_size=192, tie_word_embeddings=True)
    for case in CASES:
        if case.name in MODELS:
            make_reference(case, folder / case.name)
    rng = np.random.default_rng(0)
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text("".join(TEXT.format(n) for n in rng.integers(0, 10**6, 64)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))


@pytest.fixture
def budgeted(root: Path, tmp_path: Path) -> Callable[..., Any]:
    """convert(model's name, **options) → receipt."""

    def made(name: str, out: str = "out.gguf", **options: Any) -> Any:
        source = tmp_path / name if name.endswith(".gguf") else root / name
        return convert(source, tmp_path / out, **{"calibrate": root / "text.txt", "effort": 1} | options)

    return made


def smallest(budgeted: Callable[..., Any], name: str, **options: Any) -> int:
    """Bytes of the smallest file, as the error for an impossible budget has it."""
    with pytest.raises(BudgetError, match="smallest file of this model has") as error:
        budgeted(name, max_size=1000, **options)
    found = re.search(r"has ([\d,]+) bytes", str(error.value))
    assert found
    return int(found[1].replace(",", ""))


def kld(root: Path, name: str, tmp_path: Path, out: str = "out.gguf") -> float:
    """On the held-out part of the text, from an F16 file that another conversion made."""
    f16 = root / f"{name}-f16.gguf"
    if not f16.exists():
        convert(root / name, f16, quant="F16")
    _, tuning = held_out(read_samples(root / "text.txt", f16, n_ctx=512))
    return float(evaluate(tmp_path / out, tuning, reference=f16).as_dict()["kld"]["mean"])


def types_of(path: Path) -> dict[str, str]:
    return {name: info.type_name for name, info in read_header(path).tensors.items()}


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] if m in LARGER else []) for m in MODELS])
def test_size(name: str, budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    least = smallest(budgeted, name)
    klds = []
    for room in (least, least + least // 8, least + least // 2):
        receipt = budgeted(name, max_size=room, force=True)
        size = (tmp_path / "out.gguf").stat().st_size
        assert 0.98 * room <= size <= room
        assert receipt.output_bytes == size == receipt.budget["n_bytes"]
        klds.append(kld(root, name, tmp_path))
        assert receipt.budget["measured"] == pytest.approx(klds[-1], rel=1e-3)
    assert klds[0] > klds[1] > klds[2]
    with pytest.raises(BudgetError, match=f"{least:,} bytes"):
        budgeted(name, max_size=least - 1, force=True)
    assert (tmp_path / "out.gguf").stat().st_size == size


@pytest.mark.parametrize("receipt", ["full", "off"])
def test_size_to_the_byte_whatever_the_receipt(receipt: str, budgeted: Callable[..., Any], tmp_path: Path) -> None:
    least = smallest(budgeted, "untied", receipt=receipt)
    made = budgeted("untied", max_size=least, receipt=receipt)
    assert (tmp_path / "out.gguf").stat().st_size == made.output_bytes == made.budget["n_bytes"] == least
    metadata = read_header(tmp_path / "out.gguf").metadata
    assert ("edgellm.receipt.json" in metadata) == (receipt == "full")


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("untied", 0.004),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [("tied", 0.002), ("qwen2moe-1", 0.002), ("gemma3-1", 0.03)]
        ),
    ],
)
def test_divergence(name: str, limit: float, budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    receipt = budgeted(name, max_kld=limit)
    found = kld(root, name, tmp_path)
    assert 0.2 * limit < found <= limit  # so small a model's types are far apart
    assert receipt.budget["measured"] == pytest.approx(found, rel=1e-3)
    if name == "untied":
        looser = budgeted(name, "looser.gguf", max_kld=4 * limit)
        assert looser.output_bytes < receipt.output_bytes


def test_speed(budgeted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of this machine: a byte takes a nanosecond, and a token a millisecond besides."""

    def decode_seconds(tensors: Any, **_: Any) -> float:
        return sum(tensor_bytes(shape, type_name) for type_name, shape in tensors.values()) * 1e-9

    def seconds_of_file(path: Path, **_: Any) -> float:
        infos = read_header(path).tensors.values()
        return 1e-3 + sum(info.n_bytes for info in infos if info.name != "token_embd.weight") * 1e-9

    class Slow:
        overhead, n_expert_used = 1e-3, 1

        @classmethod
        def of(cls, path: Path, **_: Any) -> Slow:
            return cls()

    monkeypatch.setattr(look, "decode_seconds", decode_seconds)
    monkeypatch.setattr(look, "SpeedModel", Slow)
    monkeypatch.setattr(meeting, "decode_seconds_per_token", seconds_of_file)
    least = budgeted("untied", "least.gguf", max_size=smallest(budgeted, "untied"))
    products = least.output_bytes * 0.6 * 1e-9
    wanted = 1 / (1e-3 + 1.3 * products)
    receipt = budgeted("untied", min_speed=wanted)
    assert receipt.budget["speed"] >= wanted
    assert receipt.budget["speed"] < 1.05 * wanted
    with pytest.raises(BudgetError, match=r"the fastest file reaches [0-9.]+ tokens per second"):
        budgeted("untied", min_speed=1001.0, force=True)
    with pytest.raises(BudgetError, match="the nearest is a KL divergence of about"):
        budgeted("untied", min_speed=wanted, max_kld=1e-3, force=True)


def test_pins(budgeted: Callable[..., Any], tmp_path: Path) -> None:
    pins = [
        ("attn_v", "F16"),
        (r"blk\.0\.ffn_up", "F32"),
        ("ffn_down", "Q6_K"),
        ("attn_q", "Q4_K"),  # whose blocks don't fit rows of 128: llama.cpp's next type
        ("attn_q", "Q8_0"),  # the first decides
    ]
    least = smallest(budgeted, "untied", types=pins)
    for room in (least, least + 20_000):
        receipt = budgeted("untied", max_size=room, types=pins, force=True)
        assert 0.97 * room <= receipt.output_bytes <= room
        assert receipt.output_bytes == receipt.budget["n_bytes"]
        found = types_of(tmp_path / "out.gguf")
        for i in range(2):
            assert found[f"blk.{i}.attn_v.weight"] == "F16"
            assert found[f"blk.{i}.ffn_down.weight"] == "Q6_K"
            assert found[f"blk.{i}.attn_q.weight"] == "Q5_0"
        assert found["blk.0.ffn_up.weight"] == "F32" != found["blk.1.ffn_up.weight"]
    everything = budgeted("untied", max_kld=0.1, types=[(".", "Q5_0")], force=True)
    assert everything.types.keys() == {"Q5_0", "F32"}


@pytest.mark.slow
def test_the_same_again_from_the_cache(
    budgeted: Callable[..., Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[str] = []
    original = look._find_out

    def counted(*arguments: Any) -> Any:
        calls.append("measured")
        return original(*arguments)

    monkeypatch.setattr(look, "_find_out", counted)
    first = budgeted("tied", "first.gguf", max_kld=0.005)
    again = budgeted("tied", "again.gguf", max_kld=0.005)
    other_budget = budgeted("tied", "size.gguf", max_size=first.output_bytes)
    assert calls == ["measured"]
    assert other_budget.output_bytes <= first.output_bytes
    assert reference.tensors(tmp_path / "first.gguf") == reference.tensors(tmp_path / "again.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert first.budget == again.budget
    budgeted("tied", "other.gguf", max_kld=0.005, calibrate=root / "other.txt")
    assert calls == ["measured"] * 2
    for cached in (tmp_path / "cache").rglob("*.budget-*.json"):
        cached.write_text("{}")  # damaged
    budgeted("tied", "third.gguf", max_kld=0.005)
    assert calls == ["measured"] * 3
    assert (tmp_path / "third.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()


@pytest.mark.slow
def test_an_attempt_that_kept_the_limit_is_taken(
    budgeted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first one that is too good, and later ones that aren't good enough: the first it is, with its own bytes."""
    limit = 0.005
    plain = budgeted("untied", "plain.gguf", max_size=420_000)
    choices = []
    original, choose = meeting._try, meeting.choose

    def tried(*arguments: Any) -> Any:
        trial = original(*arguments)
        choices.append(trial.choice)
        klds = [limit / 2, limit * 2, limit * 2, limit / 2]
        return replace(trial, kld=klds[len(choices) - 1])

    wanted = iter([420_000, 400_000, 410_000])
    monkeypatch.setattr(meeting, "_try", tried)
    monkeypatch.setattr(meeting, "choose", lambda prospect, *_: choose(prospect, Budget(max_size=next(wanted))))
    receipt = budgeted("untied", max_kld=limit)
    assert len(choices) == 4
    assert choices[3] == choices[0] != choices[1]
    assert receipt.budget["measured"] == limit / 2
    assert receipt.budget["attempts"] == 3
    assert receipt.output_bytes == plain.output_bytes
    assert reference.tensors(tmp_path / "out.gguf") == reference.tensors(tmp_path / "plain.gguf")


def test_ctrl_c_and_errors_leave_nothing(budgeted: Callable[..., Any], tmp_path: Path) -> None:
    seen: set[str] = set()

    def stop_at(step: str) -> Callable[[str, int, int], None]:
        def stop(what: str, done: int, total: int) -> None:
            seen.add(what)
            if what == step:
                raise KeyboardInterrupt

        return stop

    (tmp_path / "cache").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for step in ("measuring what matters", "compensating", "blk.1.attn_q.weight"):
            with pytest.raises(KeyboardInterrupt):
                budgeted("untied", max_size=420_000, on_progress=stop_at(step))
            assert step in seen
            assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(BudgetError, match=r"about 0\.00[0-9]+ at [0-9,]+ bytes"):
        budgeted("untied", max_kld=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    for folder in (budget_folder(tmp_path / "out.gguf"), work_folder(tmp_path / "out.gguf")):
        folder.mkdir()  # of a conversion that was killed
        (folder / "left").write_text("")
    budgeted("untied", max_size=420_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.gguf"]


def test_an_existing_output_needs_force(budgeted: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        budgeted("untied", max_size=420_000)
    with pytest.raises(BudgetError):
        budgeted("untied", max_size=1000, force=True)
    assert (tmp_path / "out.gguf").read_text() == "precious"
    budgeted("untied", max_size=420_000, force=True)
    assert read_header(tmp_path / "out.gguf").tensors


@pytest.mark.slow
def test_a_gguf_is_a_source_too(budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    convert(root / "untied", tmp_path / "source.gguf", quant="F32")
    least = smallest(budgeted, "source.gguf")
    receipt = budgeted("source.gguf", max_size=int(1.2 * least))
    assert 1.17 * least <= (tmp_path / "out.gguf").stat().st_size == receipt.output_bytes <= 1.2 * least


def test_without_compensation(budgeted: Callable[..., Any]) -> None:
    klds = {}
    for compensate in (True, False):
        receipt = budgeted("untied", f"{compensate}.gguf", max_size=420_000, compensate=compensate)
        assert ("compensated" in receipt.calibration) == compensate
        assert receipt.output_bytes <= 420_000
        klds[compensate] = receipt.budget["measured"]
    assert klds[True] < 0.8 * klds[False]


@pytest.mark.slow
def test_weights_beyond_f16(budgeted: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(root / "tied", root / "huge", dirs_exist_ok=True)
    file = root / "huge" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][5, 7] = 1e5
    save_file(weights, file, {"format": "pt"})
    receipt = budgeted("huge", max_size=2_000_000)  # room for F16 everywhere
    assert receipt.output_bytes <= 2_000_000
    types = types_of(tmp_path / "out.gguf")
    assert types["blk.0.ffn_up.weight"] != "F16" == types["blk.1.ffn_up.weight"]


def test_auto_and_the_receipt(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "auto.gguf"
    arguments = ["convert", str(root / "untied"), "-o", str(out), "-q", "auto", "--receipt", "fast", "--effort", "1"]
    assert run_command([*arguments, "--calibrate", str(root / "text.txt"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    budget = printed["budget"]
    assert "a KL divergence of at most 0.02" in budget["asked"]
    assert budget["measured"] <= 0.02
    assert len(budget["candidates"]) > 5
    sizes = [point["n_bytes"] for point in budget["candidates"]]
    klds = [point["kld"] for point in budget["candidates"]]
    assert sizes == sorted(sizes)
    assert klds == sorted(klds, reverse=True)
    kept = json.loads(read_header(out).metadata["edgellm.receipt.json"])["budget"]
    assert kept == {key: value for key, value in budget.items() if key not in ("candidates", "speed")}
    assert run_command(["inspect", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"met with {out.stat().st_size:,} bytes and a KL divergence of {budget['measured']:.4f}" in shown
    assert budget["reasons"]
    assert all(" ".join(reason.split()) in shown for reason in budget["reasons"])


def test_auto_takes_at_most_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "total_memory", lambda: 1_000_000)
    assert budget_of("auto", None, None, None) == Budget(500_000, 0.02, is_soft=True)
    assert budget_of("AUTO", 400_000, 0.1, 5.0) == Budget(400_000, 0.1, 5.0)
    assert budget_of("auto", 600_000, None, None).max_size == 500_000
    assert not budget_of("Q4_0", None, None, None)
    assert budget_of(None, 7, None, None).words() == "at most 7 bytes"


def test_out_of_reach_on_the_command_line(root: Path, tmp_path: Path) -> None:
    text = ["--calibrate", root / "text.txt", "--effort", "1"]
    ended = run("convert", root / "untied", "-o", tmp_path / "out.gguf", "--max-size", "100kB", *text)
    refused(ended, 4, "at most 100,000 bytes is out of reach", "smallest file of this model has 3")
    assert list(tmp_path.iterdir()) == []


NONSENSE = [
    (["--max-size", "12XB"], "12XB"),
    (["--max-size", "-3MB"], "-3MB"),
    (["--max-size", ""], "size"),
    (["--max-size", "0"], "max_size is 0"),
    (["--max-size", "0.1B"], "max_size is 0"),
    *[(["--max-kld", value], "max_kld") for value in ("-1", "0", "nan", "inf")],
    *[(["--min-speed", value], "min_speed") for value in ("-1", "0", "nan", "inf")],
    (["--max-kld", "much"], "much"),
    (["--max-size", "85MB", "--quant", "Q4_0"], "a budget chooses the types itself"),
    (["--max-kld", "0.1", "--quant", "Q4_K_M"], "a budget chooses the types itself"),
    (["--max-size", "85MB", "--dry-run"], "--dry-run shows recipes"),
    (["--min-speed", "3", "--dry-run"], "--dry-run shows recipes"),
    (["--quant", "auto", "--dry-run"], "--dry-run shows recipes"),
    (["--max-size", "85MB", "--type", "attn=Q99"], "Q99"),
    (["--max-size", "85MB", "--type", "(=Q8_0"], "no regular expression"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), NONSENSE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_usage_errors(
    arguments: list[str], said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    given = ["convert", str(root / "untied"), "-o", str(out), "--calibrate", str(root / "text.txt"), *arguments]
    assert run_command(given) == 2
    ended = capsys.readouterr()
    assert said in " ".join(ended.err.split())
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []

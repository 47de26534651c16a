"""`tune` on the real model: everything is measured, the limits hold, and what was stored before is safe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.config import LoadParams, physical_cpu_count
from edgellm.engine import tuned
from edgellm.engine.tuned import Attention, Tuning
from edgellm.measure import choice, tune
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.stretch import stretch
from edgellm.native.undisturbed import interleaved

EDGELLM = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurements, of shorter texts."""
    monkeypatch.setattr(choice, "DEPTHS", (0, 32, 64))
    monkeypatch.setattr(tune, "_MIDDLE", 32)
    monkeypatch.setattr(tune, "_READ_LONG", 128)
    monkeypatch.setattr(tune, "_BATCHES", (64, 128))
    monkeypatch.setattr(tune, "_STAGE_S", 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
def test_everything_is_measured_where_there_is_time(model_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    found = tune.tune(model_path, seconds=200, on_progress=lambda label, done: seen.append((label, done)))
    assert found.measured["dropped"] == []
    assert set(found.attention) == set(choice.KINDS)
    assert found.attention[-1] == Attention("q8_0", True)
    assert 1 <= found.n_threads <= physical_cpu_count()
    assert found.n_batch in (64, 128, 512)
    assert list(found.verify_cost) == list(tune.VERIFIED)
    costs = list(found.verify_cost.values())
    assert costs == sorted(costs)
    assert costs[0] == 1
    assert found.measured["gain"]["depth"] == 64
    assert found.measured["gain"]["ratio"] >= 1
    assert found.measured["gain"].get("tuned", 1) >= found.measured["gain"].get("default", 1)
    deepest = [one["decode"][64] for one in found.measured["attention"] if 64 in one["decode"]]
    assert len(deepest) == choice.N_FINALISTS
    assert all(0 < speed < 1e5 for speed in deepest)
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    tuned.save(model_path, found)
    try:
        assert tuned.tuning_for(model_path) is not None
        with edgellm.load(model_path, LoadParams(n_ctx=128)) as model:
            assert model.settings["kv_type"] == found.attention[0].kv_type
            assert model.settings["flash_attn"] == found.attention[0].flash_attn
    finally:
        tuned.forget(model_path)


def test_without_time_the_defaults_stay_and_what_is_missing_is_named(model_path: Path) -> None:
    found = tune.tune(model_path, seconds=0)
    assert (found.n_batch, found.load_mode, found.attention, found.verify_cost) == (512, "repack", (), {})
    assert found.n_threads == physical_cpu_count()
    assert "kinds of KV cache and flash attention" in found.measured["dropped"]
    assert "the cost of checking guesses" in found.measured["dropped"]
    assert tuned.settle(LoadParams(), found).kv_type is None


def test_comparing_takes_turns_and_ends() -> None:
    order: list[str] = []
    times = {"fast": iter([5.0, *[1.0] * 99]), "slow": iter([2.0] * 100)}

    def measure(name: str) -> float:
        order.append(name)
        return next(times[name])

    found = interleaved({name: lambda name=name: measure(name) for name in times}, patience=60, enough=4)  # type: ignore[misc]
    assert found == pytest.approx({"fast": 1.0, "slow": 2.0})
    assert order[:4] == ["fast", "slow", "slow", "fast"]
    assert order.count("fast") == order.count("slow") <= 3 * 4
    assert interleaved({"once": lambda: 1.0}, patience=0) == {"once": 1.0}


@pytest.mark.parametrize("flash_attn", [True, False])  # values are stored by rows, or by columns
def test_a_short_context_repeated_is_as_good_as_a_long_one(model_path: Path, flash_attn: bool) -> None:
    native = NativeModel(model_path)
    with closing(native), closing(Context(native, LoadParams(n_ctx=512, flash_attn=flash_attn))) as context:
        context.decode(list(range(100, 140)))
        assert stretch(context, 90)
        assert context.tokens == [*range(100, 140), *range(100, 140), *range(100, 110)]
        assert context._memory_range() == (0, 89)
        context.step(7)
        first = context.logits([1, 2, 3])
        assert (first == context.logits([1, 2, 3])).all()
        context.reuse_prefix(())
        assert not stretch(context, 90)  # there is nothing to repeat
        context.decode([1, 2, 3])
        assert not stretch(context, 5000)  # it doesn't fit, and nothing has changed
        assert context.tokens == [1, 2, 3]
        assert context._memory_range() == (0, 2)


def test_a_depth_that_is_given_up_leaves_what_was_there_to_be_measured_again(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(NativeModel(path=model_path)) as model, closing(Context(model, LoadParams(n_ctx=1024))) as context:
        contestant = tune._Contestant(context, model.vocab.tokenize("One two three. " * 400, special=False), 2)
        assert contestant.fill(64, time.perf_counter() + 60)
        calls: list[int] = []

        def late(context: Context, n_tokens: int) -> bool:
            calls.append(n_tokens)
            return stretch(context, n_tokens)

        monkeypatch.setattr(tune, "stretch", late)
        # in time for the short text that is repeated, too late for the rest
        monkeypatch.setattr(contestant, "_read_on", lambda depth, _: depth == tune.N_READ)
        assert not contestant.fill(900, 0.0)
        assert calls == [900 - tune.N_READ]
        assert len(context.tokens) == 64
        assert contestant.step() > 0


def test_a_slow_minute_of_the_machine_hits_all_alike() -> None:
    factor = iter([factor for factor in [1, 7, 1, 3, 3, 1, 9, 1] * 9 for _ in range(2)])  # of a round
    found = interleaved({"a": lambda: 1.00 * next(factor), "b": lambda: 1.05 * next(factor)}, patience=60, enough=8)
    assert found["b"] / found["a"] == pytest.approx(1.05)
    assert 0.99 < found["a"] < 1.01


def command(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EDGELLM, *map(str, arguments)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_command_stores_shows_and_forgets(model_path: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "tune", model_path, "--seconds", "5")
    assert done.returncode == 0, done.stderr
    assert "chosen: " in done.stdout
    assert "not measured, for want of time" in done.stdout
    assert "stored in " in done.stderr
    ran = command(tmp_path, "run", model_path, "Hi", "-n", "2", "--json")
    settings = json.loads(ran.stdout)["settings"]
    assert settings["tuned"] is True
    ran = command(
        tmp_path, "run", model_path, "Hi", "-n", "2", "--json", "--kv", "q8_0", "--flash-attn", "--threads", "1"
    )
    settings = json.loads(ran.stdout)["settings"]
    assert (settings["kv_type"], settings["flash_attn"], settings["n_threads"]) == ("q8_0", True, 1)
    assert "forgotten" in command(tmp_path, "tune", model_path, "--forget").stdout
    assert json.loads(command(tmp_path, "tune", model_path, "--forget", "--json").stdout)["forgotten"] is False


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_what_was_stored(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = Tuning(1, 64, "mmap", (), {}, {"seconds": 0.0})
    file = tuned.save(model_path, before)
    process = subprocess.Popen([*EDGELLM, "tune", str(model_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert tuned.tuning_for(model_path) == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tune", "none.gguf"], 3, "no such file or model: none.gguf"),
        (["tune", "x", "--seconds", "1"], 2, "--seconds"),
        (["bench", "none.gguf"], 3, "no such file or model: none.gguf"),
        (["bench", "x", "--rounds", "0"], 2, "--rounds"),
        (["bench", "x", "--kv", "q2"], 2, "f16, bf16, f32 or q8_0"),
        (["run", "x", "hi", "--kv", "q8_0", "--no-flash-attn"], 2, "when flash_attn is off"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[Any], code: int, message: str) -> None:
    done = command(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr

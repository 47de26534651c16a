"""What a budget is chosen by: expected errors against real ones, and the bench on which groups are measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.budget.errors import expected_errors, plain_error
from converters.budget.sensitivity import Bench, Damage, Round, groups_of, measured, power_between
from converters.quantize.compensate import compensated, error_of, fit, unpacked
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.scoring import Sample
from edgellm.measure.texts import read_samples
from tests.converters import reference
from tests.converters.test_compensate import correlated, gram_of, weights_of
from tests.converters.test_compensation import TEXT

TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q4_0", "IQ4_NL", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")


def real_error(weights: np.ndarray, type_name: str, gram: np.ndarray) -> float:
    return error_of(weights, unpacked(type_name, compensated(weights, type_name, fit(gram)), weights.shape[1]), gram)


def test_expected_errors_are_those_of_compensated_weights() -> None:
    weights, gram = weights_of(64, 512), gram_of(correlated(3000, 512))
    expected = expected_errors(weights[None], [gram[None]], TYPES)
    real = {name: real_error(weights, name, gram) for name in TYPES}
    assert list(expected) == list(TYPES)
    # inputs as correlated as these leave room for what refitted scales and codes win; a factor of all is no harm
    ratios = np.array([expected[name] / real[name] for name in TYPES])
    assert ratios.min() > 1.5
    assert ratios.max() < 4.5
    assert ratios.max() < 2.3 * ratios.min()
    for a in TYPES:  # where the real ones differ clearly the expected ones are in the same order
        for b in TYPES:
            assert real[a] > 0.8 * real[b] or expected[a] < expected[b], (a, b)


def test_expected_errors_of_a_sample_of_rows_stand_for_all() -> None:
    weights, gram = weights_of(1000, 256), gram_of(correlated(1500, 256))
    whole = expected_errors(weights[None], [gram[None]], ["Q4_0"])["Q4_0"]
    parts = [expected_errors(weights[None, i : i + 100], [gram[None]], ["Q4_0"])["Q4_0"] for i in range(0, 1000, 100)]
    assert whole == pytest.approx(sum(parts), rel=0.05)


def test_expected_errors_of_experts_and_of_blocks_of_columns() -> None:
    weights = weights_of(6 * 32, 256).reshape(6, 32, 256)
    grams = np.stack([gram_of(correlated(1000, 256, seed=e)) for e in range(6)])
    alone = [expected_errors(weights[e : e + 1], [grams[e : e + 1]], ["Q5_0"])["Q5_0"] for e in range(6)]
    together = expected_errors(weights, [grams], ["Q5_0"])["Q5_0"]
    assert together == pytest.approx(sum(alone), rel=0.4)  # four of the six stand for all
    halves = [np.ascontiguousarray(grams[:1, at : at + 128, at : at + 128]) for at in (0, 128)]
    split = expected_errors(weights[:1], halves, ["Q5_0"])["Q5_0"]
    each = [
        expected_errors(np.ascontiguousarray(weights[:1, :, at : at + 128]), [half], ["Q5_0"])["Q5_0"]
        for at, half in zip((0, 128), halves, strict=True)
    ]
    assert split == pytest.approx(sum(each), rel=0.02)


def test_expected_errors_without_inputs() -> None:
    """A plain sum of squares without Gram matrices; finite for an expert that never saw a token."""
    weights = weights_of(32, 256)
    expected = expected_errors(weights[None], None, ["Q4_0", "Q8_0"])
    zero = expected_errors(weights[None], [np.zeros((1, 256, 256), np.float32)], ["Q4_0", "Q8_0"])
    assert zero == pytest.approx(expected)
    assert expected["Q8_0"] < 0.01 * expected["Q4_0"]


def test_plain_error_is_the_trace() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 16, 96)).astype(np.float32)
    rounded = weights + rng.standard_normal(weights.shape).astype(np.float32) * np.float32(0.1)
    grams = np.stack([gram_of(correlated(400, 96, seed=e)) for e in range(3)])
    delta = (weights - rounded).astype(np.float64)
    wanted = sum(np.trace(d @ h @ d.T) for d, h in zip(delta, grams, strict=True))
    assert plain_error(weights, rounded, [grams]) == pytest.approx(wanted, rel=1e-4)
    assert plain_error(weights, rounded, None) == pytest.approx(np.square(delta).sum(), rel=1e-5)
    blocks = [grams[:, :32, :32], grams[:, 32:, 32:]]
    wanted = sum(
        np.trace(d[:, part] @ h[part, part] @ d[:, part].T)
        for d, h in zip(delta, grams, strict=True)
        for part in (slice(0, 32), slice(32, 96))
    )
    assert plain_error(weights, rounded, blocks) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5, 30, 61])
def test_groups_cover_every_tensor_once(n_blocks: int) -> None:
    kinds = ("attn_v", "ffn_down", "ffn_gate_exps")
    names = [f"blk.{i}.{kind}.weight" for i in range(n_blocks) for kind in kinds]
    names += ["token_embd.weight", "output.weight"]
    groups = groups_of(names, n_blocks)
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    assert groups["token_embd"] == ["token_embd.weight"]
    assert groups["output"] == ["output.weight"]
    in_blocks = {group: members for group, members in groups.items() if group not in ("token_embd", "output")}
    assert 3 <= len(in_blocks) <= 3 * min(n_blocks, 5)
    assert n_blocks < 30 or len(in_blocks) == 3 * 5
    for group, members in in_blocks.items():
        numbers = [int(name.split(".")[1]) for name in members]
        assert len({name.split(".")[2] for name in members}) == 1
        assert numbers == list(range(numbers[0], numbers[-1] + 1))  # one stretch of depth
        said = f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]}–{numbers[-1]}"
        assert group == f"{members[0].split('.')[2]} of {said}"


@pytest.fixture
def bench_file(tiny_gguf: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bench.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    return path


@pytest.fixture(scope="module")
def samples(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Sample]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(TEXT.format(n) for n in range(100000, 100020)), encoding="utf-8")
    return read_samples(text, tiny_gguf, n_ctx=128, n_chunks=2)


def test_bench_measures_what_evaluate_does_and_restores_the_file(
    bench_file: Path, tiny_gguf: Path, samples: Sequence[Sample], tmp_path: Path
) -> None:
    before = bench_file.read_bytes()
    weights = values_of(tiny_gguf)
    bench = Bench(bench_file, samples)
    seen: list[bytes] = []

    def rounded(name: str) -> np.ndarray:
        seen.append(bench_file.read_bytes())
        return np.round(weights[name] * 16) / np.float32(16)

    names = ["blk.0.ffn_down.weight", "blk.1.attn_v.weight"]
    found = bench.divergence(names, rounded)
    assert bench_file.read_bytes() == before
    assert seen[0] == before != seen[1]
    changed = tmp_path / "changed.gguf"
    data = bytearray(before)
    for name in names:
        info = read_header(tiny_gguf).tensors[name]
        data[info.offset : info.offset + info.n_bytes] = rounded(name).astype(np.float32).tobytes()
    changed.write_bytes(data)
    wanted = evaluate(changed, samples, reference=tiny_gguf).as_dict()["kld"]["mean"]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1e-3
    steps: list[tuple[str, int, int]] = []
    rounds = [Round({"a": names[:1], "b": names[1:]}, rounded), Round({"none": []}, rounded)]
    both, none = measured(bench, rounds, lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == [0, 1, 2]
    assert none["none"] == pytest.approx(0.0, abs=1e-9)
    assert 0 < both["b"] < both["a"] < found


def test_damage_follows_what_was_seen_at_two_errors() -> None:
    seen = {"a": Damage(2.0, 0.5), "b": Damage(1.0, 1.0)}  # a nat each
    smaller = {"a": 0.125, "b": 0.25}  # a quarter of the error
    assert power_between(seen, ["a", "b"], smaller, 0.5) == pytest.approx(1.0)
    power = power_between(seen, ["a", "b"], smaller, 0.25)
    assert power == pytest.approx(1.5)
    curved = [Damage(d.rate, d.seen, power) for d in seen.values()]
    assert sum(d.of(e) for d, e in zip(curved, smaller.values(), strict=True)) == pytest.approx(0.25)
    assert sum(d.of(d.seen) for d in curved) == pytest.approx(2.0)
    assert power_between(seen, ["a"], {"a": 0.49}, 0.1) == 1.0  # too near to tell
    assert power_between(seen, ["a"], smaller, 0.0) == 1.0
    assert Damage(0.0, 0.0).of(1.0) == 0.0


def values_of(path: Path) -> dict[str, np.ndarray]:
    header, data = read_header(path), path.read_bytes()
    return {
        name: np.frombuffer(data, np.float32, int(np.prod(info.shape)), info.offset).reshape(info.shape)
        for name, info in header.tensors.items()
        if info.type_name == "F32"
    }


def test_bench_restores_the_file_also_when_the_rounding_fails(bench_file: Path, samples: Sequence[Sample]) -> None:
    before = bench_file.read_bytes()
    weights = values_of(bench_file)
    bench = Bench(bench_file, samples)

    def rounded(name: str) -> Any:
        if name == "blk.1.attn_v.weight":
            assert bench_file.read_bytes() != before  # the first has been replaced
            raise RuntimeError("no memory")
        return weights[name] * np.float32(0.5)

    with pytest.raises(RuntimeError, match="no memory"):
        bench.divergence(["blk.0.ffn_down.weight", "blk.1.attn_v.weight"], rounded)
    assert bench_file.read_bytes() == before
    assert reference.tensors(bench_file)

"""What is chosen from figures, and what is measured in how much time; all figures here are made up."""

from __future__ import annotations

import pytest

from edgellm.engine.tuned import Attention
from edgellm.measure.choice import (
    DEFAULT_ATTENTION,
    DEPTHS,
    KINDS,
    Timed,
    attention_seconds,
    best,
    choose_batch,
    choose_load_mode,
    finalists,
    plan_attention,
    rank_attention,
    thread_counts,
    verify_curve,
)

BF16, F16 = Attention("bf16", False), Attention("f16", False)
Q8 = Attention("q8_0", True)
SMALL = Timed(prompt=1 / 800, decode=1 / 200)


def test_decoding_decides_and_reading_breaks_ties() -> None:
    assert best({"a": Timed(1.0, 0.010), "b": Timed(9.0, 0.009)}) == "b"
    assert best({"a": Timed(1.0, 0.01005), "b": Timed(9.0, 0.01)}) == "a"  # as fast, within the measuring error


def test_nothing_chosen_is_slower_than_what_was_tried() -> None:
    timed = {
        DEFAULT_ATTENTION: (2000, Timed(1 / 810, 1 / 106)),
        F16: (2000, Timed(1 / 586, 1 / 96)),
        BF16: (2000, Timed(1 / 590, 1 / 119)),
        Attention("bf16", True): (700, Timed(1 / 700, 1 / 125)),
        Q8: (700, Timed(1 / 700, 1 / 200)),
    }
    ranked = rank_attention(timed)
    assert ranked[:3] == (BF16, DEFAULT_ATTENTION, F16)
    assert ranked[-1] == Q8  # however fast: it isn't the same model quite
    assert set(ranked) == set(timed)


def test_weights_stay_mapped_unless_copying_them_brings_something() -> None:
    assert choose_load_mode({"repack": Timed(1.0, 0.01), "mmap": Timed(1.02, 0.01)}) == "mmap"
    assert choose_load_mode({"repack": Timed(0.5, 0.01), "mmap": Timed(1.0, 0.01)}) == "repack"
    assert choose_load_mode({"repack": Timed(1.0, 0.009), "mmap": Timed(1.0, 0.01)}) == "repack"
    assert choose_load_mode({"repack": Timed(0.5, 0.011), "mmap": Timed(1.0, 0.01)}) == "mmap"
    assert choose_load_mode({"repack": Timed(1.0, 0.01)}) == "repack"


def test_another_batch_must_be_worth_it() -> None:
    assert choose_batch({128: 1.0, 512: 1.02, 1024: 1.1}) == 512
    assert choose_batch({128: 1.0, 512: 1.2, 1024: 1.1}) == 128
    assert choose_batch({128: 1.0, 256: 0.9}) == 256  # of a model with a short context


def test_the_curve_of_checks_begins_at_one_and_never_falls() -> None:
    assert verify_curve({1: 0.01, 4: 0.016, 2: 0.009, 3: 0.017}) == {1: 1.0, 2: 1.0, 3: 1.7, 4: 1.7}


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [2, 1]), (4, [4, 3, 2]), (16, [16, 12, 8])])
def test_numbers_of_threads_worth_trying(cores: int, counts: list[int]) -> None:
    assert thread_counts(cores) == counts


def test_a_small_model_is_measured_completely_and_a_large_one_as_far_as_time_allows() -> None:
    plan = plan_attention(SMALL, 50, 8192, 5)
    assert (plan.depths, plan.kinds, plan.dropped) == (DEPTHS, KINDS, ())
    larger = plan_attention(Timed(1 / 80, 1 / 20), 50, 8192, 5)
    assert 0 < len(larger.depths) < 3 or len(larger.kinds) < 5
    assert larger.kinds[0] == DEFAULT_ATTENTION
    assert attention_seconds(Timed(1 / 80, 1 / 20), larger.depths, len(larger.kinds)) <= 50
    assert larger.dropped
    nothing = plan_attention(Timed(1.0, 3.0), 50, 8192, 5)
    assert (nothing.depths, nothing.kinds) == ((), ())
    assert nothing.dropped == ("kinds of KV cache and flash attention",)


def test_depths_end_where_training_did_and_memory_bounds_the_kinds() -> None:
    assert plan_attention(SMALL, 1000, 1024, 5).depths == (0, 700)
    assert plan_attention(SMALL, 1000, 64, 5).depths == (0,)
    assert len(plan_attention(SMALL, 1000, 8192, 4).kinds) == 4
    assert plan_attention(SMALL, 1000, 8192, 1).kinds == ()


def test_those_that_grow_slowest_go_on_to_the_deepest_context() -> None:
    decode = {
        DEFAULT_ATTENTION: {0: 5.0, 700: 9.0},
        F16: {0: 5.5, 700: 6.0},
        BF16: {0: 5.6, 700: 6.1},
        Attention("bf16", True): {0: 5.0, 700: 5.9},  # 0.1 less, but growing fastest of the three
        Q8: {0: 1.0, 700: 1.1},
    }
    assert finalists(decode, 2000) == [DEFAULT_ATTENTION, F16, BF16]

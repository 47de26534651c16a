"""What `edgellm tune` decides, from figures alone: what there is time to measure, and which setting is best.

Decoding deep in a context decides. A setting whose decoding is slower than another's by more than the measuring error
is never chosen, whatever it reads at; among those as fast as the fastest, the one that reads prompts fastest is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgellm.config import DEFAULT_N_BATCH, LoadMode
from edgellm.engine.tuned import Attention

Key = TypeVar("Key")

DEPTHS = (0, 700, 2000)  # tokens of context at which decoding is timed
FULL_DEPTHS, N_FINALISTS = 2, 3  # beyond the first two depths, only so many kinds are measured
N_READ = 192  # tokens that are read, at least, to come to a depth
N_STEPS = 48  # decoded at each of them with each kind of attention
DEFAULT_ATTENTION = Attention("f16", True)  # what llama.cpp chooses itself, wherever it can
KINDS = (
    DEFAULT_ATTENTION,
    Attention("bf16", False),
    Attention("f16", False),
    Attention("bf16", True),
    Attention("q8_0", True),
)
# how many depths and kinds, the most telling first: what matters most is which kind is fastest deep in a context
_PREFERRED = ((3, 5), (3, 4), (3, 3), (3, 2), (2, 4), (2, 2), (1, 4), (1, 2))
_SLACK = 0.015  # of a time: differences that interleaved measuring can't tell from none
_WORTH = 0.03  # what a batch of another size, or copied weights, must bring
_DEEPER = 1.4  # deep in a context, or with a slower kind of attention, a token takes so many times as long


@dataclass(frozen=True)
class Timed:
    """Seconds for one token: of a prompt, and of decoding."""

    prompt: float
    decode: float


@dataclass(frozen=True)
class AttentionPlan:
    """What of depths × kinds there is time and memory for, and in words what was left out."""

    depths: tuple[int, ...]
    kinds: tuple[Attention, ...]
    dropped: tuple[str, ...]


def plan_attention(
    speed: Timed, seconds: float, n_ctx_max: int, n_kinds_in_memory: int, stretches: bool = True
) -> AttentionPlan:
    """The most that can be measured in `seconds` at this speed; nothing (no kinds) if there is no time for two.

    n_ctx_max: tokens the model was trained with. n_kinds_in_memory: contexts there is room for at a time. stretches:
    whether a short context can be repeated, instead of reading all of a long one.
    """
    depths = tuple(depth for depth in DEPTHS if depth == 0 or depth + 2 * N_STEPS <= n_ctx_max)
    for n_depths, n_kinds in _PREFERRED:
        few, kinds = depths[:n_depths], KINDS[:n_kinds]
        if n_kinds <= n_kinds_in_memory and attention_seconds(speed, few, n_kinds, stretches) <= seconds:
            return AttentionPlan(few, kinds, tuple(_words(few, depths, kinds)))
    return AttentionPlan((), (), ("kinds of KV cache and flash attention",))


def attention_seconds(speed: Timed, depths: Sequence[int], n_kinds: int, stretches: bool = True) -> float:
    """How long measuring so many kinds at these depths takes; only the finalists are taken to the third."""
    total, before = 0.0, 0
    for i, depth in enumerate(depths):
        n = n_kinds if i < FULL_DEPTHS else min(n_kinds, N_FINALISTS)
        n_read = depth - before if not stretches else min(depth - before, N_READ if before else 2 * N_READ)
        total += n * _DEEPER * (n_read * speed.prompt + N_STEPS * speed.decode)
        before = depth
    return total


def _words(depths: tuple[int, ...], all_depths: tuple[int, ...], kinds: tuple[Attention, ...]) -> list[str]:
    missing = [f"{depth} tokens" for depth in all_depths if depth not in depths]
    dropped = [f"a context of {' and '.join(missing)}"] if missing else []
    return dropped + [in_words(kind) for kind in KINDS if kind not in kinds]


def in_words(kind: Attention) -> str:
    return f"{kind.kv_type} with{'' if kind.flash_attn else 'out'} flash attention"


def finalists(decode: Mapping[Attention, Mapping[int, float]], depth: int) -> list[Attention]:
    """The kinds worth measuring at a greater depth: the default, and those whose seconds, going on to grow as they did
    with the depth, are least there. q8_0 never is: it is there to save memory.
    """

    def expected(kind: Attention) -> float:
        (d0, t0), (d1, t1) = sorted(decode[kind].items())[-2:]
        return t1 + (t1 - t0) * (depth - d1) / (d1 - d0)

    rivals = sorted((kind for kind in decode if kind != DEFAULT_ATTENTION and kind.kv_type != "q8_0"), key=expected)
    default = [DEFAULT_ATTENTION] if DEFAULT_ATTENTION in decode else []
    return default + rivals[: N_FINALISTS - len(default)]


def best(timed: Mapping[Key, Timed]) -> Key:
    """The fastest decoding; among those within the measuring error of it, the fastest prompt."""
    fastest = min(found.decode for found in timed.values())
    as_fast = [key for key, found in timed.items() if found.decode <= fastest * (1 + _SLACK)]
    return min(as_fast, key=lambda key: timed[key].prompt)


def choose_load_mode(timed: Mapping[LoadMode, Timed]) -> LoadMode:
    """Mapped weights, which are shared and need no memory of their own, unless copied ones bring something."""
    chosen = best(timed)
    if "mmap" not in timed or chosen == "mmap":
        return chosen
    mapped, copied = timed["mmap"], timed[chosen]
    gains = mapped.prompt > copied.prompt * (1 + _WORTH) or mapped.decode > copied.decode * (1 + _SLACK)
    return chosen if gains else "mmap"


def rank_attention(timed: Mapping[Attention, tuple[int, Timed]]) -> tuple[Attention, ...]:
    """The best first. timed: the greatest depth at which each was measured, and its figures there.

    Those that were taken deepest come before the others, q8_0 always last: it saves memory, and isn't quite the same.
    """
    left = dict(timed)
    ranked = []
    while left:
        group = max((kind.kv_type != "q8_0", depth) for kind, (depth, _) in left.items())
        rivals = {kind: found for kind, (depth, found) in left.items() if (kind.kv_type != "q8_0", depth) == group}
        ranked.append(best(rivals))
        del left[ranked[-1]]
    return tuple(ranked)


def choose_batch(prompt_seconds: Mapping[int, float]) -> int:
    """The batch that reads a prompt fastest, if it is worth leaving the usual one for."""
    fastest = min(prompt_seconds, key=lambda n_batch: prompt_seconds[n_batch])
    usual = prompt_seconds.get(DEFAULT_N_BATCH, float("inf"))
    return fastest if prompt_seconds[fastest] * (1 + _WORTH) < usual else DEFAULT_N_BATCH


def thread_counts(n_cores: int) -> list[int]:
    """Worth trying: all cores, and fewer, for cores that share units or memory that is slower than they are."""
    return sorted({n_cores, max(1, 3 * n_cores // 4), max(1, n_cores // 2)}, reverse=True)


def verify_curve(seconds: Mapping[int, float]) -> dict[int, float]:
    """Cost of evaluating n tokens together, in plain steps, from seconds; never falling, for more is never cheaper."""
    curve: dict[int, float] = {}
    highest = 0.0
    for n in sorted(seconds):
        highest = max(highest, seconds[n] / seconds[1])
        curve[n] = round(highest, 4)
    return curve

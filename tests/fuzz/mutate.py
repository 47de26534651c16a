"""Seeded damage to a file: to its bytes, or to what its JSON says. The same generator state gives the same damage."""

from __future__ import annotations

import json
import random
from typing import Any

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 1e-45,
            0.1, 1e38, 1e308, float("nan"), float("inf"), -float("inf"))  # fmt: skip
_TEXTS = ("", " ", "\0", "a" * 70000, "\ud800", "é", "▁", "../../x", "{{", "(?<", "[\\", "\\p{", "<0x41>", "default",
          "model.embed_tokens.weight", "Q4_0", "float8_e4m3fn", "\U0010ffff")  # fmt: skip


def damaged(content: bytes, random_state: random.Random, is_json: bool) -> bytes:
    """The content with one to four things wrong."""
    for _ in range(random_state.choice((1, 1, 1, 2, 4))):
        if is_json and random_state.random() < 0.75:
            content = _json_damaged(content, random_state)
        else:
            content = _bytes_damaged(content, random_state)
    return content


def _bytes_damaged(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
    at = rng.randrange(min(len(data), rng.choice((16, 64, 512, 4096, len(data)))))
    kind = rng.randrange(9)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.choice((0, 1, 127, 128, 255))
    elif kind == 2:
        width = rng.choice((2, 4, 8))
        value = int(rng.choice([n for n in _NUMBERS if isinstance(n, int)])) % (1 << 8 * width)
        data[at : at + width] = value.to_bytes(width, "little")
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + rng.randrange(1, 64)]
    elif kind == 5:
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
    elif kind == 6:
        data[at : at + 32] = bytes(len(data[at : at + 32]))
    elif kind == 7:
        other = rng.randrange(len(data))
        data[at : at + 16] = data[other : other + 16]
    else:
        data += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
    return bytes(data)


def _json_damaged(content: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes_damaged(content, rng)
    if rng.random() < 0.02:
        return ("[" * 100_000 + "]" * rng.choice((0, 100_000))).encode()
    places = _places(value, rng) if isinstance(value, dict | list) else []
    if not places:
        return json.dumps(_anything(rng)).encode()
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind <= 2:
        holder[key] = _anything(rng)
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        other_holder, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    elif isinstance(holder, dict):
        holder[rng.choice((*_TEXTS, str(key).upper()))] = holder[key]
    else:
        holder.insert(key, holder[key])
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any, rng: random.Random) -> list[tuple[Any, Any]]:
    """Where something could be changed: every holder and key near the top, a sample of what lies in long lists."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo and len(found) < 2000:
        holder = todo.pop(0)
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        keys = keys if len(keys) <= 40 else rng.sample(keys, 40)
        found += [(holder, key) for key in keys]
        todo += [holder[key] for key in keys if isinstance(holder[key], dict | list) and holder[key]]
    return found


def _anything(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind <= 2:
        return rng.choice(_NUMBERS)
    if kind <= 4:
        return rng.choice(_TEXTS)
    if kind == 5:
        return [rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 3, 5000)))]
    if kind == 6:
        return {rng.choice(_TEXTS): rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 3)))}
    return [[rng.choice(_TEXTS), rng.choice(_NUMBERS)]]

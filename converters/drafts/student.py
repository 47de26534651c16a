"""A forward pass in torch over some blocks of a checkpoint, for training them.

The same families, names and formulas as `converters.forward`, which is in numpy and which the tests compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from converters.drafts.prune import complete_config, family_of
from converters.forward.rotation import query_scale, rotated_size, rotation
from converters.sources import Source
from edgellm.errors import CheckpointError
from edgellm.native import library

Tensor: TypeAlias = Any  # torch.Tensor, which can't be named without importing torch
_EMBEDDING = "embed_tokens.weight"


def need_torch() -> None:
    """CheckpointError with what to install where torch is missing.

    Loads llama.cpp first: torch may ask Linux for AMX, which some builds of llama.cpp must not get (`native.amx`).
    """
    library.load()
    try:
        import torch  # noqa: F401
    except ImportError as exc:
        raise CheckpointError('distilling needs torch; install it with pip install "edgellm[torch]"') from exc


class Student:
    """weights: what is trained, by the checkpoint's names, float32. The embedding and the head stay as they are."""

    def __init__(self, source: Source) -> None:
        import torch

        self.family, self.config = family_of(source), complete_config(source)
        self.scales = self.family.scales(self.config)
        self.n_blocks = int(self.config["num_hidden_layers"])
        names = [name for name in source.tensors if name.endswith(_EMBEDDING) and "vision" not in name]
        if len(names) != 1:
            raise CheckpointError(f"{source.path} has {len(names)} embeddings; a draft needs a plain text model")
        self._prefix = names[0].removesuffix(_EMBEDDING)
        head = f"{self._prefix.removesuffix('model.')}lm_head.weight"
        is_untied = head in source.tensors and not self.config.get("tie_word_embeddings")
        self.embedding: Tensor = torch.from_numpy(source.tensors[names[0]].read())
        self.head: Tensor = torch.from_numpy(source.tensors[head].read()) if is_untied else self.embedding
        self.weights: dict[str, Tensor] = {
            name: torch.from_numpy(tensor.read()).requires_grad_()
            for name, tensor in source.tensors.items()
            if name not in (names[0], head) and "vision" not in name
        }
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head is applied to: tokens int64 (texts, n) → float32 (texts, n, width)."""
        x = self.embedding[tokens] * self.scales.embedding
        for i in range(self.n_blocks):
            x = self._block(i, x)
        return self._norm(f"{self._prefix}{self.family.final_norm}", x)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """float32 (…, n_vocab), or for these rows of the vocabulary only."""
        import torch

        head = self.head if rows is None else self.head[rows]
        return torch.nn.functional.linear(hidden, head).float() * self.scales.logits

    def _block(self, i: int, x: Tensor) -> Tensor:
        at, family = f"{self._prefix}layers.{i}.", self.family
        before, after, before_feed_forward, after_feed_forward = family.norms
        seen = self._norm(at + before, x) if before else x
        y = self._attention(at, i, seen)
        mixed = x + (self._norm(at + after, y) if after else y) * self.scales.branch
        if not family.parallel(self.config):
            seen = self._norm(at + before_feed_forward, mixed) if before_feed_forward else mixed
        z = self._feed_forward(at, seen)
        return mixed + (self._norm(at + after_feed_forward, z) if after_feed_forward else z) * self.scales.branch

    def _attention(self, at: str, i: int, x: Tensor) -> Tensor:
        import torch

        n_head = int(self.config["num_attention_heads"])
        n_head_kv = int(self.config.get("num_key_value_heads") or n_head)
        q, k, v = self._projections(at, x, n_head, n_head_kv)
        n = x.shape[1]
        if self.family.has_rope(self.config, i):
            cos, sin = self._rotation(n, q.shape[-1])
            q, k = (_rotated(heads, cos, sin, self.family.neighbours) for heads in (q, k))
        growth = query_scale(self.config, n)
        q = q if growth is None else q * torch.from_numpy(growth)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), is_causal=True, scale=self.scales.scores, enable_gqa=n_head != n_head_kv
        )
        return self._linear(at + self.family.output, mixed.transpose(1, 2).reshape(*x.shape[:2], -1))

    def _projections(self, at: str, x: Tensor, n_head: int, n_head_kv: int) -> tuple[Tensor, Tensor, Tensor]:
        """(texts, positions, heads, size) each, normalized where the family does."""
        if f"{at}self_attn.qkv_proj.weight" in self.weights:
            fused = self._linear(f"{at}self_attn.qkv_proj", x)
            size = fused.shape[-1] // (n_head + 2 * n_head_kv)
            parts = list(fused.split([n_head * size, n_head_kv * size, n_head_kv * size], dim=-1))
        else:
            parts = [self._linear(f"{at}self_attn.{name}_proj", x) for name in "qkv"]
        for k, name in enumerate(self.family.qk_norms):
            weight = self.weights.get(f"{at}{name}.weight")
            if weight is not None:
                parts[k] = self._norm(at + name, parts[k].unflatten(-1, (-1, weight.numel()))).flatten(-2)
        q, k_, v = (
            part.unflatten(-1, (heads, -1)) for part, heads in zip(parts, (n_head, n_head_kv, n_head_kv), strict=True)
        )
        return q, k_, v

    def _rotation(self, n: int, size: int) -> tuple[Tensor, Tensor]:
        import torch

        if n not in self._turns:
            turns = rotation(self.config, n, rotated_size(self.config, size), False, n)
            self._turns[n] = (torch.from_numpy(turns[0]), torch.from_numpy(turns[1]))
        return self._turns[n]

    def _feed_forward(self, at: str, x: Tensor) -> Tensor:
        gate, up, down = self.family.feed_forward
        if f"{at}mlp.gate_up_proj.weight" in self.weights:
            a, b = self._linear(f"{at}mlp.gate_up_proj", x).chunk(2, dim=-1)
            inner = self._active(a) * b
        elif gate:
            inner = self._active(self._linear(at + gate, x)) * self._linear(at + up, x)
        else:
            inner = self._active(self._linear(at + up, x))
        return self._linear(at + down, inner)

    def _active(self, x: Tensor) -> Tensor:
        from torch.nn import functional

        if self.family.activation == "gelu":
            return functional.gelu(x, approximate="tanh")
        return functional.relu(x) ** 2 if self.family.activation == "relu2" else functional.silu(x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        from torch.nn import functional

        x = x.float()
        weight, eps = self.weights[f"{name}.weight"] + self.family.norm_offset, float(self.config[self.family.eps])
        if self.family.centers:
            return functional.layer_norm(x, x.shape[-1:], weight, self.weights.get(f"{name}.bias"), eps)
        return functional.rms_norm(x, x.shape[-1:], weight, eps)


def as_arrays(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Copies in numpy."""
    return {name: weight.detach().numpy().copy() for name, weight in weights.items()}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """The first values of each head turned in pairs: halves, or neighbours."""
    import torch

    half = cos.shape[-1]
    head, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (head[..., ::2], head[..., 1::2]) if neighbours else (head[..., :half], head[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)

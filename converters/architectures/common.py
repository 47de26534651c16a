"""Pieces that most families' specs share: sizes, metadata, attention and feed-forward weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from converters.architectures.spec import KV, Config, Op, Sizes, Weight, config_float, config_int
from edgellm.errors import CheckpointError

BLOCK = "model.layers.{i}."

# field → other names config classes have for it
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
# an embedding model is stored without its class for text around it
BARE_NAMES = tuple((prefix, f"model.{prefix}") for prefix in ("layers.", "embed_tokens.", "norm."))

BASE_METADATA = (
    KV("{arch}.block_count", "num_hidden_layers"),
    KV("{arch}.embedding_length", "hidden_size"),
    KV("{arch}.feed_forward_length", "intermediate_size"),
    KV("{arch}.attention.head_count", "num_attention_heads"),
    KV("{arch}.attention.head_count_kv", "num_key_value_heads", optional=True),
    KV("{arch}.vocab_size", "vocab_size"),
)
HEAD_DIM = (
    KV("{arch}.attention.key_length", "head_dim", optional=True),
    KV("{arch}.attention.value_length", "head_dim", optional=True),
)
# scalings of graphs that also take divisors of the frequencies
FACTOR_ROPES = ("default", "linear", "yarn", "dynamic", "llama3", "longrope")
RMS_EPS = (KV("{arch}.attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"),)
LAYER_EPS = "{arch}.attention.layer_norm_epsilon"


def standard_sizes(config: Config) -> dict[str, int]:
    """The numbers shapes and ops are written in, from a config's usual fields; CheckpointError if they don't fit."""
    n_embd, n_head = config_int(config, "hidden_size"), config_int(config, "num_attention_heads")
    n_head_kv = config_int(config, "num_key_value_heads") if config.get("num_key_value_heads") else n_head
    head_dim = config_int(config, "head_dim") if config.get("head_dim") else n_embd // n_head
    if n_head % n_head_kv or head_dim % 2:
        raise CheckpointError(
            f"config.json has {n_head} heads of {head_dim} over {n_head_kv} key-value heads, which doesn't divide"
        )
    sizes = {
        "n_layer": config_int(config, "num_hidden_layers"),
        "n_embd": n_embd,
        "n_ff": config_int(config, "intermediate_size"),
        "n_vocab": config_int(config, "vocab_size"),
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_rot": int(head_dim * partial_rotary_factor(config)),
        "n_q": n_head * head_dim,
        "n_kv": n_head_kv * head_dim,
        "n_qkv": (n_head + 2 * n_head_kv) * head_dim,
        "n_ff_fused": 2 * config_int(config, "intermediate_size"),
    }
    return sizes | _expert_sizes(config)


def _expert_sizes(config: Config) -> dict[str, int]:
    count = next((config_int(config, name) for name in _EXPERT_COUNTS if config.get(name)), 0)
    if not count:
        return {}
    n_ff_exp = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    sizes = {"n_expert": count, "n_ff_exp": config_int(config, n_ff_exp)}
    if config.get("shared_expert_intermediate_size"):
        sizes["n_ff_shexp"] = config_int(config, "shared_expert_intermediate_size")
    return sizes


def partial_rotary_factor(config: Config) -> float:
    """The rotated share of a head, wherever the config says it; 1 by default."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for holder in (nested, config):
        if isinstance(holder, dict) and holder.get("partial_rotary_factor") is not None:
            return config_float(holder, "partial_rotary_factor")
    return 1.0


def window_context_length(config: Config) -> tuple[int, list[str]]:
    """As far as llama.cpp computes the same, for families whose graph there has no sliding window."""
    trained, window = config_int(config, "max_position_embeddings"), config.get("sliding_window")
    if not window or window >= trained:
        return trained, []
    return window, [f"context limited to the sliding window of {window} tokens, which llama.cpp doesn't apply here"]


def sliding_layers(config: Config, sizes: Sizes, period: int) -> dict[str, Any]:
    """The window, and which blocks have it: all but each `period`-th, unless layer_types says otherwise."""
    if not config.get("sliding_window"):
        return {}
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(sizes["n_layer"])
    ]
    return {
        "attention.sliding_window": config_int(config, "sliding_window"),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
    }


def sliding_config(metadata: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """`sliding_layers` backwards: the fields of config.json, none for a model without a window."""
    window = metadata.get(f"{arch}.attention.sliding_window")
    pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
    if not window:
        return {}
    if not isinstance(pattern, list):
        return {"sliding_window": window}
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
    }


def only(layers: Callable[[Config, int], bool], *weights: Weight) -> tuple[Weight, ...]:
    """The same weights, in some blocks only."""
    return tuple(replace(weight, layers=layers) for weight in weights)


def embeddings(head: bool = True) -> tuple[Weight, ...]:
    """Token embedding, final norm and, where a model may have its own, the output head."""
    weights = (
        Weight("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd")),
        Weight("model.norm.weight", "output_norm.weight", ("n_embd",)),
    )
    return (*weights, Weight("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), tied=True)) if head else weights


def linear(
    hf: str,
    gguf: str,
    rows: str,
    columns: str,
    ops: tuple[Op, ...] = (),
    bias: str | bool = False,
    block: str = BLOCK,
) -> tuple[Weight, ...]:
    """A linear layer of each block. bias: True, or the config flag that says whether it has one."""
    weight = Weight(f"{block}{hf}.weight", f"blk.{{i}}.{gguf}.weight", (rows, columns), ops)
    if not bias:
        return (weight,)
    flag = bias if isinstance(bias, str) else ""
    row_ops = tuple(op for op in ops if op.axis == "rows")
    return weight, Weight(f"{block}{hf}.bias", f"blk.{{i}}.{gguf}.bias", (rows,), row_ops, flag=flag)


def norm(
    hf: str,
    gguf: str,
    size: str = "n_embd",
    ops: tuple[Op, ...] = (),
    bias: bool = False,
    block: str = BLOCK,
) -> tuple[Weight, ...]:
    """A norm of each block."""
    weight = Weight(f"{block}{hf}.weight", f"blk.{{i}}.{gguf}.weight", (size,), ops)
    return (weight, Weight(f"{block}{hf}.bias", f"blk.{{i}}.{gguf}.bias", (size,))) if bias else (weight,)


def attention(
    qkv_bias: str | bool = False,
    o_bias: str | bool = False,
    q_ops: tuple[Op, ...] = (),
    k_ops: tuple[Op, ...] = (),
    prefix: str = "self_attn.",
    o: str = "o_proj",
) -> tuple[Weight, ...]:
    """Separate q, k, v and output projections."""
    return (
        *linear(f"{prefix}q_proj", "attn_q", "n_q", "n_embd", q_ops, qkv_bias),
        *linear(f"{prefix}k_proj", "attn_k", "n_kv", "n_embd", k_ops, qkv_bias),
        *linear(f"{prefix}v_proj", "attn_v", "n_kv", "n_embd", (), qkv_bias),
        *linear(f"{prefix}{o}", "attn_output", "n_embd", "n_q", (), o_bias),
    )


def gated_mlp(
    bias: str | bool = False, prefix: str = "mlp.", n_ff: str = "n_ff", suffix: str = ""
) -> tuple[Weight, ...]:
    """gate, up and down projections."""
    return (
        *linear(f"{prefix}gate_proj", f"ffn_gate{suffix}", n_ff, "n_embd", (), bias),
        *linear(f"{prefix}up_proj", f"ffn_up{suffix}", n_ff, "n_embd", (), bias),
        *linear(f"{prefix}down_proj", f"ffn_down{suffix}", "n_embd", n_ff, (), bias),
    )


def experts(
    prefix: str = "mlp.experts.{e}.",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    layers: Callable[[Config, int], bool] | None = None,
) -> tuple[Weight, ...]:
    """Gated experts, stored one by one; stacked in the GGUF."""

    def one(hf: str, gguf: str, rows: str, columns: str) -> Weight:
        shape = ("n_expert", rows, columns)
        return Weight(f"{BLOCK}{prefix}{hf}.weight", f"blk.{{i}}.{gguf}.weight", shape, layers=layers)

    return (
        one(gate, "ffn_gate_exps", "n_ff_exp", "n_embd"),
        one(up, "ffn_up_exps", "n_ff_exp", "n_embd"),
        one(down, "ffn_down_exps", "n_embd", "n_ff_exp"),
    )

"""Reads the header of a GGUF file, and refuses what would make llama.cpp abort the process.

Pure Python and standard library: `edgellm run` checks a file with it before it lets native code near it, and
numpy isn't loaded for that. It reads metadata and tensor positions, never tensor data. Little-endian files of
versions 2 and 3 only. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from edgellm.errors import ModelFileError

# ggml type id → (name, weights in a block, bytes of a block); checked against gguf.GGML_QUANT_SIZES in the tests
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # of llama.cpp
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is outermost first, as in checkpoints: (rows, columns) of a matrix."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # from the start of the file
    n_bytes: int

    @property
    def type_name(self) -> str:
        return GGML_TYPES[self.ggml_type][0]

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    n_bytes: int
    kinds: dict[str, int]  # of each metadata entry: its GGUF value type
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each: from where to where it is in the file
    data_start: int = 0  # where the first tensor's bytes begin
    infos_end: int = 0  # where the list of tensors before them ends
    alignment: int = 32

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


_vouched: set[Path] = set()


@contextmanager
def vouched(path: Path) -> Iterator[None]:
    """Within it the converter may look at its own `.partial` file, which is nobody else's model yet."""
    _vouched.add(path)
    try:
        yield
    finally:
        _vouched.discard(path)


def read_header(path: str | Path) -> GGUFHeader:
    """Metadata and tensor positions of a GGUF. ModelFileError: no such file, not a GGUF, truncated, malformed."""
    path = Path(path)
    if path.suffix == ".partial" and path not in _vouched:
        raise ModelFileError(f"{path} is what an interrupted conversion left; convert again (--resume goes on with it)")
    try:
        n_bytes = path.stat().st_size
        if path.is_dir():
            raise ModelFileError(f"{path} is a folder, not a GGUF file; convert a checkpoint with `edgellm convert`")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelFileError(f"{path} is not a GGUF file (it doesn't begin with the letters GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, n_bytes).header()
    except OSError as exc:
        raise ModelFileError(f"cannot read {path}: {exc.strerror or exc}; check the path") from exc


def check_loadable(path: str | Path) -> GGUFHeader:
    """The header of a file that llama.cpp can be given; ModelFileError where its native code would abort.

    Of the first file of several: with the tensors of them all (whose offsets are each in its own file).
    """
    return checked(read_header(path))


def checked(header: GGUFHeader) -> GGUFHeader:
    """As `check_loadable`, of a header that was read already."""
    header = _with_other_parts(header)
    if not header.architecture:
        raise ModelFileError(f"{header.path} has no general.architecture: it is no model file")
    if header.metadata.get("general.type", "model") not in ("model", "mmproj"):
        kind = header.metadata["general.type"]
        raise ModelFileError(f"{header.path} holds {_with_article(kind)}, not a model; give the model it belongs to")
    if not header.tensors:
        raise ModelFileError(f"{header.path} holds no weights (a vocabulary-only file); give it a whole model")
    _check_numbers(header)
    _check_vocabulary(header)
    return header


def parts_of(path: Path) -> list[Path]:
    """The files that together are one model, by the names llama.cpp gives them, in order; a whole file is its own."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    return [path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _with_other_parts(header: GGUFHeader) -> GGUFHeader:
    """llama.cpp is given the first file of several, and finds the others by their names."""
    number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    parts = parts_of(header.path)
    if len(parts) != count:
        raise ModelFileError(
            f"{header.path} is one of {count} files of a model, which llama.cpp finds only under names that end in "
            f"-00001-of-{count:05}.gguf and so on; give them their names back"
        )
    if number != 0:
        raise ModelFileError(f"{header.path} is one of {count} files of a model; give the first: {parts[0].name}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelFileError(
            f"{header.path} is one of {count} files of a model; put {', '.join(missing[:4])} beside it"
        )
    others = [read_header(part) for part in parts[1:]]
    tensors = {**header.tensors, **{name: info for other in others for name, info in other.tensors.items()}}
    return replace(header, tensors=tensors, n_bytes=header.n_bytes + sum(other.n_bytes for other in others))


def _with_article(kind: object) -> str:
    return f"an {kind} (it goes with --lora)" if kind == "adapter" else f"a {kind}"


def _check_numbers(header: GGUFHeader) -> None:
    """What llama.cpp asserts about a model's sizes (llama-model.cpp, load_hparams), and would abort on."""

    def number(key: str) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        value = max(value, default=0) if isinstance(value, list) else value
        return value if isinstance(value, int) else 0

    n_layer = header.metadata.get(f"{header.architecture}.block_count", 1)
    n_expert, used, groups = number("expert_count"), number("expert_used_count"), number("expert_group_count")
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    conditions = {
        "block_count": isinstance(n_layer, int) and 0 < n_layer <= _MAX_LAYERS,
        "nextn_predict_layers": number("nextn_predict_layers") <= number("block_count"),
        "expert_count": n_expert <= _MAX_EXPERTS,
        "expert_used_count": (0 < used <= n_expert) if n_expert else used == 0,
        "expert_group_count": groups < n_expert if n_expert else groups == 0,
        "expert_group_used_count": groups < 2
        or (n_expert % groups == 0 and 0 < number("expert_group_used_count") < groups),
        "rope.scaling.type": scaling in ("none", "linear", "yarn", "longrope"),
    }
    for key, holds in conditions.items():
        if not holds:
            value = header.metadata.get(f"{header.architecture}.{key}")
            raise ModelFileError(
                f"{header.path} is damaged: {header.architecture}.{key} = {str(value)[:60]!r}; convert it again"
            )


def token_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry as they stand in the file (they needn't be valid UTF-8)."""
    return token.encode("utf-8", "surrogateescape")


def _as_llama_cpp_reads(tokens: list[str]) -> list[str]:
    """C strings end at a zero byte, and an empty token gets a name."""
    if "" not in tokens and "\0" not in "".join(tokens):
        return tokens
    return [token.partition("\0")[0] or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _check_vocabulary(header: GGUFHeader) -> None:
    meta, path = header.metadata, header.path
    kind = meta.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens[:1]):
        raise ModelFileError(f"{path}: the vocabulary (tokenizer.ggml.tokens) is missing; convert the model again")
    tokens = _as_llama_cpp_reads(tokens)
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise ModelFileError(
            f"{path}: the vocabulary has the token {twice!r} more than once, which llama.cpp can't load; "
            "convert the model again with a tool that makes tokens unique"
        )
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in meta and (not isinstance(meta[key], list) or len(meta[key]) < len(tokens)):
            raise ModelFileError(f"{path}: {key} doesn't cover the {len(tokens)} tokens; convert the model again")
    if kind == "llama" and "<0x00>" not in tokens and not {chr(b) for b in range(32, 127)} <= set(tokens):
        raise ModelFileError(f"{path}: a SentencePiece vocabulary without byte tokens, on which llama.cpp would abort")


class _Parser:
    """A cursor over the mapped file; every read is bounds-checked by struct or by `take`."""

    def __init__(self, path: Path, data: mmap.mmap, n_bytes: int) -> None:
        self.path, self.data, self.n_bytes = path, data, n_bytes
        self.pos = 4

    def bad(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is damaged: {what}; copy, download or convert it again")

    def header(self) -> GGUFHeader:
        if sys.byteorder != "little":
            raise ModelFileError("GGUF files are read on little-endian machines only")
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelFileError(f"{self.path} has GGUF version {version}; versions 2 and 3 are supported")
        n_tensors, n_kv = self.scalar("Q"), self.scalar("Q")
        if 13 * n_kv + 24 * n_tensors > self.n_bytes:
            raise self.bad(f"it announces {n_kv} metadata entries and {n_tensors} tensors, more than it can hold")
        metadata: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(n_kv):
            start = self.pos
            key = self.string()
            if key in metadata:
                raise self.bad(f"metadata key {key!r} stands twice")
            kinds[key] = self.scalar("I")
            metadata[key] = self.value(kinds[key])
            spans[key] = (start, self.pos)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.bad(f"general.alignment is {alignment!r}, not a power of two")
        infos = [self.tensor_info() for _ in range(n_tensors)]
        data_start = (self.pos + alignment - 1) // alignment * alignment
        tensors = self.place(infos, data_start, alignment)
        return GGUFHeader(
            self.path, version, metadata, tensors, self.n_bytes, kinds, spans, data_start, self.pos, alignment
        )

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.scalar("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.bad(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(reversed([self.scalar("Q") for _ in range(n_dims)]))
        ggml_type, offset = self.scalar("I"), self.scalar("Q")
        if ggml_type not in GGML_TYPES:
            raise ModelFileError(f"{self.path}: tensor {name!r} has ggml type {ggml_type}, which edgellm doesn't know")
        if shape[-1] % GGML_TYPES[ggml_type][1] or min(shape) < 1:
            raise self.bad(f"tensor {name!r} of type {GGML_TYPES[ggml_type][0]} has shape {list(shape)}")
        return name, shape, ggml_type, offset

    def place(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        expected = 0  # llama.cpp wants tensors back to back in the order of the header
        for name, shape, ggml_type, offset in infos:
            _, block, size = GGML_TYPES[ggml_type]
            n_bytes = prod(shape) // block * size
            if name in tensors:
                raise self.bad(f"tensor {name!r} stands twice")
            if offset != expected:
                raise self.bad(f"tensor {name!r} is at {offset}, expected at {expected}")
            if start + offset + n_bytes > self.n_bytes:
                missing = start + offset + n_bytes - self.n_bytes
                raise self.bad(f"it is cut off: tensor {name!r} needs {missing:,} bytes more than the file has")
            tensors[name] = TensorInfo(name, shape, ggml_type, start + offset, n_bytes)
            expected = offset + (n_bytes + alignment - 1) // alignment * alignment
        return tensors

    def take(self, n: int) -> bytes:
        end = self.pos + n
        if end > self.n_bytes:
            raise self.bad("it is cut off inside the header")
        chunk = self.data[self.pos : end]
        self.pos = end
        return chunk

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.bad(f"metadata value of unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind], count)
        if kind == _STRING:
            return self.strings(count)
        raise self.bad(f"array of unknown element type {kind}")

    def scalars(self, code: str, count: int) -> list[Any]:
        raw = self.take(struct.calcsize("<" + code) * count)
        values = [bool(b) for b in raw] if code == "?" else array(code, raw).tolist()
        return list(values)

    def strings(self, count: int) -> list[str]:
        """`count` strings. The hot loop of every start: 100,000 vocabulary entries in some 30 ms."""
        if 8 * count > self.n_bytes - self.pos:
            raise self.bad("it is cut off inside the header")
        data, pos, end = self.data, self.pos, self.n_bytes
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        out: list[str] = []
        for _ in range(count):
            if pos + 8 > end:
                raise self.bad("it is cut off inside the header")
            n = unpack(data, pos)[0]
            pos += 8 + n
            if pos > end:
                raise self.bad("it is cut off inside the header")
            out.append(data[pos - n : pos].decode("utf-8", "surrogateescape"))
        self.pos = pos
        return out

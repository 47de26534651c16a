"""Small GGUF files that nobody needs to load, and the folders other programs keep such files in."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(path: Path, *, seed: int = 0, architecture: str = "llama", parts: int = 0, **entries: Any) -> Path:
    """A file of two tensors with the metadata of a small model. parts: as so many files, the first is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=1 if parts else 0)
    for key in ("context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"{architecture}.{key}", 512)
    for key in ("block_count", "attention.head_count"):
        writer.add_uint32(f"{architecture}.{key}", 2)
    for key, value in entries.items():
        key = key.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    random = np.random.default_rng(seed)
    for i in range(parts or 2):
        writer.add_tensor(f"blk.{i}.attn_q.weight", random.standard_normal((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf") if parts else path


def in_hugging_face(hub: Path, repository: str, revision: str, name: str, file: Path, *, main: bool = True) -> Path:
    """As huggingface_hub stores it: a blob under its SHA-256, and a relative link to it."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    blob = folder / "blobs" / sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, blob)
    link = folder / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * (2 + name.count("/"))
    link.symlink_to(f"{up}blobs/{blob.name}")
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
    return link


def in_ollama(models: Path, name: str, file: Path, *, others: dict[str, bytes] | None = None) -> Path:
    """As `ollama pull` stores it: a manifest under registry/owner/model/tag and blobs. Returns the model's blob."""
    layers = []
    for kind, content in {"model": file.read_bytes(), "params": b"{}", **(others or {})}.items():
        digest = sha256(content).hexdigest()
        blob = models / "blobs" / f"sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        kind = f"application/vnd.ollama.image.{kind}"
        layers.append({"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)})
    manifest = models / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return models / "blobs" / layers[0]["digest"].replace(":", "-")

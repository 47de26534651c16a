"""GGUF files that are on this machine already: edgellm's own folder, and those of Hugging Face, LM Studio and Ollama.

Folders of others are only read, and the network is asked nothing. What can't be read is said, never raised: one damaged
manifest must not hide all other models.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.errors import ModelFileError
from edgellm.gguf_header import parts_of, read_header

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")  # anything else in a manifest could point out of the folder
_OLLAMA_LAYER = "application/vnd.ollama.image."
_OLLAMA_DEFAULTS = ("registry.ollama.ai", "library")  # of a name: host and owner, which are left out
_MAX_MANIFEST = 1 << 20  # bytes


@dataclass(frozen=True)
class ModelFile:
    """Where a model is. path: its file, or the first of several. problem: why it can't be used, "" if all looks well.

    name: what it is called on the command line. aliases: what else was found to be this very file.
    """

    name: str
    store: str
    path: Path
    problem: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Of all its files that are there."""
        total = 0
        for part in parts_of(self.path):
            with suppress(OSError):
                total += part.stat().st_size
        return total


@dataclass
class Store:
    """A folder of models and what was found there. problems: what couldn't be read, and why."""

    name: str
    folder: Path
    files: list[ModelFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exists(self) -> bool:
        return os.path.isdir(self.folder)


def own_folder() -> Path:
    """Where models may be put for edgellm to find."""
    from platformdirs import user_data_path

    return user_data_path("edgellm") / "models"


def find_stores() -> list[Store]:
    """All folders that programs keep models in, whether they exist or not, with every file once in all of them."""
    stores = [Store("edgellm", own_folder()), Store("Hugging Face", _hugging_face_folder())]
    stores += [Store("LM Studio", folder) for folder in _lm_studio_folders()]
    stores += [Store("Ollama", folder) for folder in _ollama_folders()]
    for store in stores:
        if store.exists:
            look = {"Hugging Face": _look_at_hugging_face, "Ollama": _look_at_ollama}.get(store.name, _look_at_folder)
            look(store)
    _keep_each_once(stores)
    return stores


def resolve_name(name: str) -> Path | None:
    """The file of the one model of this name, or whose name ends in it; None if there is none.

    ModelFileError: it could be several, or what there is can't be used.
    """
    files = [file for store in find_stores() for file in store.files]
    ranked = [(rank, file) for file in files if (rank := _rank(file, name)) is not None]
    best = min((rank for rank, _ in ranked), default=0)
    found = [file for rank, file in ranked if rank == best]
    if len(found) > 1:
        found = [file for file in found if _is_model(file)] or found
    if not found:
        return None
    if len(found) > 1:
        several = ", ".join(f"{file.name} ({file.path})" for file in found[:4])
        raise ModelFileError(f"{name} may be one of {len(found)} models: {several}; give more of the name, or the path")
    if found[0].problem:
        raise ModelFileError(f"{found[0].name} ({found[0].store}): {found[0].problem}")
    return found[0].path


def _rank(file: ModelFile, wanted: str) -> int | None:
    """How well the name fits, 0 best; None = it is another one's."""
    wanted = wanted.casefold().removesuffix(".gguf")
    ranks = []
    for name in (file.name, *file.aliases):
        name = name.casefold()
        untagged, _, tag = name.rpartition(":")
        if name == wanted or (tag == "latest" and untagged == wanted):
            ranks.append(0)
        elif name.endswith(f"/{wanted}"):
            ranks.append(1)
        elif name.startswith(f"{wanted}/") or untagged == wanted:  # a repository; a model of any tag
            ranks.append(2)
    return min(ranks, default=None)


def _is_model(file: ModelFile) -> bool:
    with suppress(ModelFileError):
        header = read_header(file.path)
        return header.metadata.get("general.type", "model") == "model" and header.architecture != "clip"
    return False


def _keep_each_once(stores: list[Store]) -> None:
    """Links, and copies that a file system shares, are one file: the first place counts, the others name it too."""
    seen: dict[object, tuple[Store, int]] = {}
    for store in stores:
        files, store.files = store.files, []
        for file in files:
            identity = _identity(file)
            if identity in seen:
                first, i = seen[identity]
                known = first.files[i]
                names = dict.fromkeys((*known.aliases, file.name))
                names.pop(known.name, None)
                first.files[i] = ModelFile(known.name, known.store, known.path, known.problem, tuple(names))
            else:
                seen[identity] = (store, len(store.files))
                store.files.append(file)


def _identity(file: ModelFile) -> object:
    with suppress(OSError):
        found = file.path.stat()
        return found.st_dev, found.st_ino
    return file.name, file.store


def _look_at_folder(store: Store) -> None:
    """Named by their paths within the folder."""
    for path in _gguf_files(store.folder, store.problems):
        store.files.append(_file(path.relative_to(store.folder), store, path))


def _file(name: Path, store: Store, path: Path, ending: str = "") -> ModelFile:
    stem = re.sub(r"-00001-of-[0-9]{5}$", "", name.as_posix().removesuffix(".gguf").removesuffix(".GGUF"))
    problem = "" if path.is_file() else "it links to a file that isn't there; download it again"
    return ModelFile(stem + ending, store.name, path, problem)


def _gguf_files(folder: Path, problems: list[str], seen: frozenset[object] = frozenset()) -> Iterator[Path]:
    """In the folder and those below it, linked ones too; of a model in several files only the first."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        found = os.stat(folder)
    except OSError as exc:
        problems.append(f"cannot read {folder}: {exc.strerror or exc}")
        return
    identity = (found.st_dev, found.st_ino)
    if identity in seen:  # a link to a folder above it
        return
    for entry in entries:
        path = folder / entry.name
        if path.is_dir():
            yield from _gguf_files(path, problems, seen | {identity})
        elif entry.name.lower().endswith(".gguf") and parts_of(path)[0] == path:
            yield path


def _hugging_face_folder() -> Path:
    """As huggingface_hub finds it (its constants.py)."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if cache:
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache").expanduser() / "huggingface" / "hub"


def _look_at_hugging_face(store: Store) -> None:
    """models--OWNER--NAME/snapshots/REVISION/FILE, links to ../../blobs; refs/main says which revision is today's."""
    try:
        repositories = sorted(path for path in store.folder.glob("models--*") if path.is_dir())
    except OSError as exc:
        store.problems.append(f"cannot read {store.folder}: {exc.strerror or exc}")
        return
    for repository in repositories:
        owned = repository.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot, is_current in _snapshots(repository, store.problems):
            ending = "" if is_current else f"@{snapshot.name[:8]}"
            for path in _gguf_files(snapshot, store.problems):
                store.files.append(_file(Path(owned) / path.relative_to(snapshot), store, path, ending))


def _snapshots(repository: Path, problems: list[str]) -> list[tuple[Path, bool]]:
    """Its revisions, and whether it is the current one, which comes first."""
    folder = repository / "snapshots"
    if not os.path.isdir(folder):
        return []
    try:
        snapshots = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    except OSError as exc:
        problems.append(f"cannot read {folder}: {exc.strerror or exc}")
        return []
    current = snapshots[0].name if snapshots else ""
    with suppress(OSError, UnicodeDecodeError):
        named = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        current = named if any(path.name == named for path in snapshots) else current
    marked = [(path, path.name == current) for path in snapshots]
    return sorted(marked, key=lambda one: not one[1])


def _lm_studio_folders() -> list[Path]:
    """Today's and that of versions before 0.3."""
    return [_home() / ".lmstudio" / "models", _home() / ".cache" / "lm-studio" / "models"]


def _ollama_folders() -> list[Path]:
    named = os.environ.get("OLLAMA_MODELS")
    if named:
        return [Path(named).expanduser()]
    folders = [_home() / ".ollama" / "models"]
    if sys.platform == "linux":
        folders.append(Path("/usr/share/ollama/.ollama/models"))  # of the system's service
    return folders


def _look_at_ollama(store: Store) -> None:
    """manifests/HOST/OWNER/MODEL/TAG is JSON that lists layers; a model's is the GGUF blobs/sha256-DIGEST."""
    manifests = store.folder / "manifests"

    def unreadable(exc: OSError) -> None:
        store.problems.append(f"cannot read {exc.filename}: {exc.strerror or exc}")

    for folder, _, names in os.walk(manifests, onerror=unreadable):
        for name in sorted(names):
            path = Path(folder) / name
            parts = path.relative_to(manifests).parts
            if len(parts) >= 2 and not name.startswith("."):
                store.files += _ollama_model(store, path, _ollama_name(parts))


def _ollama_name(parts: tuple[str, ...]) -> str:
    """As Ollama shows it: host and owner only where they aren't the usual ones."""
    *where, model, tag = parts
    for usual in _OLLAMA_DEFAULTS:
        if where[:1] != [usual]:
            break
        where = where[1:]
    return "/".join([*where, model]) + f":{tag}"


def _ollama_model(store: Store, manifest: Path, name: str) -> list[ModelFile]:
    """None for a model of another format. Its problem says what is wrong with a manifest."""
    try:
        layers = _ollama_layers(manifest)
        digests = [digest for kind, digest in layers if kind == "model"]
    except OSError as exc:
        return [ModelFile(name, store.name, manifest, f"its manifest can't be read: {exc.strerror or exc}")]
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return [ModelFile(name, store.name, manifest, "its manifest is damaged; pull it again")]
    if not digests:
        return []
    path = store.folder / "blobs" / f"sha256-{digests[0]}"
    if not path.is_file():
        return [ModelFile(name, store.name, path, "its file isn't there; pull it again")]
    if any(kind == "adapter" for kind, _ in layers):
        return [ModelFile(name, store.name, path, "it needs an adapter, kept apart; give the paths, --lora for that")]
    return [ModelFile(name, store.name, path)]


def _ollama_layers(manifest: Path) -> list[tuple[str, str]]:
    """(kind, SHA-256 in hexadecimal) of those that are Ollama's. OSError, or what JSON of another shape raises."""
    with manifest.open("rb") as file:
        content = json.loads(file.read(_MAX_MANIFEST))
    layers = []
    for layer in content["layers"]:
        kind, digest = layer["mediaType"], _DIGEST.fullmatch(layer["digest"])
        if digest is None:
            raise ValueError("a digest that is none")
        if kind.startswith(_OLLAMA_LAYER):
            layers.append((kind.removeprefix(_OLLAMA_LAYER), digest[1]))
    return layers


def _home() -> Path:
    return Path(os.path.expanduser("~"))

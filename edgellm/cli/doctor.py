"""`edgellm doctor`: what this machine and this install can do, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm import __version__

if TYPE_CHECKING:
    from edgellm.engine.doctor import Advice, Found


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """Look at this machine and this install: what is there, what is slow, how to fix it. Exits 1 if nothing works."""
    from edgellm.engine.doctor import advise, examine

    found = examine()
    advice = advise(found)
    works = not any(one.fatal for one in advice)
    if as_json:
        document = {"works": works, "edgellm": __version__, "advice": [asdict(one) for one in advice], **asdict(found)}
        typer.echo(json.dumps(document, default=str))
    else:
        known = list(facts(found))
        width = max(len(name) for name, _ in known)
        for name, text in known:
            typer.echo(f"{name:<{width}}  {text}")
        typer.echo()
        for line in lines(advice):
            typer.echo(line)
    if not works:
        raise typer.Exit(1)


def facts(found: Found) -> Iterator[tuple[str, str]]:
    """What there is, by name."""
    machine, build = found.machine, found.build
    yield "edgellm", f"{__version__}, on {found.python}"
    if build is None:
        yield "llama.cpp", "doesn't work"
    else:
        yield "llama.cpp", f"{build.llama_cpp}, of llama-cpp-python {build.python_package}"
        yield "its build", ", ".join(build.features)
        can = {"GPU offload": build.gpu_offload, "mapped files": build.mmap, "pinned memory": build.mlock}
        yield "", ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in can.items())
    cores = f"{machine.n_physical} cores, " if machine.n_physical else ""
    yield "CPU", f"{machine.cpu}, {cores}{machine.n_logical} logical ones, {machine.n_usable} for this process"
    yield "it has", ", ".join(machine.features) or "unknown"
    yield "system", f"{machine.system}, {machine.architecture}"
    yield "memory", f"{found.memory.available / 1e9:.1f} GB free of {found.memory.total / 1e9:.1f} GB"
    yield "limits", ", ".join(_limits(found))
    if machine.busy_cores is not None:
        yield "load", f"other programs keep {machine.busy_cores:.1f} cores busy"
    yield "default model", str(found.default_model or "not installed")
    yield "tuned models", f"{found.n_tuned}, the default one {'too' if found.default_is_tuned else 'not'}"
    for folder in found.folders:
        yield folder.name, f"{_size(folder.n_bytes)} in {folder.path}" if folder.exists else f"none ({folder.path})"


def _limits(found: Found) -> Iterator[str]:
    machine = found.machine
    yield f"{machine.cpu_quota:g} cores for this container" if machine.cpu_quota else "no quota of cores"
    yield f"{_size(machine.lockable)} can be pinned" if machine.lockable is not None else "all memory can be pinned"
    if machine.address_space is not None:
        yield f"{_size(machine.address_space)} of addresses"


def lines(advice: list[Advice]) -> Iterator[str]:
    """What is wrong, for people."""
    if not advice:
        yield "All is well."
    for one in advice:
        yield f"{'BROKEN: ' if one.fatal else 'note: '}{one.text}"


def _size(n_bytes: int) -> str:
    from edgellm.cli.convert import size

    return size(n_bytes)

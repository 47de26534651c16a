"""No command reaches for the network: every address looked up or connected to ends the process that tried.

Python's audit hooks see what Python code does, in the commands' child processes too. What native code might do is shut
out where the system can give a process a network without interfaces (`unshare -rn`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.catalog.gguf_files import in_ollama
from tests.converters import tiny
from tests.runtime.test_cli import EDGELLM

TRIED = 86  # exit code of a process that tried

HOOK = f"""
import os, sys

FORBIDDEN = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
    "socket.getnameinfo", "socket.gethostby", "http.client.connect", "urllib.Request", "ftplib.connect")

def refuse(event, arguments):
    if event.startswith(FORBIDDEN):
        line = f"NETWORK {{event}} {{arguments!r}} in {{sys.argv!r}}\\n".encode()
        # the file is for attempts of children whose end nobody looks at
        file = os.open(os.environ["NETWORK_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.write(2, line)
        os._exit({TRIED})

sys.addaudithook(refuse)
"""


@dataclass(frozen=True)
class Place:
    """A folder with a tiny checkpoint, a GGUF of it, texts and prompts; and where attempts are written down."""

    folder: Path
    environment: dict[str, str]

    @property
    def attempts(self) -> str:
        log = self.folder / "network.log"
        return log.read_text() if log.exists() else ""

    def run(
        self, command: list[str], *arguments: str, stdin: bytes = b"", before: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*before, *command, *arguments],
            input=stdin,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            timeout=240,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("offline")
    tiny.make_model(folder / "checkpoint", vocab_size=1000)
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    (folder / "prompts.jsonl").write_text('{"custom_id": "a", "prompt": "Hi"}\n')
    kept_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # it must hold without being asked for
    environment = {name: value for name, value in os.environ.items() if name not in kept_out}
    paths = [str(folder / "hook"), str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NETWORK_LOG": str(folder / "network.log")}
    environment |= {"HOME": str(folder), "XDG_DATA_HOME": str(folder / "data"), "XDG_CACHE_HOME": str(folder / "cache")}
    made = Place(folder, environment)
    result = made.run(EDGELLM, "convert", "checkpoint", "-o", "tiny.gguf", "--quant", "Q8_0")
    assert result.returncode == 0, result.stderr
    in_ollama(folder / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest", folder / "tiny.gguf")
    return made


COMMANDS = {
    "convert": (["convert", "checkpoint", "-o", "out.gguf", "--quant", "Q8_0", "--force"], b"", ""),
    "inspect": (["inspect", "tiny.gguf", "--json"], b"", '"kind"'),
    "run": (["run", "tiny.gguf", "Hello", "-n", "3", "--json"], b"", '"finish_reason"'),
    "run by name": (["run", "tiny:latest", "Hello", "-n", "3", "--json"], b"", '"finish_reason"'),
    "chat": (["chat", "tiny.gguf", "-n", "3", "--n-ctx", "256"], b"Hello\nAgain\n", ""),
    "batch": (["batch", "tiny.gguf", "prompts.jsonl", "-o", "OUT", "-n", "3", "--n-ctx", "128"], b"", ""),
    "models": (["models", "--json"], b"", "tiny:latest"),
    "doctor": (["doctor", "--json"], b"", '"works": true'),
    "eval": (
        ["eval", "tiny.gguf", "--text", "text.txt", "--n-ctx", "64", "--chunks", "2", "--json"],
        b"",
        "perplexity",
    ),
    "draft": (["draft", "tiny.gguf", "--from-text", "text.txt", "-o", "OUT", "-n", "8", "--prompts", "1"], b"", ""),
}


def has_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0


WITHOUT_INTERFACES = pytest.param(
    ("unshare", "-rn"),
    marks=pytest.mark.skipif(not has_namespaces(), reason="this system gives no network namespaces"),
    id="no interfaces",
)


@pytest.mark.parametrize("before", [pytest.param((), id="hook"), WITHOUT_INTERFACES])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_need_no_network(place: Place, name: str, before: tuple[str, ...], tmp_path: Path) -> None:
    arguments, stdin, printed = COMMANDS[name]
    arguments = [str(tmp_path / "out.jsonl") if argument == "OUT" else argument for argument in arguments]
    result = place.run(EDGELLM, *arguments, stdin=stdin, before=before)
    assert place.attempts == ""
    assert result.returncode == 0, result.stderr.decode()
    assert printed in result.stdout.decode()


def test_the_batch_and_the_receipt_are_whole(place: Place, tmp_path: Path) -> None:
    """Nothing was left out for want of a network."""
    out = tmp_path / "out.jsonl"
    assert place.run(EDGELLM, "batch", "tiny.gguf", "prompts.jsonl", "-o", str(out), "-n", "3").returncode == 0
    assert json.loads(out.read_text())["error"] is None
    inspected = json.loads(place.run(EDGELLM, "inspect", "tiny.gguf", "--json").stdout)
    assert "measured" in json.loads(inspected["metadata"]["edgellm.receipt.json"])["quality"]


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.gethostbyname(\"x\")'])",
    ],
)
def test_the_hook_catches_attempts(place: Place, code: str, tmp_path: Path) -> None:
    log = tmp_path / "attempts.log"
    watched = Place(tmp_path, {**place.environment, "NETWORK_LOG": str(log)})
    result = watched.run([sys.executable], "-c", code)
    assert log.read_text().startswith("NETWORK ")
    assert result.returncode == (0 if "subprocess" in code else TRIED)
    assert b"NETWORK" in result.stderr


@pytest.mark.skipif(not has_namespaces(), reason="this system gives no network namespaces")
def test_nothing_can_be_reached_without_interfaces() -> None:
    code = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=5)"
    result = subprocess.run(["unshare", "-rn", sys.executable, "-c", code], capture_output=True, check=False)
    assert b"Network is unreachable" in result.stderr

"""The command line as its users meet it: real processes, real files, every line that is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pexpect
import pytest

READY = r"\x1b\[\?2004h"  # the input line turns on bracketed paste when it is there
EDGELLM = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]


def edgellm(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*EDGELLM, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def only_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.stdout == b""
    text = result.stderr.decode()
    assert text.count("\n") == 1, text
    assert text.startswith("edgellm: ")
    return text


@pytest.fixture(scope="module")
def broken(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that llama.cpp would refuse, or abort on."""
    folder = tmp_path_factory.mktemp("broken")
    whole = model_path.read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "header-only.gguf").write_bytes(whole[:1000])
    (folder / "text.gguf").write_text("this is no model")
    (folder / "empty.gguf").write_bytes(b"")
    at = whole.index(b"<repo_name>")
    (folder / "duplicate.gguf").write_bytes(
        whole[:at] + b"<file_sep>x" + whole[at + 11 :].replace(b"<gh_stars>", b"<file_sep>", 1)
    )
    unknown = gguf.GGUFWriter(folder / "unknown.gguf", "no-such-architecture")
    unknown.add_tensor("x", np.zeros(32, np.float32))
    unknown.write_header_to_file()
    unknown.write_kv_data_to_file()
    unknown.write_tensors_to_file()
    unknown.close()
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "truncated"),
        ("header-only", ""),
        ("text", "not a GGUF"),
        ("empty", ""),
        ("duplicate", "<file_sep>"),
        ("unknown", "no-such-architecture"),
    ],
)
def test_bad_files_end_in_one_line_and_exit_code_3(
    broken: dict[str, Path], command: str, name: str, message: str
) -> None:
    result = edgellm(command, broken[name], *(["hi"] if command == "run" else []))
    assert message in only_line(result)
    assert f"{name}.gguf" in result.stderr.decode()
    assert result.returncode == 3


def test_no_such_model_and_a_folder(tmp_path: Path) -> None:
    for target in (tmp_path / "none.gguf", tmp_path):
        result = edgellm("run", target, "hi")
        assert str(target) in only_line(result)
        assert result.returncode == 3


def test_context_full_is_one_line_and_exit_code_1(model_path: Path) -> None:
    result = edgellm("run", model_path, "word " * 200, "--n-ctx", "64")
    assert "the context holds 64" in only_line(result)
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "MODEL", "hi", "--temperature", "-1"], "temperature is -1.0; it takes 0 or more"),
        (["run", "MODEL", "hi", "--load-mode", "fast"], "mmap, repack or mlock"),
        (["run", "MODEL", "hi", "-n", "many"], "-n"),
        (["run", "MODEL", "hi", "--raw", "--system", "x"], "--system"),
        (["run", "MODEL"], "prompt is empty"),
        (["chat", "MODEL", "--top-p", "2"], "top_p is 2.0"),
        (["fly"], "fly"),
    ],
)
def test_usage_errors_exit_2_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    result = edgellm(*arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert message in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


def test_debug_shows_the_traceback_wherever_it_stands(broken: dict[str, Path]) -> None:
    for arguments in (["--debug", "run", broken["text"], "hi"], ["run", broken["text"], "hi", "--debug"]):
        result = edgellm(*arguments)
        assert "Traceback" in result.stderr.decode()
        assert result.returncode == 3


def test_drafts_are_chosen_by_name_and_change_no_answer(model_path: Path) -> None:
    def answer(*options: str) -> dict[str, object]:
        text = "Write a list of ten fruits, then the same list again."
        arguments = ["run", model_path, text, "-n", "60", "--temperature", "0", "--json", *options]
        document: dict[str, object] = json.loads(edgellm(*arguments).stdout)
        return document

    plain, guessed = answer("--draft", "off"), answer("--draft", "ngram")
    assert plain["stats"]["drafted"] == 0  # type: ignore[index]
    assert str(guessed["text"])[:40] == str(plain["text"])[:40]


def test_a_draft_that_is_missing_or_damaged_is_one_line(model_path: Path, broken: dict[str, Path]) -> None:
    for draft in (Path("none.gguf"), broken["text"], broken["truncated"]):
        result = edgellm("run", model_path, "hi", "--draft", draft)
        assert draft.name in only_line(result)
        assert result.returncode == 3


def test_the_answer_alone_is_on_stdout(model_path: Path) -> None:
    result = edgellm("run", model_path, "Say hello.", "-n", "400", "--temperature", "0")
    assert result.returncode == 0
    assert result.stdout.endswith(b"\n")
    assert len(result.stdout.strip()) > 3
    assert result.stderr == b""


def test_prompt_from_a_pipe_and_json(model_path: Path) -> None:
    arguments = ["run", model_path, "-n", "6", "--temperature", "0", "--json", "--raw"]
    result = edgellm(*arguments, stdin="Once upon a time, é".encode())
    document = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1
    assert document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == document["stats"]["completion_tokens"] == 6
    assert document["usage"]["total_tokens"] == document["usage"]["prompt_tokens"] + 6
    again = edgellm("run", model_path, "Once upon a time, é", *arguments[2:])
    assert json.loads(again.stdout)["text"] == document["text"] != ""


def test_a_seed_makes_run_repeatable(model_path: Path) -> None:
    def answer(seed: str) -> bytes:
        options = ["--raw", "-n", "12", "--temperature", "1.5", "--seed", seed]
        return edgellm("run", model_path, "My favourite animal is", *options).stdout

    assert answer("3") == answer("3") != answer("4")


def test_a_reader_that_goes_away_is_no_traceback(model_path: Path) -> None:
    command = [*EDGELLM, "run", str(model_path), "Count to a hundred.", "-n", "300"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_run_stops_at_once_with_130(model_path: Path) -> None:
    command = [*EDGELLM, "run", str(model_path), "Once upon a time", "--raw", "-n", "900"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    assert process.wait(60) == 130
    assert time.perf_counter() - started < 5
    assert b"Traceback" not in process.stderr.read()


PROBE = """
import sys
sys.argv = ["edgellm", *sys.argv[1:]]
from edgellm.cli.main import run_command
code = run_command(sys.argv[1:])
print("LOADED", *(name for name in ("numpy", "llama_cpp", "llama_cpp.llama_cpp", "torch", "jinja2", "rich",
      "prompt_toolkit", "asyncio", "converters") if name in sys.modules))
"""


def loaded_by(*arguments: str | Path) -> set[str]:
    command = [sys.executable, "-c", PROBE, *map(str, arguments)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    return set(result.stdout.decode().rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["chat", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & {"numpy", "llama_cpp", "llama_cpp.llama_cpp", "torch", "jinja2", "converters"}


def test_run_loads_only_what_it_needs(model_path: Path) -> None:
    assert loaded_by("run", model_path, "hi", "-n", "1", "--raw") <= {"llama_cpp.llama_cpp", "rich"}
    assert loaded_by("run", model_path, "hi", "-n", "1") <= {"llama_cpp.llama_cpp", "jinja2", "asyncio", "rich"}


def test_llama_cpp_can_still_be_imported_after_us(model_path: Path) -> None:
    code = f"""
import edgellm
model = edgellm.load({str(model_path)!r}, edgellm.LoadParams(n_ctx=64))
from llama_cpp import Llama, llama_cpp
from edgellm.native import library
assert library.load() is llama_cpp
assert model.complete("Hello", edgellm.SamplingParams(max_tokens=2)).token_ids
other = Llama({str(model_path)!r}, n_ctx=64, verbose=False)
assert other.create_completion("Hello", max_tokens=2)["choices"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("ending", ["", "thread", "stream", "raise"])
def test_leaving_without_close_does_not_crash(model_path: Path, ending: str) -> None:
    code = f"""
import edgellm, threading, time
model = edgellm.load({str(model_path)!r}, edgellm.LoadParams(n_ctx=512))
endless = edgellm.SamplingParams(max_tokens=400)
if {ending!r} == "thread":
    threading.Thread(target=model.complete, args=("Once upon a time", endless), daemon=True).start()
    time.sleep(0.2)
else:
    stream = model.generate("Once upon a time", endless)
    next(stream)
if {ending!r} == "raise":
    raise SystemExit(7)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert result.returncode == (7 if ending == "raise" else 0), result.stderr
    assert b"Fatal" not in result.stderr


def test_chat_in_a_pipe_takes_lines_as_turns_and_commands(model_path: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.json"
    lines = [
        "Say hello.",
        "",
        "/nonsense",
        "/sett",
        "/set temperature 0",
        "/set temperature hot",
        "/set wings 2",
        "/stats",
    ]
    lines += [f"/save {session}", "/undo", "/undo", "/regen", f"/load {session}", "/system Be brief.", "/exit", "never"]
    result = edgellm("chat", model_path, "-n", "8", "--temperature", "0", stdin="\n".join(lines).encode())
    printed = result.stderr.decode()
    assert result.stdout.count(b"\n") == 1  # one answer
    for line in (
        "no command /nonsense; /help lists the commands",
        "no command /sett; did you mean /set?",
        "temperature = 0.0",
        "not set: temperature takes a number, not 'hot'",
        "no setting 'wings'; there are max_tokens, temperature",
        "prompt tokens read",
        "taken back: Say hello.",
        "nothing to take back",
        "edgellm: there is nothing to answer again yet",
        "2 messages loaded",
        "system: Be brief.",
    ):
        assert line in printed
    assert [m["role"] for m in json.loads(session.read_bytes().splitlines()[0])["messages"]] == ["user", "assistant"]
    assert result.returncode == 1  # a command failed, as scripts want to know


def test_chat_in_a_pipe_goes_on_after_a_turn_that_does_not_fit(model_path: Path) -> None:
    turns = "word " * 300 + "\nSay hello.\n"
    result = edgellm("chat", model_path, "--n-ctx", "128", "-n", "8", stdin=turns.encode())
    assert "the context holds 128" in result.stderr.decode()
    assert len(result.stdout.strip()) > 0
    assert result.returncode == 1


@pytest.fixture
def terminal(model_path: Path, tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    arguments = [*EDGELLM[1:], "chat", str(model_path), "--temperature", "0", "-n", "600"]
    child = pexpect.spawn(EDGELLM[0], arguments, env=environment, encoding="utf-8", timeout=90, dimensions=(40, 120))
    child.expect("Ctrl-D leaves")
    child.expect(READY)
    yield child
    child.close(force=True)


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
def test_ctrl_c_stops_the_answer_and_the_session_goes_on(terminal: pexpect.spawn[str]) -> None:
    terminal.send("Tell me a very long story about a fox and a crow.\r")
    terminal.expect(r"\?2004l")  # the line is taken: what follows is no echo of it
    terminal.expect(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}")
    terminal.sendintr()
    terminal.expect(r"\[stopped\]")
    terminal.expect("tok/s")
    terminal.expect(READY)
    terminal.send("/stats\r")
    terminal.expect("first token")
    terminal.expect(READY)
    terminal.send("half a line")
    terminal.sendintr()  # clears the line
    terminal.send("/exit\r")
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
@pytest.mark.parametrize("key", ["d", "c"])
def test_ctrl_d_and_ctrl_c_on_an_empty_line_leave(terminal: pexpect.spawn[str], key: str) -> None:
    terminal.sendcontrol(key)
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0

"""Drafts by distillation, on tiny models: blocks, the forward pass, training, resuming, Ctrl-C, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import converters
import edgellm
from converters.drafts import student as student_module
from converters.drafts.distil import distil
from converters.drafts.labels import Labelled, label, pack, unpack, windows
from converters.drafts.prune import choose_blocks, family_of, open_base, prune, silent_blocks
from converters.drafts.state import State, save_state, state_path
from converters.drafts.student import Student
from converters.drafts.train import Limits, Training
from converters.forward import forward
from converters.sources import open_source
from edgellm.errors import CheckpointError, OutputError, TextError, UnsupportedArchitecture
from edgellm.gguf_header import read_header
from edgellm.measure.passages import Passage
from tests.converters import tiny

N_BLOCKS = 6
TEXT = "\n\n".join(
    f"The {animal} sees the {thing}, and then it goes home again, {n} times."
    for n, (animal, thing) in enumerate(
        [(a, b) for a in ("fox", "bear", "owl", "hare") for b in ("moon", "river", "hill")]
    )
    for _ in range(4)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six blocks, the third and the fifth of which do nothing."""
    folder = tmp_path_factory.mktemp("models") / "six"
    model = tiny.make_model(folder, vocab_size=1000, num_hidden_layers=N_BLOCKS, tie_word_embeddings=True)
    with torch.no_grad():
        for i in (2, 4):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    out = folder.parent / "six.gguf"
    converters.convert(folder, out, quant="F32")
    return out


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder.parent / "text.txt"
    path.write_text(TEXT)
    return path


def labelled(gguf: Path) -> list[Labelled]:
    rng = np.random.default_rng(0)
    passages = [Passage(rng.integers(3, 1000, 40).tolist(), 1, is_text=True) for _ in range(12)]
    return label(gguf, windows(passages))


def new_training(gguf: Path, seed: int = 3) -> Training:
    found = labelled(gguf)
    return Training(Student(prune(open_base(gguf), [0, 1, 3])), found[2:], found[:2], seed)


def weights_of(training: Training) -> dict[str, Any]:
    return student_module.as_arrays(training.student.weights)


def nothing(training: Training, done: float) -> None:
    pass


def test_blocks_kept_are_the_ends_and_some_between() -> None:
    assert choose_blocks(range(30), 6) == [0, 1, 8, 21, 28, 29]
    assert choose_blocks(range(30), 2) == [0, 29]
    assert choose_blocks([0, 6, 12, 18], 4) == [0, 6, 12, 18]
    with pytest.raises(ValueError, match="has 4 blocks"):
        choose_blocks(range(4), 5)


def test_silent_blocks_are_noticed(folder: Path, gguf: Path) -> None:
    for path in (folder, gguf):
        base = open_base(path)
        assert silent_blocks(base, family_of(base)) == {2, 4}


def test_a_pruned_model_of_all_blocks_that_do_something_is_the_model(folder: Path, gguf: Path) -> None:
    """In torch over four blocks, in numpy over the whole checkpoint."""
    tokens = list(range(5, 45))
    expected = forward(open_source(folder), tokens)
    for path in (folder, gguf):
        student = Student(prune(open_base(path), [0, 1, 3, 5]))
        with torch.no_grad():
            logits = student.logits(student.hidden(torch.tensor([tokens])))[0]
        assert np.abs(logits.numpy() - expected).max() < 1e-3


def test_labels_are_the_targets_likeliest_tokens(folder: Path, gguf: Path) -> None:
    tokens = list(range(7, 47))
    (found,) = label(gguf, windows([Passage(tokens, 30)]))
    assert found.first == 29
    logits = forward(open_source(folder), tokens)[29:]
    assert (found.top[:, 0] == logits.argmax(1)).all()
    again = unpack(pack([found, found]))[1]
    assert again.first == 29
    assert (again.top == found.top).all()
    assert (again.log_probs == found.log_probs).all()


def test_nothing_to_learn_is_an_error(gguf: Path) -> None:
    with pytest.raises(TextError, match="nothing of the model's own"):
        label(gguf, windows([Passage([1, 2, 3], 3)]))


def test_divergence_falls_and_the_best_is_kept(gguf: Path) -> None:
    training = new_training(gguf)
    progress = training.run(Limits(1e9, steps=60, trial_every=20), nothing)
    assert progress.ended == "steps"
    assert progress.step == 60
    assert [trial.step for trial in progress.trials] == [0, 20, 40, 60]
    assert progress.trials[-1].trained < 0.8 * progress.trials[1].trained
    assert progress.best.agreement == max(trial.agreement for trial in progress.trials)


def test_the_sampled_softmax_is_nearly_the_whole_one(gguf: Path) -> None:
    """With more samples than tokens it is the whole one: what stands for others then weighs nothing."""
    training = new_training(gguf)
    batch = training._batch()
    with torch.no_grad():
        sampled = float(training._loss(batch))
        logits = training.student.logits(training._hidden(batch))
        top = torch.from_numpy(np.concatenate([one.top for one in batch]).astype(np.int64))
        p = torch.from_numpy(np.concatenate([one.log_probs for one in batch])).log_softmax(-1)
        q = logits.log_softmax(-1).gather(1, top)
    assert sampled == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)


def test_interrupted_and_resumed_is_the_same(gguf: Path, tmp_path: Path) -> None:
    limits = Limits(1e9, steps=12, trial_every=4)
    whole = new_training(gguf)
    whole.run(limits, nothing)

    first = new_training(gguf)

    def interrupt(training: Training, done: float) -> None:
        if training.progress.step == 7:
            raise KeyboardInterrupt

    assert first.run(limits, interrupt).ended == "interrupted"
    found = labelled(gguf)
    save_state(tmp_path / "state", "me", found[2:], found[:2], first)
    state = State(tmp_path / "state", "me")
    learned, tried = state.labels
    second = Training(Student(prune(open_base(gguf), [0, 1, 3])), learned, tried, 3)
    state.restore(second)
    second.run(limits, nothing)
    for name, values in weights_of(whole).items():
        assert np.array_equal(values, weights_of(second)[name]), name
    assert [t.agreement for t in whole.progress.trials] == [t.agreement for t in second.progress.trials]


def test_a_state_of_something_else_is_refused(gguf: Path, tmp_path: Path) -> None:
    training, found = new_training(gguf), labelled(gguf)
    save_state(tmp_path / "state", "me", found, found, training)
    with pytest.raises(OutputError, match="another model"):
        State(tmp_path / "state", "you")
    with pytest.raises(OutputError, match="go on from"):
        State(tmp_path / "none", "me")
    data = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(data[: len(data) // 2])
    with pytest.raises(OutputError, match="damaged"):
        State(tmp_path / "state", "me")


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_a_draft_is_written_measured_and_used(kind: str, folder: Path, gguf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft.gguf"
    source, target = (folder, None) if kind == "checkpoint" else (gguf, None)
    made = distil(source, out, n_blocks=3, text=text, target=target, n_steps=30, max_tokens=16, n_prompts=3)
    assert made.blocks == [0, 3, 5] or made.blocks == [0, 1, 5]
    assert made.n_silent == 2
    assert made.target == (gguf if kind == "gguf" else None)
    assert made.progress.trials[-1].loss < made.progress.trials[0].loss
    header = read_header(out)
    assert header.metadata["llama.block_count"] == 3
    assert header.metadata["edgellm.draft_of"] == source.name
    assert json.loads(header.metadata["edgellm.distillation"])["blocks"] == made.blocks
    assert {path.name for path in tmp_path.iterdir()} == {"draft.gguf"}
    with edgellm.load(gguf, edgellm.LoadParams(n_ctx=128)) as model:
        done = model.complete("The fox", edgellm.SamplingParams(max_tokens=12), draft=[out])
        assert done.stats.completion_tokens == 12


def test_ctrl_c_keeps_the_best_so_far_and_resume_goes_on(gguf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft.gguf"
    options: dict[str, Any] = {"n_blocks": 3, "text": text, "n_steps": 16, "max_tokens": 8, "n_prompts": 2}

    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith("agrees") and done > 400:
            raise KeyboardInterrupt

    made = distil(gguf, out, **options, on_progress=interrupt)
    assert made.progress.ended == "interrupted"
    assert out.exists()
    assert state_path(out).exists()
    again = distil(gguf, out, **options, resume=True)
    assert again.progress.ended == "steps"
    assert again.progress.step == 16
    assert not state_path(out).exists()


def test_families_that_cannot_be_trained_say_why(folder: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    spoiled = copy_of(folder)
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(
        json.dumps(config | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 32})
    )
    with pytest.raises(UnsupportedArchitecture, match="make a draft from text"):
        distil(spoiled, tmp_path / "draft.gguf", n_blocks=2)
    assert list(tmp_path.glob("draft*")) == []


def test_without_torch_it_says_what_to_install(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install .edgellm\[torch\]"):
        distil(gguf, tmp_path / "draft.gguf", n_blocks=2)

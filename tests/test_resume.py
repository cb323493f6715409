"""Nothing is lost: a run that was stopped, killed or out of disk goes on exactly where it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import mincse
from engine import run_folder
from engine.flags import program as with_exit_code

HERE = Path(__file__).parent

def bits(folder):
    return (folder / "model.safetensors").read_bytes()


def log(folder, *without):
    """metrics.jsonl but for the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("sentences_per_second", *without)}
            for line in lines]


# ---- going on: that every paper does, bit by bit, is in test_papers.py -----------------------

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_either_signal_saves_the_state_and_has_its_exit_code(
        number, code, program, stopped, monkeypatch, capsys, tmp_path):
    raise_signal = signal.raise_signal
    monkeypatch.setattr(signal, "raise_signal", lambda _: raise_signal(number))
    assert stopped(2, program) == code
    assert capsys.readouterr().err.rstrip().endswith("--resume")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["state"]["step"] == 2


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def change_encoder(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1e-6
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("flag, change", [
    ("--corpus", lambda own: edit(own["corpus"], "a cat digs", "a cat dug")),
    ("--test", lambda own: edit(own["test"], "4.8", "4.9")),
    ("--encoder", lambda own: change_encoder(own["encoder"])),
    ("--teacher", lambda own: numpy.save(own["teacher"], numpy.load(own["teacher"]) + 1)),
])
def test_what_a_name_stands_for_must_not_have_changed(
        flag, change, program, stopped, tiny, sentences, pairs, tmp_path, capsys):
    own = {"encoder": shutil.copytree(tiny, tmp_path / "own"),
           "corpus": shutil.copy(sentences, tmp_path / "own.txt"),
           "test": shutil.copy(pairs, tmp_path / "own.tsv"), "teacher": tmp_path / "own.npy"}
    numpy.save(own["teacher"], numpy.ones((64, 8), numpy.float32))
    stopped(2, program, method="kdmcse", **own)
    change(own)
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        program("--resume", method="kdmcse", **own)
    said = capsys.readouterr().err
    assert refused.value.code == 2 and f"was started with another {flag} of the same name" in said


@pytest.mark.parametrize("setting", [
    {"method": "sscl", "layers_as_negatives": 1}, {"loss": "focal"}, {"positives": "crop"},
    {"batch_size": 4}, {"steps": 5}, {"seed": 1}, {"learning_rate": .1}, {"max_tokens": 9},
    {"dropout": 0.}, {"dev_every": 2}, {"precision": "bf16"}, {"pooling": "mean"}], ids=str)
def test_a_setting_that_changes_the_numbers_is_named(setting, program, stopped, capsys):
    stopped(2, program)
    with pytest.raises(SystemExit) as refused:
        program("--resume", **setting)
    flag = "--" + next(iter(setting)).replace("_", "-")
    assert refused.value.code == 2
    assert re.search(f"was started with {flag} .*, found ", capsys.readouterr().err)


def test_a_run_that_had_more_settings_than_there_are_today_goes_on(
        program, stopped, tmp_path):
    whole = program(out="whole", steps=6)
    stopped(3, program, steps=6)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    args["config"] |= {"clusters": 0, "order": "in-turn", "teacher": ""}
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    assert bits(program("--resume", steps=6)) == bits(whole)


def test_a_state_of_another_version_is_left_alone_and_named(program, stopped, tmp_path, capsys):
    """A version in which a tensor had another name or shape."""
    stopped(3, program, steps=6)
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    state["networks"]["former"] = state["networks"].popitem()[1]
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as refused:
        program("--resume", steps=6)
    assert refused.value.code == 3 and path.read_bytes() == before
    assert "go on with the version of mincse that saved it, or start again" in (
        capsys.readouterr().err)


def test_a_state_for_which_there_is_no_memory_is_not_called_damaged(
        program, stopped, monkeypatch, tmp_path):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    stopped(2, program)
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="state.pt was read"):
        patch.setattr(torch, "load", no_memory)
        program("--resume")
    assert (program("--resume") / "results.json").exists()


def test_a_run_may_go_on_with_other_threads(program, stopped):
    stopped(2, program)
    assert (program("--resume", threads=1) / "results.json").exists()


# ---- killed ---------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children of kill.py are forked")
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_happened():
    done = subprocess.run([sys.executable, HERE / "kill.py", "--times", "3"], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"3 kills: [123] runs ended as one that nobody disturbed\n", done.stdout)


def test_a_model_that_the_state_does_not_know_of_never_takes_the_place_of_the_best(
        program, stopped, monkeypatch, tmp_path):
    """Killed between the two: the model of step 4 waits, and the state still is that of step 2."""
    def save_or_die(folder, state, *rest):
        if state.step == 4:
            raise KeyboardInterrupt
        saved(folder, state, *rest)

    flags, saved, out = {"steps": 6, "dev_every": 2}, run_folder.save_state, tmp_path / "run"
    monkeypatch.setattr(mincse, "SAVE_EVERY", 0)
    whole = program(out="whole", **flags)
    stopped(2, program, out="two", **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "save_state", save_or_die)
        program(**flags)
    assert (out / ".best-4").exists() and bits(out) == bits(tmp_path / "two") != bits(whole)
    assert bits(program("--resume", **flags)) == bits(whole)
    assert not list(out.glob(".best-*"))


@pytest.mark.parametrize("every, saved", [(0, [0, 2, 4, 6]), (600, [0, 6])])
def test_a_state_is_saved_before_the_first_step_by_time_and_after_the_last_one(
        every, saved, program, pairs, monkeypatch):
    """Not at every dev score: for bert-base a state takes 1.3 GB."""
    steps, save = [], run_folder.save_state
    monkeypatch.setattr(mincse, "SAVE_EVERY", every)
    monkeypatch.setattr(run_folder, "save_state",
                        lambda folder, state, *rest: steps.append(state.step) or save(
                            folder, state, *rest))
    program(steps=6, dev=pairs, dev_every=2)
    assert steps == saved


def test_killed_between_two_saves_a_run_finds_the_better_model_again(
        program, pairs, monkeypatch, tmp_path):
    """At step 5 the state is that of step 0; the best models of steps 2 and 4 wait or are gone."""
    def add_or_die(log, loss, **facts):
        if facts["step"] == 5:
            raise KeyboardInterrupt
        add(log, loss, **facts)

    flags, out, add = {"steps": 6, "dev": pairs, "dev_every": 2, "pooling": "mean",
                       "learning_rate": 1e-3}, tmp_path / "run", run_folder.Log.add
    whole = program(out="whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Log, "add", add_or_die)
        program(**flags)
    assert len(list(out.glob(".best-*"))) == 1 and not (out / "model.safetensors").exists()
    assert bits(program("--resume", **flags)) == bits(whole) and log(out) == log(whole)
    assert not list(out.glob(".best-*"))


def test_a_model_that_the_state_calls_the_best_is_put_in_its_place_even_if_half_of_it_was(
        program, stopped, tmp_path):
    """Killed while the files of step 4 took their places one after another."""
    flags, out = {"steps": 6, "dev_every": 2}, tmp_path / "run"
    stopped(4, program, **flags)
    four = bits(out)
    (out / ".best-4" / "1_Pooling").mkdir(parents=True)
    for name in ("model.safetensors", "1_Pooling/config.json"):
        (out / name).rename(out / ".best-4" / name)
    (out / "model.safetensors").write_bytes(b"that of step 2")
    run_folder.clear_after(out, run_folder.State(step=4, best_step=4))
    assert bits(out) == four and (out / "1_Pooling" / "config.json").exists()


def test_lines_of_a_run_that_was_killed_before_its_first_state_come_once(program, tmp_path):
    whole = program(out="whole", steps=12)
    assert [line["step"] for line in log(whole)] == [10, 12]
    early = tmp_path / "run"
    early.mkdir()
    for name in ("args.json", "env.json"):
        shutil.copy(whole / name, early)
    edit(early / "args.json", str(whole), str(early))
    (early / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + '{"step": 13, "l')
    assert log(program("--resume", steps=12)) == log(whole)


def test_a_run_killed_while_it_wrote_its_first_file_begins_again(program, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json.tmp").write_text('{"comm')
    assert (program() / "results.json").exists()


def test_overwriting_leaves_no_model_of_the_run_before(program, stopped, pairs, tmp_path):
    before = (program() / "model.safetensors").read_bytes()
    stopped(2, program, "--overwrite", seed=7, dev=pairs)         # before the first dev score
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


# ---- a full disk ----------------------------------------------------------------------------

@pytest.mark.parametrize("room", [100, 30_000, 3_000_000], ids=["log", "model", "state"])
def test_a_full_disk_ends_with_one_sentence_and_the_last_state_whole(
        room, program, stopped, tmp_path, capsys, pairs):
    """No file may grow beyond `room` bytes: first metrics.jsonl, the model, or state.pt fails."""
    resource = pytest.importorskip("resource")
    flags = {"steps": 8, "dev": pairs, "dev_every": 2, "pooling": "mean", "learning_rate": 1e-3}
    whole = program(out="whole", **flags)
    stopped(5, program, **flags)
    out = tmp_path / "run"
    before = {path: path.read_bytes() for path in out.rglob("*")
              if path.is_file() and path.name != "metrics.jsonl"}
    again = partial(program, "--resume", **flags)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code = with_exit_code(again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 1 and "not written (File too large); what was saved before stands" in said
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(out.glob("*.tmp"))
    assert bits(again()) == bits(whole)
    assert log(out, "loss") == log(whole, "loss")

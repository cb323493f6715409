"""How every program behaves, whatever it does: signals, pipes, letters, flags, exit codes."""

import argparse
import ast
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import eval_sts
import papers
from conftest import ROOT, resolved
from engine import flags
from engine.encoders import load
from engine.hub import unpack

PROGRAMS = [["mincse.py"], ["eval_sts.py"], ["-m", "papers.sparsecse"], ["-m", "claims"],
            *(["-m", f"tools.{path.stem}"] for path in sorted((ROOT / "tools").glob("*.py")))]


def raises(error):
    def main():
        raise error
    return main


# ---- signals, pipes and letters -------------------------------------------------------------

@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_control_c_while_torch_is_imported_ends_a_program_without_a_word(program, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_module_that_is_only_imported_leaves_control_c_as_it_is():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("main, again, code, said", [
    (raises(KeyboardInterrupt()), "", 130, "interrupted\n"),
    (raises(KeyboardInterrupt()), "--resume", 130, "interrupted; go on with:\n  python"),
    (raises(OSError("disk full")), "", 1, "disk full; what was saved before stands\n"),
    (raises(ImportError("No module named 'scipy'")), "", 1, "'scipy': pip install -U -r requ"),
    (lambda: None, "", 0, "")])
def test_what_ends_a_program_gets_one_sentence_and_an_exit_code(main, again, code, said, capsys):
    assert flags.program(main, again) == code
    assert said in (found := capsys.readouterr().err) and "Traceback" not in found


@pytest.mark.parametrize("main", [
    lambda: print("enough"), lambda: argparse.ArgumentParser().parse_args(["--help"])])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_ends_a_program_quietly(name, main, monkeypatch):
    """As the shell says it of those that die by SIGPIPE: 128 + 13."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, name, stream)
        assert flags.program(main) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_below_the_output_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert flags.program(lambda: print("text")) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_without_any_output_a_program_still_works(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert flags.program(lambda: sys.stderr.write("to nobody")) == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_letters_that_a_console_lacks_are_escaped(encoding, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    assert flags.program(lambda: print("corpus 日.txt caf\udce9")) == 0
    shown = "日" if encoding == "utf-8" else r"\u65e5"
    assert console.buffer.getvalue().decode(encoding) == f"corpus {shown}.txt caf\\udce9\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name must be Unicode")
def test_names_need_not_be_utf_8(program, sentences, pairs, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    odd.write_bytes(sentences.read_bytes())
    folder = program(corpus=odd, out=os.fsdecode(b"run\xe9"))
    assert json.loads((folder / "args.json").read_bytes())["config"]["corpus"] == str(odd)
    assert load(folder).pooling == "cls" and r"caf\udce9.txt" in (folder / "README.md").read_text()


def opens_text(call):
    """Does it open a file as text? Of `open`, a mode with b does not."""
    name, owner = getattr(call.func, "attr", ""), ast.unparse(getattr(call.func, "value", call))
    binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args)
    return (name in ("read_text", "write_text") or owner not in ("os", "tarfile") and not binary
            and "open" in (name, getattr(call.func, "id", "")))


def test_an_older_python_which_cannot_unpack_safely_is_told_so(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ValueError, match="expected Python 3.10.12, 3.11.4 or newer"):
        unpack(tmp_path / "senteval.tar", tmp_path / "out")


def test_every_text_file_is_opened_as_utf_8():
    """What reads with the letters of the machine reads a corpus differently on the next one."""
    calls = {ast.unparse(node) for folder in (".", "engine", "papers", "tools", "claims")
             for path in (ROOT / folder).glob("*.py")
             for node in ast.walk(ast.parse(path.read_text("utf-8")))
             if isinstance(node, ast.Call) and opens_text(node)}
    assert len(calls) > 5 and not {call for call in calls if "utf-8" not in call}


# ---- flags ----------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, flag", [
    ("--batch_size", "--batch-size"), ("--lr", "--learning-rate"), ("--bs", "--batch-size"),
    ("--per_device_train_batch_size", "--batch-size"), ("--num_train_epochs", "--epochs"),
    ("--max_seq_length", "--max-tokens"), ("--model_name_or_path", "--encoder"),
    ("--output_dir", "--out"), ("--train_file", "--corpus"), ("--temp", "--temperature"),
    ("--pooler_type", "--pooling"), ("--eval-every=5", "--dev-every"), ("-lr", "--learning-rate"),
    ("--cuda", "--device"), ("--fp16", "--precision"), ("--Dropout", "--dropout"),
    ("--retreived", "--retrieved"), ("--hard_negative_weight", "--hard-negative-weight")])
def test_a_wrong_flag_is_answered_with_the_flag_that_was_meant(typed, flag, capsys):
    with pytest.raises(SystemExit) as refused:
        papers.parse([typed, "32"])
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.endswith(f"instead of {typed}, did you mean {flag}?\n")


def test_a_flag_like_no_other_gets_no_advice_and_every_program_answers(capsys):
    for typed, said in (["--x"], "arguments: --x\n"), (["--batch"], "did you mean --batch-size?\n"):
        with pytest.raises(SystemExit):
            eval_sts.parse(["mini", *typed])
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("text, seeds", [
    ("0-4", [0, 1, 2, 3, 4]), ("0,1,2", [0, 1, 2]), ("7", [7]), ("0-2,9,1", [0, 1, 2, 9])])
def test_seeds_are_a_range_a_list_or_both(text, seeds):
    assert papers.parse(["--seeds", text]).seeds == seeds


@pytest.mark.parametrize("given, test", [
    ({"dev": "my.tsv"}, "my.tsv"), ({"dev": "my.tsv", "test": "docs"}, "docs"),
    ({"dev": "stsb"}, "stsb"), ({"dev": "none"}, "docs"), ({}, "docs")])
def test_dev_pairs_are_the_test_too_where_no_other_is_given(given, test):
    assert resolved(**given).test == test


# ---- what a run leaves ----------------------------------------------------------------------

def test_scores_on_the_pairs_that_chose_the_checkpoint_say_so(program, pairs):
    own = program(dev=pairs, test=None)
    assert json.loads((own / "results.json").read_bytes())["test"].keys() == {"pairs", "avg"}
    other = program(dev=pairs, test="docs", out="other")
    said = ["The pairs of the test also chose the checkpoint" in (run / "results.md").read_text()
            for run in (own, other)]
    assert said == [True, False]


def test_control_c_before_the_first_dev_score_leaves_the_last_model(program, stopped, pairs):
    """Which the run forgets as it goes on, and ends with the bits of one that nobody stopped."""
    whole = program(dev=pairs, dev_every=3, out="whole")
    assert stopped(1, program, dev=pairs, dev_every=3) == 130
    folder = whole.with_name("run")
    assert load(folder).pooling == "cls"
    assert not torch.equal(*(load(run).encoder.words.weight for run in (folder, whole)))
    program("--resume", dev=pairs, dev_every=3)
    for name in ("model.safetensors", "results.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()

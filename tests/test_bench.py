"""The benchmark prints its table; what the numbers are depends on the machine."""

import os
import threading
from multiprocessing import Pipe

import torch

from data import Tokenizer
from eval_sts import open_encoder
from tools import bench

SMALL = ("--turns 1 --steps 1 --sentences 24 --batch-size 4 --threads 1 --device cpu "
         "--precision fp32").split()


def test_the_table_has_sentence_transformers_beside_us_if_installed(tiny, capsys):
    bench.main(["--encoder", str(tiny), "--only", "encode", *SMALL])
    machine, *lines = capsys.readouterr().out.splitlines()
    what, name, ours, memory, *theirs = [cell.strip() for cell in lines[-1].strip("| ").split("|")]
    assert "1 thread(s), torch" in machine and (what, name) == ("encode, same", "tiny")
    assert int(ours) > 0 and memory.endswith("GiB")
    if bench.they_are_here("encode"):
        assert int(theirs[0]) > 0 and theirs[1].endswith("GiB") and float(theirs[2]) > 0
    else:
        assert theirs == ["-"] * 3


def test_training_has_a_line_for_usual_and_same_and_one_for_a_paper_beside_simcse(
        tiny, sentences, monkeypatch):
    """Threads take the place of processes; KDMCSE needs a teacher."""
    class Context:
        Process = threading.Thread

        def Pipe(self):
            pipe, end = Pipe()
            end.close = lambda: None                              # a thread shares it
            return pipe, end

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Context())
    monkeypatch.setattr(bench, "they_are_here", lambda what: False)
    monkeypatch.setattr(bench.sys, "stdout", bench.sys.stdout)    # `play` sets it
    given = bench.parse(["--only", "train", *SMALL])
    task = bench.Task("train", True, tiny, sentences, given)
    rows = [bench.row_of(line) for line in bench.table_lines(task)]
    assert [row[0] for row in rows] == ["train, usual", "train, same"]
    for row in rows:
        assert int(row[2]) > 0 and row[4:] == ["-"] * 3
    row = bench.method_row("kdmcse", task)
    assert row[:2] == ["kdmcse", "tiny"] and int(row[2]) > 0 and float(row[4]) > 0
    row = bench.epoch_row(8, task)
    assert row[:2] == ["8", "tiny"] and row[3].endswith(" s") and 0 <= int(row[4][:-1]) <= 100


def test_a_shape_has_the_vocabulary_of_the_encoder_that_it_is_named_after(
        tmp_path, monkeypatch):
    small = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 24}
    monkeypatch.setitem(bench.SHAPES, "bert-base", bench.SHAPES["bert-base"] | small)
    model, tokenizer = open_encoder(bench.make_encoder("bert-base", tmp_path))
    assert len(model.encoder.words.weight) == tokenizer.vocab_size == 30522
    mini = Tokenizer.read(bench.ROOT / "mini")
    assert torch.equal(*(each(["an owl"], max_tokens=9)[0] for each in (mini, tokenizer)))


def test_on_a_gpu_a_large_shape_and_its_epoch_are_measured_unless_asked_otherwise():
    assert bench.parse(["--device", "cuda"]).encoder == ["bert-base"]
    assert bench.parse(["--device", "cuda:1", "--encoder", "mini"]).encoder == ["mini"]
    assert "epoch" in bench.parse(["--device", "cuda"]).only
    assert "epoch" not in bench.parse([]).only


def test_both_libraries_take_turns_and_the_median_counts(monkeypatch):
    """Processes are replaced by pipes with known times; the first stretch is warming up."""
    played = []

    class Side:
        def __init__(self, name, *times):
            self.recv = iter([9., *times, ("1 GiB", None)]).__next__
            self.send = lambda word: played.append((name, word))

    class Context:
        sides = iter([Side("ours", 1., 2., 6.), Side("theirs", 3., 8., 4.)])

        def Pipe(self):
            return next(self.sides), open(os.devnull)

        def Process(self, **_):
            return threading.Thread()

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Context())
    assert bench.compare(3, (print, None), (print, None)) == [(2., "1 GiB", None),
                                                              (4., "1 GiB", None)]
    assert [name for name, word in played if word == "go"] == ["ours", "theirs"] * 3

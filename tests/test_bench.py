"""The benchmark prints its table; what the figures are depends on the machine."""

import os

import pytest

import bench


def rows_of(encoder, capsys, *only):
    """The lines of the table that a tiny run prints, and what stands above it."""
    bench.main(["--encoder", str(encoder), "--only", *only, "--turns", "1", "--steps", "1",
                "--sentences", "24", "--batch-size", "4", "--threads", "1"])
    machine, *lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line]
    return machine, rows[2:]


def test_the_table_has_a_line_for_every_task_with_the_machine_named(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "they_are_here", lambda _: False)
    machine, rows = rows_of(tiny, capsys, "train")
    assert "1 thread, torch" in machine and "TFLOP/s" in machine
    assert [row[:2] for row in rows] == [["train, usual", "tiny"], ["train, same", "tiny"]]
    for row in rows:
        assert int(row[2]) > 0 and row[3].endswith("%") and row[4].endswith("GiB")
        assert row[5:] == ["-"] * 3


def test_beside_it_stand_the_figures_of_sentence_transformers(tiny, capsys):
    pytest.importorskip("sentence_transformers")
    _, [row] = rows_of(tiny, capsys, "encode")
    assert row[0] == "encode, same" and int(row[5]) > 0 and float(row[7]) > 0


def test_a_paper_has_a_line_with_its_time_against_simcse(tiny, capsys, monkeypatch):
    """KDMCSE needs a teacher, DebCSE draws its pairs before the first step."""
    monkeypatch.setattr(bench, "TIMED", ["kdmcse", "debcse"])
    _, rows = rows_of(tiny, capsys, "methods")
    assert [row[:2] for row in rows] == [["kdmcse", "tiny"], ["debcse", "tiny"]]
    for row in rows:
        assert int(row[2]) > 0 and row[3].endswith("GiB") and float(row[4]) > 0


def test_a_step_is_counted_two_operations_a_multiply_add():
    a, b = bench.torch.ones(3, 5), bench.torch.ones(5, 7)
    assert bench.flops_of(lambda: a @ b) == 2 * 3 * 5 * 7


def test_both_libraries_take_turns_and_the_median_counts(monkeypatch):
    """Processes are replaced by pipes with known times; the first stretch is warming up."""
    played = []

    class Pipe:
        def __init__(self, name, times):
            self.name, self.times = name, iter([*times, ("1 GiB", None)])

        def send(self, word):
            played.append((self.name, word))

        def recv(self):
            return next(self.times)

    class Context:
        sides = iter([("ours", [9., 1., 2., 6.]), ("theirs", [9., 3., 8., 4.])])

        def Pipe(self):
            return Pipe(*next(self.sides)), open(os.devnull)

        def Process(self, **_):
            return type("Process", (), {"start": lambda _: None, "join": lambda _: None})()

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Context())
    task = type("Task", (), {"turns": 3})()
    ours, theirs = bench.compare((print, task), (print, task))
    assert (ours.seconds, theirs.seconds) == (2., 4.)
    assert [name for name, word in played if word == "go"] == ["ours", "theirs"] * 3

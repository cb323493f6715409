"""The benchmark prints its table; what the numbers are depends on the machine."""

import os

from tools import bench


def rows_of(encoder, capsys, *only):
    """The lines of the table that a tiny run prints, and what stands above it."""
    bench.main(["--encoder", str(encoder), "--only", *only, "--turns", "1", "--steps", "1",
                "--sentences", "24", "--batch-size", "4", "--threads", "1", "--device", "cpu",
                "--precision", "fp32"])
    machine, *lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line]
    return machine, rows[2:]


def test_the_table_has_a_line_for_every_task_and_sentence_transformers_beside_it_if_installed(
        tiny, capsys, monkeypatch):
    here = bench.they_are_here("encode")
    monkeypatch.setattr(bench, "they_are_here", lambda what: here and what == "encode")
    machine, rows = rows_of(tiny, capsys, "train", "encode")
    assert "1 thread(s), torch" in machine
    assert [row[:2] for row in rows] == [["train, usual", "tiny"], ["train, same", "tiny"],
                                         ["encode, same", "tiny"]]
    for row in rows:
        assert int(row[2]) > 0 and row[3].endswith("GiB")
    assert rows[0][4:] == rows[1][4:] == ["-"] * 3
    if here:
        assert int(rows[2][4]) > 0 and rows[2][5].endswith("GiB") and float(rows[2][6]) > 0


def test_a_paper_has_a_line_with_its_time_against_simcse(tiny, capsys, monkeypatch):
    """KDMCSE needs a teacher."""
    monkeypatch.setattr(bench, "TIMED", ["kdmcse"])
    _, [row] = rows_of(tiny, capsys, "methods")
    assert row[:2] == ["kdmcse", "tiny"]
    assert int(row[2]) > 0 and row[3].endswith("GiB") and float(row[4]) > 0


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
            return type("Process", (), {"start": lambda _: None})()

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Context())
    assert bench.compare(3, (print, None), (print, None)) == [(2., "1 GiB", None),
                                                              (4., "1 GiB", None)]
    assert [name for name, word in played if word == "go"] == ["ours", "theirs"] * 3

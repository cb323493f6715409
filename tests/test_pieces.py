"""Pieces of a batch, and what ends a run: memory, a loss that is no number, collapse."""

import json
import os
import platform
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import mincse
from engine import pieces, run_folder
from engine.flags import program as with_exit_code
from engine.pieces import Pieces
from eval_sts import StsTest
from papers import METHODS
from papers.settings import Config


# ---- pieces ---------------------------------------------------------------------------------

def test_each_piece_is_encoded_twice_once_without_a_graph(given):
    """12 rows in two columns, 5 at a time: pieces of 10, 10 and 4 texts, then back from the end."""
    inputs = mincse.read_inputs(given(batch_size=12, micro_batch=5))
    job, seen = mincse.build(inputs, inputs.config), []
    job.model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    next(mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1))
    assert seen == [10, 10, 4, 4, 10, 10]


def test_pieces_differ_in_dropout_and_come_back_in_the_order_of_the_block():
    """Two columns of five rows, two rows at a time."""
    x = torch.arange(10.)[:, None].expand(10, 50).clone()
    torch.manual_seed(0)
    [same], [dropped] = (Pieces(2, 2)(f, x) for f in (
        lambda piece: [piece + 0], lambda piece: [torch.nn.functional.dropout(piece + 1, .5)]))
    assert torch.equal(same, x)
    kept = dropped != 0
    assert kept.float().mean() == pytest.approx(.5, abs=.1)
    assert not torch.equal(kept[[0, 5]], kept[[2, 7]])


def test_a_run_may_go_on_in_smaller_pieces(program, stopped):
    whole = program(out="whole", steps=6, dropout=0.)
    stopped(3, program, out="parts", steps=6, dropout=0.)
    parts = program("--resume", out="parts", steps=6, dropout=0., micro_batch=3)
    for name, expected in load_file(whole / "model.safetensors").items():
        found = load_file(parts / "model.safetensors")[name]
        assert torch.allclose(found, expected, atol=2e-4), name   # Adam divides by small numbers


# ---- training faults ------------------------------------------------------------------------

@pytest.fixture
def ended(program, tmp_path, capsys):
    """ended(...) -> the exit code of a run, the last line of its stderr, and its folder."""
    def run(**settings):
        code = with_exit_code(lambda: program(**{"dropout": 0.} | settings))
        return code, capsys.readouterr().err.splitlines()[-1], tmp_path / "run"
    return run


@pytest.fixture
def loss_at(monkeypatch):
    """loss_at(step, value): from that step on, the loss of SimCSE is times the value."""
    def change(step, value):
        loss = METHODS["simcse"].loss
        monkeypatch.setattr(METHODS["simcse"], "loss", lambda self, out: loss(self, out) * (
            value if out.step >= step else 1))
    return change


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_batch(
        ended, loss_at, sentences, value, monkeypatch):
    loss_at(7, float(value))
    monkeypatch.setattr(mincse, "SAVE_EVERY", 0)
    code, said, folder = ended(steps=20, learning_rate=.001, dev_every=5)
    assert code == 1
    assert said == (f"mincse.py: the loss is {value} at step 7: try a lower --learning-rate than "
                    f"0.0007; {folder}/bad-batch.json has the batch; earlier saves are kept")
    found = json.loads((folder / "bad-batch.json").read_text())
    lines = sentences.read_text().splitlines()
    assert found["step"] == 7 and found["loss"] == value
    assert found["rows"] == list(data.batches(64, 8, seed=42, epochs=1))[6]
    assert found["texts"] == [[lines[row]] for row in found["rows"]]
    assert torch.load(folder / "state.pt")["state"]["step"] == 5


def test_no_weights_are_saved_after_a_loss_that_is_no_number(ended, loss_at):
    """Not even by the signal that comes before the next look at the losses."""
    loss_at(3, float("nan"))
    taken, add = [], run_folder.Log.add

    def add_and_stop(log, loss, **facts):
        add(log, loss, **facts)
        taken.append(loss)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.Log, "add", add_and_stop)
        code, said, folder = ended(steps=20)
    assert code == 1 and "the loss is nan at step 3" in said
    assert torch.load(folder / "state.pt")["state"]["step"] == 0
    assert not (folder / "model.safetensors").exists()


def test_collapse_is_named_once(program, capsys):
    """Without dropout the [CLS] vectors of random weights are all the same."""
    program(steps=30, dropout=0.)
    assert re.findall("WARNING: collapse at step (.*): all", capsys.readouterr().err) == ["10"]


def test_collapse_is_a_matter_of_all_cosines_and_not_of_the_first_steps(tmp_path, capsys):
    alike = {"uniformity": -.01, "negative_cosine": .995, "lowest_positive_cosine": .995}
    for step, steps, figures, warned in [
            (10, 1000, alike, False), (100, 1000, alike, True), (100, 10**6, alike, True),
            (100, 1000, alike | {"negative_cosine": .98}, False),
            (100, 1000, alike | {"lowest_positive_cosine": .5}, False),
            (100, 1000, alike | {"uniformity": -.3}, False)]:
        log = run_folder.Log(tmp_path, 8)
        log.add(torch.tensor(1.), learning_rate=.1)
        log.warn_of_collapse(log.line(step, figures), steps)
        assert ("collapse" in capsys.readouterr().err) == warned


def no_memory_on_the_gpu(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def no_memory_for_the_processor():
    torch.empty(2**60, dtype=torch.uint8)


def fails_with(text):
    def fail():
        raise RuntimeError(text)
    return fail


@pytest.mark.parametrize("fails", [
    no_memory_on_the_gpu, fails_with("CUDA error: out of memory\nCompile with ..."),
    fails_with("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    no_memory_for_the_processor, lambda: [0] * 2**60],
    ids=["gpu", "driver", "cublas", "cpu", "python"])
@pytest.mark.parametrize("settings, said", [
    ({}, "out of memory with 8 rows of a column at a time: try --micro-batch 4, which"),
    ({"micro_batch": 6}, "with 6 rows of a column at a time: try --micro-batch 3,"),
    ({"micro_batch": 1}, "with 1 row of a column at a time: try a lower --max-tokens")])
def test_out_of_memory_suggests_half_of_what_failed(ended, monkeypatch, fails, settings, said):
    monkeypatch.setattr(METHODS["simcse"], "loss", lambda self, out: fails())
    code, found, _ = ended(steps=4, **settings)
    assert code == 1 and said in found


def test_out_of_memory_while_scoring_says_so_and_that_the_saves_stand(ended, monkeypatch):
    monkeypatch.setattr(StsTest, "score", no_memory_on_the_gpu)
    code, said, _ = ended(steps=4)
    assert code == 1 and said == ("mincse.py: out of memory (CUDA out of memory. Tried to allocate "
                                  "20.00 MiB.); what was saved before stands")


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
                    reason="only glibc keeps what was freed and can be asked for it")
def test_freed_memory_between_blocks_in_use_goes_back_every_fifty_steps():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def steps(count):
        for step in range(count):
            if step == 0:                                         # 200 MiB, every other block freed
                blocks = [torch.ones(2**14) for _ in range(6400)]
                del blocks[::2]
            yield resident()
    held = list(pieces.within_memory(steps(51), Config()))       # MiB, at each step
    assert held[0] - held[49] < 10
    assert held[49] - held[50] > 150


def test_other_failures_are_not_taken_for_a_lack_of_memory(ended, monkeypatch):
    def wrong(self, out):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(METHODS["simcse"], "loss", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ended(steps=4)

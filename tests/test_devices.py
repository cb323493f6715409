"""Pieces of a batch and processes that share it: the same gradient, one writer, no hang."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import devices
import mincse
import runs
from config import Config
from devices import Pieces
from losses import LOSSES
from papers import METHODS

ROOT = Path(__file__).parent.parent
KINDS = [{"method": method} for method in METHODS] + [
    {"loss": loss} for loss in list(LOSSES)[1:]] + [{"mlm_weight": .1}]
SETTINGS = {"is-cse": {"buffer_size": 16, "neighbours": 3}, "cards": {"retrieve_from": 4},
            "sscl": {"layers_as_negatives": 1}, "fedrcl": {"levels": 2, "classes": 4}}


@pytest.fixture(scope="module")
def given(lm, tiny, sentences, pairs, tmp_path_factory):
    """given(method) -> flags for it: documents, or triples where it needs those; a teacher."""
    folder, lines = tmp_path_factory.mktemp("corpora"), sentences.read_text().splitlines()
    later = folder / "later.txt"
    later.write_text("".join(f"later {line}\n" for line in lines))
    documents, triples = folder / "documents.txt", folder / "triples.tsv"
    documents.write_text("\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, 64, 8)) + "\n")
    triples.write_text("".join(f"{a}\t{b}\t{c}\n" for a, b, c in
                               zip(lines, lines[1:] + lines[:1], lines[9:] + lines[:9])))

    def flags(method="simcse", **settings):
        kind = METHODS[method]
        found = {"method": method, "encoder": str(lm), "test": str(pairs), "batch_size": 8,
                 "steps": 4, "corpus": str(documents if 1 in kind.columns_taken else triples)}
        if method == "pnr":                                       # which learns a sequence
            found["corpus"] = [str(documents), str(later)]
        if kind.reads_teacher:
            found["teacher"] = str(tiny)
        return found | SETTINGS.get(method, {}) | settings
    return flags


def gradients(flags, *, steps=2):
    """Of the last of some steps that change no weight, but fill buffers; and the figures."""
    inputs = mincse.read_inputs(flags)
    job = mincse.build(inputs, replace(inputs.config, learning_rate=0., clip=1e9))
    mincse.prepare(job)
    job.parts["method"].follow(job.model)                         # what pnr remembers
    for step, loss, out in mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1):
        if step == steps:
            break
    found = {name: p.grad for name, p in job.parts.named_parameters() if p.grad is not None}
    return found, job.parts["method"].state_dict(), loss


def apart(a, b):
    """The largest difference of any gradient, in units of the largest gradient."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a) / max(
        x.abs().max().item() for x in a.values())


# Sums of a few hundred numbers in another order differ by some units of the last place.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- pieces ---------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_pieces_have_the_gradient_of_one_graph_with_the_same_dropout(given, monkeypatch, flags):
    """8 rows in pieces of 3, 3, 2. All that a method remembers is the same, too."""
    found, state, loss = gradients(given(**flags, micro_batch=3))
    monkeypatch.setattr(devices, "once_more", devices.seeded)     # the graph of a piece is kept
    expected, expected_state, expected_loss = gradients(given(**flags, micro_batch=3))
    assert apart(found, expected) < 1e-6 and loss == expected_loss
    same(state, expected_state)


@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_without_dropout_pieces_have_the_gradient_of_the_whole_batch(given, flags):
    """In float32: bfloat16 rounds a product of 3 rows otherwise than one of 8."""
    usual = flags | {"dropout": 0., "precision": "fp32",
                     "pooling": "mean"}                           # random [CLS] vectors are equal
    found, _, loss = gradients(given(**usual, micro_batch=3))
    expected, _, expected_loss = gradients(given(**usual))
    assert apart(found, expected) < ROUNDING and loss.item() == pytest.approx(expected_loss.item())


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


# ---- several processes ----------------------------------------------------------------------

def torchrun(*arguments, **settings):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc_per_node=2", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **settings)


ALL_METHODS = """
    import json, sys, torch
    sys.path[:0] = {paths}
    import devices
    from test_devices import gradients
    devices.join()
    found = {{name: gradients(flags) for name, flags in json.load(open({flags!r})).items()}}
    torch.save(found, {out!r} + str(devices.rank()))
    print("done by", devices.rank())
    devices.leave()
"""


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(given, tmp_path):
    """With dropout, against pieces of the same rows; and both remember the same, to the bit."""
    kinds = [flags for flags in KINDS if flags != {"method": "pnr"}]   # which is one process
    asked = {str(flags): given(**flags, precision="fp32") for flags in kinds}
    asked["smaller"] = given(micro_batch=3, precision="fp32")
    flags, script, out = tmp_path / "flags.json", tmp_path / "all.py", tmp_path / "found"
    flags.write_text(json.dumps(asked))
    script.write_text(textwrap.dedent(ALL_METHODS).format(
        paths=[str(ROOT), str(ROOT / "tests")], flags=str(flags), out=str(out)))
    said, complaints = torchrun(script).communicate(timeout=120)
    assert said == "done by 0\n", complaints
    first, second = (torch.load(f"{out}{rank}") for rank in range(2))
    for name, settings in asked.items():
        alone = gradients(settings | {"micro_batch": 4})
        if name != "smaller":                                     # 3 + 1 rows, not 4: other dropout
            assert apart(first[name][0], alone[0]) < ROUNDING, name
            assert first[name][2].item() == pytest.approx(alone[2].item()), name
        same(first[name], second[name])


def arguments(tiny, sentences, pairs, folder, **settings):
    settings = {"encoder": tiny, "corpus": sentences, "test": pairs, "batch_size": 8, "dropout": 0.,
                "out": folder} | settings
    return [ROOT / "mincse.py", *(text for name, value in settings.items()
                                  for text in ("--" + name.replace("_", "-"), str(value)))]


def test_two_processes_go_on_with_a_run_of_one_and_a_single_one_writes(
        program, stopped, tiny, sentences, pairs, tmp_path):
    """Without dropout: the same weights as the run that one process does alone."""
    usual = {"steps": 12, "dropout": 0., "method": "is-cse", "buffer_size": 16, "neighbours": 3}
    whole = program(out="whole", **usual)
    stopped(5, program, out="parts", **usual)
    parts = tmp_path / "parts"
    said, complaints = torchrun(*arguments(tiny, sentences, pairs, parts, **usual),
                                "--resume").communicate(timeout=120)
    assert said == (parts / "results.md").read_text() + "\n", complaints
    assert complaints.count("corpus ") == 1
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    assert [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()
            ] == [10, 12]
    for name, expected in load_file(whole / "model.safetensors").items():
        found = load_file(parts / "model.safetensors")[name]
        assert torch.allclose(found, expected, atol=2e-4), name   # Adam divides by small numbers


@pytest.fixture
def shared(tiny, sentences, pairs, tmp_path):
    """A run of two processes without an end, in its first steps; and its folder."""
    folder = tmp_path / "run"
    running = torchrun(*arguments(tiny, sentences, pairs, folder, steps=100_000))
    while not (folder / "metrics.jsonl").exists() and running.poll() is None:
        time.sleep(.05)
    yield running, folder
    running.kill()


def workers(process):
    """The processes that torchrun started, the first one first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank = {int(child): re.search(r"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_text())[1]
            for child in children}
    return sorted(rank, key=rank.get)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_when_a_process_dies_the_other_ends_with_one_sentence(shared):
    running, folder = shared
    os.kill(workers(running)[1], signal.SIGKILL)
    complaints = running.communicate(timeout=60)[1]
    [line] = re.findall("mincse.py: .*", complaints)
    assert line == ("mincse.py: process 1 of 2: another process of this run has ended, and none "
                    "goes on without it; go on from the last saved state with:")
    assert re.search(r"\n  torchrun --nproc_per_node=2 \S*mincse.py .* --resume\n", complaints)
    assert "mincse.py\", line" not in complaints and running.returncode == 1


def test_control_c_saves_what_all_processes_have(shared):
    running, folder = shared
    running.send_signal(signal.SIGINT)
    complaints = running.communicate(timeout=60)[1]
    step = int(re.search(r"stopped at step (\d+) of 100000, state saved", complaints)[1])
    assert torch.load(folder / "state.pt")["state"]["step"] == step >= 10
    assert complaints.count("stopped at") == 1 and "mincse.py\", line" not in complaints


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "world", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--batch-size 9: expected a multiple of 2"):
        devices.check(Config(batch_size=9), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="started 2 processes here, found 1 GPUs"):
        devices.check(Config(batch_size=8), torch.device("cuda"))


def test_gpus_that_are_merely_there_change_nothing(program, monkeypatch):
    """The environment of a process on a machine with four, not started by torchrun."""
    alone = load_file(program(out="alone") / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    beside = load_file(program(out="beside") / "model.safetensors")
    assert devices.world() == 1
    same(alone, beside)


# ---- training faults ------------------------------------------------------------------------

@pytest.fixture
def ended(tiny, sentences, pairs, tmp_path, monkeypatch, capsys):
    """ended(...) -> the exit code of a run, the last line of its stderr, and its folder."""
    def run(**settings):
        argv = arguments(tiny, sentences, pairs, tmp_path / "run", **settings)
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        code = mincse.program()
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
        ended, loss_at, sentences, value):
    loss_at(7, float(value))
    code, said, folder = ended(steps=20, learning_rate=.001, dev_every=5)
    assert code == 1
    assert said == (f"mincse.py: the loss is {value} at step 7, with a learning rate of 0.0007: "
                    f"{folder}/bad-batch.json has the rows of its batch; try a lower "
                    "--learning-rate; what was saved before is kept")
    found = json.loads((folder / "bad-batch.json").read_text())
    lines = sentences.read_text().splitlines()
    assert found["step"] == 7 and found["loss"] == value and len(found["losses_before"]) == 1
    assert found["rows"] == list(data.batches(64, 8, seed=42, epochs=1))[6]
    assert found["texts"] == [[lines[row]] for row in found["rows"]]
    assert torch.load(folder / "state.pt")["state"]["step"] == 5


def test_no_weights_are_saved_after_a_loss_that_is_no_number(ended, loss_at):
    """Not even by the signal that comes before the next look at the losses."""
    loss_at(3, float("nan"))
    taken, add = [], runs.Log.add

    def add_and_stop(log, loss, **facts):
        add(log, loss, **facts)
        taken.append(loss)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Log, "add", add_and_stop)
        code, said, folder = ended(steps=20)
    assert code == 1 and "the loss is nan at step 3" in said
    assert not (folder / "state.pt").exists() and not (folder / "model.safetensors").exists()


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
        log = runs.Log(tmp_path, 8)
        log.add(torch.tensor(1.), learning_rate=.1)
        log.line(step, figures)
        log.warn_of_collapse(steps)
        assert ("collapse" in capsys.readouterr().err) == warned


def no_memory_on_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def no_memory_for_the_processor():
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("fails", [no_memory_on_the_gpu, no_memory_for_the_processor,
                                   lambda: [0] * 2**60], ids=["gpu", "cpu", "python"])
@pytest.mark.parametrize("settings, said", [
    ({}, "out of memory with 8 rows of a column at a time: try --micro-batch 4, which"),
    ({"micro_batch": 6}, "with 6 rows of a column at a time: try --micro-batch 3,"),
    ({"micro_batch": 1}, "with 1 row of a column at a time: try a lower --max-tokens")])
def test_out_of_memory_suggests_half_of_what_failed(ended, monkeypatch, fails, settings, said):
    monkeypatch.setattr(METHODS["simcse"], "loss", lambda self, out: fails())
    code, found, _ = ended(steps=4, **settings)
    assert code == 1 and said in found


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
    held = list(devices.within_memory(steps(51), Config()))       # MiB, at each step
    assert held[0] - held[49] < 10
    assert held[49] - held[50] > 150


def test_other_failures_are_not_taken_for_a_lack_of_memory(ended, monkeypatch):
    def wrong(self, out):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(METHODS["simcse"], "loss", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ended(steps=4)

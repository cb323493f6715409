"""The program: the training loop against one by hand, and runs as their users see them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import data
import mincse
from conftest import ready
from engine import rehearsal, results
from engine.encoders import load
from engine.flags import outcome
from eval_sts import StsTest
from losses import info_nce
from model import Head
from papers.simcse import Config, SimCSE

ROOT = Path(__file__).parent.parent


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the training loop ----------------------------------------------------------------------

def loop_of(tiny, sentences, steps=3, **settings):
    """What `mincse.train` takes, built on the tiny encoder."""
    config = replace(Config(batch_size=8, steps=steps, seed=7), **settings)
    corpus, tokenizer = data.read_corpus(str(sentences)), data.Tokenizer.read(tiny)
    torch.manual_seed(0)
    model = load(tiny, pooling="cls", dropout=config.dropout)
    model.head = Head(model.config.width)
    return config, corpus, tokenizer, model, SimCSE(corpus, config, model=model)


def batches_of(config, tokenizer, method, steps=3, first=1):
    return mincse.make_batches(method, tokenizer, config, [(steps, range(64))], first=first)


def steps_of(config, tokenizer, model, method, steps=3):
    return mincse.train(model, method, mincse.make_optimizer(model, method, config),
                        batches_of(config, tokenizer, method, steps), config, steps=steps)


def test_training_is_the_algorithm_box_of_the_paper(tiny, sentences):
    """The same three steps by hand: two forwards, InfoNCE, clipping, AdamW, linear decay to 0."""
    config, corpus, tokenizer, trained, method = loop_of(tiny, sentences, dropout=0.)
    losses = [loss.item() for _, loss, _ in steps_of(config, tokenizer, trained, method)]

    model = loop_of(tiny, sentences, dropout=0.)[3].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0,
                                  betas=(.9, .999), eps=1e-8)
    order = random.Random("7 0").sample(range(64), 64)
    for step in range(3):
        texts = [corpus.columns[0][row] for row in order[8 * step : 8 * step + 8]]
        ids, mask = tokenizer(texts, max_tokens=32)
        loss = info_nce(model(ids, mask), model(ids, mask), temperature=.05)
        assert loss.item() == pytest.approx(losses[step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 1 / norm.item())
        optimizer.param_groups[0]["lr"] = config.learning_rate * (3 - step) / 3
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, trained.state_dict()[name], atol=1e-5), name


def test_the_two_views_differ_by_dropout_alone_which_stays_on_when_the_caller_scores(
        tiny, sentences):
    for dropout, differ in [(.1, True), (0., False)]:
        config, _, tokenizer, model, method = loop_of(tiny, sentences, dropout=dropout)
        for _, _, out in steps_of(config, tokenizer, model, method):
            assert torch.equal(out.anchor, out.positive) != differ
            model.eval()


def test_every_sentence_is_seen_once_an_epoch_and_steps_may_ask_for_more(tiny, sentences):
    config, _, tokenizer, _, method = loop_of(tiny, sentences)
    rows = []
    method.views = lambda chosen, rng: rows.append(chosen) or [["a"] * 8] * 2
    list(batches_of(config, tokenizer, method, steps=12))
    assert sorted(sum(rows[:8], [])) == list(range(64)) and len(rows) == 12


def test_the_batches_of_a_step_do_not_depend_on_where_the_run_began(tiny, sentences):
    config, _, tokenizer, _, method = loop_of(tiny, sentences, positives="delete-words")
    whole, rest = (list(batches_of(config, tokenizer, method, 10, n)) for n in (1, 4))
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and a.columns == b.columns


def test_training_a_tiny_encoder_lowers_the_loss(tiny, sentences):
    config, _, tokenizer, model, method = loop_of(tiny, sentences, learning_rate=1e-3)
    model.pooling = "mean"                                        # random [CLS] vectors collapse
    losses = [loss.item() for _, loss, _ in steps_of(config, tokenizer, model, method, steps=40)]
    assert sum(losses[-5:]) < .5 * sum(losses[:5])


def test_a_compiled_encoder_has_the_same_losses_but_for_dropout(given, monkeypatch):
    """A compiler that hands back what it gets stands in: a real one takes a minute."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=as_it_is))
    plain, compiled = ([loss.item() for _, loss, _ in ready(given(dropout=0., compile=asked))[1]]
                       for asked in ("no", "yes"))
    assert graphs and compiled == plain


def test_without_a_compiler_compile_says_so(program, monkeypatch, capsys):
    def missing(graph, inputs):
        raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=missing))
    assert outcome(partial(program, compile="yes"), "") == 1
    assert re.search("--compile yes: .*No working C.*: leave it out", capsys.readouterr().err)


# ---- a run and its folder -------------------------------------------------------------------

def test_a_run_leaves_a_folder_that_explains_itself(program, sentences):
    folder = program(steps=12)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling",
        "sentence_bert_config.json", "config_sentence_transformers.json", "README.md", "args.json",
        "env.json", "metrics.jsonl", "results.json", "results.md"}
    assert not (folder / "state.pt").exists()
    args, env = (json.loads((folder / name).read_text()) for name in ("args.json", "env.json"))
    assert args["config"]["steps"] == 12 and args["command"].startswith("python mincse.py --")
    assert env["corpus"]["rows"] == 64 and env["torch"] == torch.__version__.split("+")[0] or (
        env["torch"] == torch.__version__)


def test_results_hold_both_scores_and_every_tenth_step_has_a_line_of_measures(program):
    folder = program(steps=25)
    results, lines = json.loads((folder / "results.json").read_text()), metrics(folder)
    assert set(results["test"]) == set(results["before"]) == {"pairs", "avg"}
    assert results["steps"] == results["best_step"] == 25
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert {"loss", "alignment", "uniformity", "positive_cosine", "negative_cosine",
            "learning_rate", "sentences_per_second"} <= set(lines[0])
    assert lines[0]["learning_rate"] == pytest.approx(1e-4 * (1 - 9 / 25))


def test_the_best_dev_score_decides_which_model_is_kept(program, pairs, monkeypatch):
    """Dev scores 1, 3, 2 at steps 2, 4, 6: the model of step 4 stays on disk."""
    seen = []

    def scored(job, folder, state):
        score = {2: 1., 4: 3., 6: 2.}[state.step]
        seen.append(weights_now(job))
        monkeypatch.setattr(type(job.inputs.dev), "score", lambda *_: mincse.Result({"avg": score}))
        result = original(job, folder, state)
        monkeypatch.undo()
        monkeypatch.setattr(mincse, "keep_best", scored)
        return result

    def weights_now(job):
        return nn.utils.parameters_to_vector(job.model.encoder.parameters()).detach()

    original = mincse.keep_best
    monkeypatch.setattr(mincse, "keep_best", scored)
    folder = program(steps=6, dev=pairs, dev_every=2)
    results = json.loads((folder / "results.json").read_text())
    assert results["best_step"] == 4 and results["dev"] == {"avg": 3}
    kept = nn.utils.parameters_to_vector(load(folder).encoder.parameters())
    assert torch.equal(kept, seen[1]) and not torch.equal(kept, seen[2])


def test_the_saved_model_has_no_training_head_without_labels_and_keeps_it_with_them(
        program, tmp_path):
    assert load(program()).head is None
    triples = tmp_path / "nli.csv"
    triples.write_text("sent0,sent1,hard_neg\n" + "".join(
        f"a dog {i},an animal {i},no dog {i}\n" for i in range(16)))
    kept = load(program(corpus=triples, out="supervised", loss="info-nce"))
    assert kept.keep_head and kept.pooling == "cls"


# ---- stopping and going on ------------------------------------------------------------------

def test_a_stopped_run_says_where_and_how_to_go_on(program, stopped, capsys):
    """That it then ends with the same bits is in test_papers.py, for every paper."""
    assert stopped(2, program) == 130
    said = capsys.readouterr().err
    assert "stopped at step 2 of 4" in said and said.rstrip().endswith("--resume")


def test_a_finished_run_is_never_overwritten_unasked(program, capsys):
    folder = program()
    with pytest.raises(SystemExit) as refused:
        program()
    said = capsys.readouterr().err
    assert refused.value.code == 2 and "--resume" in said and "--overwrite" in said
    before = (folder / "results.json").stat().st_mtime_ns
    program("--resume")
    assert (folder / "results.json").stat().st_mtime_ns == before
    program("--overwrite")
    assert (folder / "results.json").stat().st_mtime_ns > before


def test_a_folder_with_other_things_in_it_is_left_alone(program, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for flags in [(), ("--resume",), ("--overwrite",)]:
        with pytest.raises(SystemExit) as refused:
            program(*flags)
        assert refused.value.code == 2 and "holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_command_to_go_on_never_overwrites(program, stopped, capsys):
    program()
    stopped(2, program, "--overwrite")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--resume") and "--overwrite" not in last


def test_when_the_final_evaluation_fails_the_model_is_saved_and_the_code_is_4(
        program, monkeypatch, capsys):
    score, calls = StsTest.score, []

    def fails_the_second_time(self, encode):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return score(self, encode)

    monkeypatch.setattr(StsTest, "score", fails_the_second_time)
    with pytest.raises(SystemExit) as failed:
        program()
    assert failed.value.code == 4 and "no memory left" in capsys.readouterr().err
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    assert load(folder).pooling == "cls" and (folder / "state.pt").exists()


def test_a_loss_that_is_no_number_stops_the_run(program):
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2: .*--learning-rate"):
        program(learning_rate=1e30, clip=1e30, steps=20)


# ---- seeds, plans, lists --------------------------------------------------------------------

def test_seeds_give_a_folder_each_and_mean_and_spread(program, capsys):
    folder = program("--seeds", "0-2")
    each = [json.loads((folder / f"seed-{n}" / "results.json").read_text())["test"]["pairs"]
            for n in range(3)]
    spread = json.loads((folder / "results.json").read_text())["spread"]
    mean = sum(each) / 3
    deviation = (sum((score - mean) ** 2 for score in each) / 2) ** .5
    assert [spread[name]["pairs"] for name in ("mean", "standard deviation", "lowest", "highest")
            ] == pytest.approx([mean, deviation, min(each), max(each)])
    assert "3 seeds" in capsys.readouterr().out


def test_the_encoder_before_training_is_scored_once_for_all_seeds(program, monkeypatch):
    scored, score = [], StsTest.score
    monkeypatch.setattr(StsTest, "score", lambda *args: scored.append(1) or score(*args))
    folder = program("--seeds", "0-1")
    several = json.loads((folder / "seed-1" / "results.json").read_text())
    assert len(scored) == 3                                       # and two at the ends
    alone = json.loads((program(seed=1, out="alone") / "results.json").read_text())
    assert several == alone


def test_the_verdict_compares_with_fifty_public_seeds_where_the_experiment_is_the_same():
    usual = Config(encoder="bert-base-uncased", corpus="wiki1m", test="sts")
    said = results.verdict(usual, {"avg": 75.2})[0]
    assert "75.20 lies inside the range of 50 public runs" in said
    assert "outside" in results.verdict(usual, {"avg": 77.})[0]
    for other in ({"encoder": "mini"}, {"loss": "focal"}, {"corpus": "my.txt"}, {"test": "stsb"}):
        assert results.verdict(replace(usual, **other), {"avg": 75.2}) == []


def test_a_dry_run_prints_the_plan_and_leaves_nothing(program, tmp_path, capsys):
    program("--dry-run")
    said = capsys.readouterr().out
    for part in ("steps: 4 at ", "expected time:", "peak memory:", "equal vectors: yes"):
        assert part in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, expected", [
    # 2 x 60 s for all rows instead of half of them, of which 6 s are a search of a quarter of all
    # pairs: 2 x 6 s more. 8 steps of 6 s, and two scores of 60 s.
    (dict(method="cards", retrieve_from=8, epochs=1),
     ["before the first step: 2.2 minutes", "later on: 0,", "expected time: 5.0 minutes"]),
    (dict(method="ifnd", cluster_rounds=2, clusters=4, epochs=1),
     ["first step: 2.0 minutes", "later on: 2, 4.0 minutes", "expected time: 8.8 minutes"]),
    (dict(method="twins", queue_batches=0, steps=2),              # 16 rows are seen, of 32 or of 64
     ["first step: 1.0 minutes", "later on: 0,", "expected time: 3.2 minutes"])], ids=str)
def test_a_dry_run_counts_all_rows_once_and_all_pairs_by_the_square(
        settings, expected, program, monkeypatch, capsys):
    """The first 32 of 64 rows are gone through: a search or a step takes 6 s, all else 60 s."""
    def takes(work, number):
        work()
        return 6. if {"search", "next"} & {*work.__code__.co_names} else 60.

    monkeypatch.setattr(mincse, "DRY_ROWS", 32)
    monkeypatch.setattr(rehearsal, "timeit", takes)
    program("--dry-run", **{"steps": None} | settings)
    said = capsys.readouterr().out
    assert all(line in said for line in expected), said


# ---- wrong uses, as typed -------------------------------------------------------------------

@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(flag, ...) -> exit code and stderr of the program, in this process."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mincse.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            mincse.main()
        return ended.value.code, capsys.readouterr().err
    return run


@pytest.mark.parametrize("flags, code, said", [
    (["--sedes", "0-4"], 2, "unrecognized arguments: --sedes 0-4; instead of --sedes, did you mean "
                            "--seeds?"),
    (["--method", "simsce"], 2, "invalid choice: 'simsce'"),
    (["--corpus", "missing.txt"], 3, "missing.txt: expected a file or one of docs, wiki1m"),
    (["--corpus", "empty.txt"], 3, "expected two rows or more"),
    (["--corpus", "one.txt"], 3, "expected two rows or more, as other rows are the negatives, "
                                 "found 1"),
    (["--corpus", "nli.csv", "--method", "is-cse"], 2, "takes a corpus of 1 or 2 columns, found 3"),
    (["--corpus", "nli.csv", "--loss", "focal"], 2, "has hard negatives (3 columns)"),
    (["--batch-size", "65"], 2, "--batch-size 65 needs a corpus of as many rows, found 64"),
    (["--threads", "-1"], 2, "--threads: expected 0 or more, found -1"),
    (["--max-tokens", "600"], 2, "--max-tokens: expected 3 to 512"),
    (["--pooling", "max"], 2, "invalid choice: 'max'"),
    (["--seeds", "0-1", "--seed", "3"], 2, "--seed and --seeds both say which runs"),
    (["--seeds", "4-0"], 2, "expected seeds such as 0-4 or 0,1,2, found '4-0'"),
    (["--seeds", "0,one"], 2, "expected seeds such as 0-4 or 0,1,2, found '0,one'"),
    (["--steps", "0"], 2, "--steps: expected 1 or more, found 0"),
    (["--resume", "--overwrite"], 2, "--overwrite: not allowed with argument --resume"),
    (["--test", "sst"], 3,
     "a test called docs, stsb or sts, or a .tsv, .csv or .jsonl file, found 'sst'"),
    (["--mlm-weight", "0.1"], 3, "expected a masked-LM head"),
])
def test_a_wrong_use_gets_one_sentence_and_its_exit_code(
        typed, tiny, sentences, pairs, tmp_path, flags, code, said):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("A single sentence.\n")
    (tmp_path / "nli.csv").write_text("a,b,c\nd,e,f\n")
    flags = [str(tmp_path / flag) if (tmp_path / flag).is_file() else flag for flag in flags]
    usual = ["--encoder", tiny, "--test", pairs, "--corpus", sentences, "--out", tmp_path / "run",
             "--steps", "1", "--batch-size", "2"]
    found, complaint = typed(*usual, *flags)
    assert found == code and said in complaint
    assert "Traceback" not in complaint and not (tmp_path / "run").exists()


def test_control_c_ends_with_130_and_the_command_to_go_on(tiny, sentences, pairs, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "mincse.py", "--encoder", tiny, "--corpus", sentences, "--test",
         pairs, "--batch-size", "8", "--steps", "100000", "--out", tmp_path / "run"],
        stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    step = int(re.search(r"stopped at step (\d+) of 100000, state saved", said)[1])
    assert step >= 10 and torch.load(tmp_path / "run" / "state.pt")["state"]["step"] == step


def test_the_built_in_run_needs_no_argument_and_no_network(tmp_path):
    """The README's first command, cut to two steps."""
    done = subprocess.run(
        [sys.executable, ROOT / "mincse.py", "--steps", "2", "--out", tmp_path / "run"],
        text=True, capture_output=True, env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert "acc@1" in done.stdout and "before" in done.stdout and "after" in done.stdout
    assert "corpus docs" in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()

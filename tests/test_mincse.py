"""The program: the training loop against one by hand, and runs as their users see them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import mincse
import runs
from config import Config
from eval_sts import StsTest
from folders import load, load_masked_lm
from losses import alignment, info_nce, uniformity
from methods import SimCSE
from model import Head

ROOT = Path(__file__).parent.parent


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the training loop ----------------------------------------------------------------------

def loop_of(tiny, sentences, steps=3, **settings):
    """The parts that `mincse.train` takes, built on the tiny encoder."""
    config = replace(Config(batch_size=8, steps=steps, seed=7), **settings)
    corpus, tokenizer = data.read_corpus(str(sentences)), data.Tokenizer.read(tiny)
    torch.manual_seed(0)
    model = load(tiny, pooling="cls", dropout=config.dropout)
    model.head = Head(model.config.width)
    parts = nn.ModuleDict({"model": model, "method": SimCSE(corpus, config, model=model)})
    return config, corpus, tokenizer, parts


def steps_of(config, tokenizer, parts, steps=3):
    optimizer = torch.optim.AdamW(parts.parameters(), weight_decay=config.weight_decay)
    batches = mincse.make_batches(parts["method"], tokenizer, config, steps=steps, first=1)
    yield from mincse.train(parts, optimizer, batches, config, steps=steps, first=1,
                            device=torch.device("cpu"), bf16=False)


def test_training_is_the_algorithm_box_of_the_paper(tiny, sentences):
    """The same three steps by hand: two forwards, InfoNCE, clipping, AdamW, linear decay to 0."""
    config, corpus, tokenizer, parts = loop_of(tiny, sentences, dropout=0.)
    losses = [loss.item() for _, loss, _ in steps_of(config, tokenizer, parts)]

    _, _, _, again = loop_of(tiny, sentences, dropout=0.)
    model = again["model"].train()
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
        assert torch.allclose(tensor, parts["model"].state_dict()[name], atol=1e-5), name


def test_the_two_views_differ_by_dropout_alone(tiny, sentences):
    for dropout, differ in [(.1, True), (0., False)]:
        config, _, tokenizer, parts = loop_of(tiny, sentences, dropout=dropout)
        _, _, out = next(steps_of(config, tokenizer, parts))
        assert torch.equal(out.anchor, out.positive) != differ


def test_dropout_stays_on_after_the_caller_has_scored_the_model(tiny, sentences):
    config, _, tokenizer, parts = loop_of(tiny, sentences)
    for _, _, out in steps_of(config, tokenizer, parts):
        assert not torch.equal(out.anchor, out.positive)
        parts["model"].eval()


def test_every_sentence_is_seen_once_an_epoch_and_steps_may_ask_for_more(tiny, sentences):
    config, corpus, tokenizer, parts = loop_of(tiny, sentences)
    rows = []
    parts["method"].views = lambda chosen, rng: rows.append(chosen) or [["a"] * 8] * 2
    list(mincse.make_batches(parts["method"], tokenizer, config, steps=12, first=1))
    assert sorted(sum(rows[:8], [])) == list(range(64)) and len(rows) == 12


def test_the_batches_of_a_step_do_not_depend_on_where_the_run_began(tiny, sentences):
    config, _, tokenizer, parts = loop_of(tiny, sentences, positives="delete-words", mlm_weight=.1)
    whole, rest = (list(mincse.make_batches(parts["method"], tokenizer, config, steps=10, first=n))
                   for n in (1, 4))
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                   for x, y in zip(vars(a).values(), vars(b).values()))


def test_training_a_tiny_encoder_lowers_the_loss(tiny, sentences):
    config, _, tokenizer, parts = loop_of(tiny, sentences, learning_rate=1e-3)
    parts["model"].pooling = "mean"                               # random [CLS] vectors collapse
    losses = [loss.item() for _, loss, _ in steps_of(config, tokenizer, parts, steps=40)]
    assert sum(losses[-5:]) < .5 * sum(losses[:5])


def test_the_figures_of_a_log_line_are_those_of_the_batch(tiny, sentences):
    config, _, tokenizer, parts = loop_of(tiny, sentences)
    _, _, out = next(steps_of(config, tokenizer, parts))
    a, p = out.anchor.detach(), out.positive.detach()
    likeness = [[F.cosine_similarity(x, y, dim=0).item() for y in p] for x in a]
    own = [likeness[i][i] for i in range(8)]
    others = [likeness[i][j] for i in range(8) for j in range(8) if i != j]
    expected = {"positive_cosine": sum(own) / 8, "lowest_positive_cosine": min(own),
                "negative_cosine": sum(others) / 56, "alignment": alignment(a, p).item(),
                "uniformity": uniformity(a).item()}
    assert mincse.figures(out) == pytest.approx(expected, abs=1e-5)


# ---- the masked-LM term ---------------------------------------------------------------------


def test_weight_zero_computes_no_masks_and_changes_nothing(tiny, sentences):
    config, _, tokenizer, parts = loop_of(tiny, sentences)
    batch = next(mincse.make_batches(parts["method"], tokenizer, config, steps=1, first=1))
    assert batch.masked is None and batch.labels is None


def test_the_term_is_added_and_the_contrastive_branch_sees_no_masks(tiny_lm, sentences):
    config, _, tokenizer, parts = loop_of(tiny_lm, sentences, mlm_weight=.1, dropout=0.)
    plain_batch = next(mincse.make_batches(parts["method"], tokenizer,
                                           replace(config, mlm_weight=0.), steps=1, first=1))
    batch = next(mincse.make_batches(parts["method"], tokenizer, config, steps=1, first=1))
    assert torch.equal(batch.ids, plain_batch.ids)

    model = parts["model"].train()
    parts["lm_head"] = load_masked_lm(tiny_lm, model)
    logits = parts["lm_head"](model.encoder(batch.masked, batch.mask)[-1])        # (16, T, V)
    term = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    contrast = info_nce(*model(batch.ids, batch.mask).chunk(2))
    _, loss, _ = next(steps_of(config, tokenizer, parts))
    assert loss.item() == pytest.approx((contrast + .1 * term).item(), rel=1e-5)


def test_with_no_token_masked_the_term_is_zero_and_not_nan(tiny_lm, sentences):
    config, _, tokenizer, parts = loop_of(tiny_lm, sentences, mlm_weight=.1, mlm_rate=0.)
    batch = next(mincse.make_batches(parts["method"], tokenizer, config, steps=1, first=1))
    head = load_masked_lm(tiny_lm, parts["model"])
    assert mincse.masked_lm_loss(parts["model"], head, batch).item() == 0


def test_a_run_with_the_term_ends_in_the_same_kind_of_folder(program, tiny_lm):
    folder = program(encoder=tiny_lm, mlm_weight=.1)
    assert not any("cls" in name or "lm_head" in name for name in weights(folder))


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


def test_results_hold_the_scores_before_and_after_with_the_same_pooling(program):
    results = json.loads((program() / "results.json").read_text())
    assert set(results["test"]) == set(results["before"]) == {"pairs", "avg"}
    assert results["steps"] == results["best_step"] == 4


def test_every_tenth_step_has_a_line_with_loss_geometry_rate_and_speed(program):
    lines = metrics(program(steps=25))
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert {"loss", "alignment", "uniformity", "positive_cosine", "negative_cosine",
            "learning_rate", "sentences_per_second"} <= set(lines[0])
    assert lines[0]["learning_rate"] == pytest.approx(1e-5 * (1 - 9 / 25))


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


@pytest.mark.parametrize("flags", [{"method": "is-cse", "buffer_size": 20, "neighbours": 3},
                                   {"loss": "focal"}, {"pooling": "mean"},
                                   {"method": "is-cse", "loss": "focal", "positives": "crop"}])
def test_methods_losses_positives_and_poolings_combine(program, flags):
    folder = program(**flags)
    assert metrics(folder)[-1]["loss"] > 0


def test_pairs_train_without_hard_negatives(program, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"dog {i}\tanimal {i}\n" for i in range(16)))
    assert metrics(program(corpus=path))[-1]["loss"] > 0


# ---- stopping and going on ------------------------------------------------------------------

@pytest.mark.parametrize("flags", [{}, {"method": "is-cse", "buffer_size": 20, "neighbours": 3},
                                   {"positives": "crop"}], ids=str)
def test_a_stopped_run_goes_on_exactly_where_it_was(program, stopped, capsys, flags, pairs):
    flags |= {"steps": 13, "dev": pairs, "dev_every": 4}
    whole = program(out="whole", **flags)
    assert stopped(6, program, out="parts", **flags) == 130
    said = capsys.readouterr().err
    assert "stopped at step 6 of 13" in said and said.rstrip().endswith("--resume")
    parts = program("--resume", out="parts", **flags)
    assert equal(weights(whole), weights(parts))
    timeless = [[{k: v for k, v in line.items() if k not in ("sentences_per_second", "loss")}
                 for line in metrics(folder)] for folder in (whole, parts)]
    assert timeless[0] == timeless[1]


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


def test_a_run_does_not_go_on_with_other_settings(program, capsys):
    program()
    with pytest.raises(SystemExit) as refused:
        program("--resume", temperature=.1)
    assert refused.value.code == 2
    assert "was started with --temperature 0.05, found 0.1" in capsys.readouterr().err


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


def test_a_damaged_state_is_refused_by_name(program, stopped, tmp_path, capsys):
    stopped(2, program)
    (tmp_path / "run" / "state.pt").write_bytes(b"no state")
    with pytest.raises(SystemExit) as refused:
        program("--resume")
    assert refused.value.code == 3 and "state.pt: expected the state" in capsys.readouterr().err


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
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2,.*--learning-rate"):
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
    scored, score = [], mincse.score_start
    monkeypatch.setattr(mincse, "score_start", lambda job: scored.append(job) or score(job))
    folder = program("--seeds", "0-1")
    several = json.loads((folder / "seed-1" / "results.json").read_text())
    assert len(scored) == 1
    alone = json.loads((program(seed=1, out="alone") / "results.json").read_text())
    assert several == alone


def test_the_verdict_compares_with_fifty_public_seeds_where_the_experiment_is_the_same():
    usual = Config(encoder="bert-base-uncased", corpus="wiki1m", test="sts")
    assert "75.20 lies inside the range of 50 public runs" in runs.verdict(usual, {"avg": 75.2})[0]
    assert "outside" in runs.verdict(usual, {"avg": 77.})[0]
    for other in ({"encoder": "mini"}, {"loss": "focal"}, {"corpus": "my.txt"}, {"test": "stsb"}):
        assert runs.verdict(replace(usual, **other), {"avg": 75.2}) == []


def test_a_dry_run_prints_the_plan_and_leaves_nothing(program, tmp_path, capsys):
    program("--dry-run")
    said = capsys.readouterr().out
    for part in ("steps: 4 of 8 rows", "expected time:", "peak memory:", "equal vectors: yes"):
        assert part in said
    assert not (tmp_path / "run").exists()


# ---- wrong uses, as typed -------------------------------------------------------------------

def typed(*arguments, **environment):
    return subprocess.run([sys.executable, ROOT / "mincse.py", *map(str, arguments)], text=True,
                          capture_output=True, env=os.environ | environment)


@pytest.fixture
def broken(tiny, tmp_path):
    """broken(file, change) -> a copy of the tiny encoder with that file changed."""
    def copy(name, change):
        folder = shutil.copytree(tiny, tmp_path / "broken")
        (folder / name).write_bytes(change((tiny / name).read_bytes()))
        return folder
    return copy


def without_model_type(content):
    settings = json.loads(content)
    del settings["model_type"]
    return json.dumps(settings).encode()


def half_the_vocabulary(content):
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 8000}
    return json.dumps(tokenizer).encode()


@pytest.mark.parametrize("flags, code, said", [
    (["--sedes", "0-4"], 2, "unrecognized arguments: --sedes"),
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
    (["--seeds", "4-0"], 2, "invalid seed_range value: '4-0'"),
    (["--test", "sst"], 3, "a test called docs, stsb or sts, or a .tsv file, found 'sst'"),
    (["--mlm-weight", "0.1"], 3, "expected a masked-LM head"),
])
def test_a_wrong_use_gets_one_sentence_and_its_exit_code(
        tiny, sentences, pairs, tmp_path, flags, code, said):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("A single sentence.\n")
    (tmp_path / "nli.csv").write_text("a,b,c\nd,e,f\n")
    flags = [str(tmp_path / flag) if (tmp_path / flag).is_file() else flag for flag in flags]
    usual = ["--encoder", tiny, "--test", pairs, "--corpus", sentences, "--out", tmp_path / "run",
             "--steps", "1", "--batch-size", "2"]
    done = typed(*usual, *flags)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, change, said", [
    ("model.safetensors", lambda content: content[:5000], "model.safetensors"),
    ("model.safetensors", lambda content: b"", "model.safetensors"),
    ("config.json", without_model_type, "model_type"),
    ("tokenizer.json", half_the_vocabulary,
     "expected 90 to 100 % of the encoder's 16384 entries, found 8000"),
    ("tokenizer.json", lambda content: b"{", "tokenizer.json: expected a tokenizer"),
])
def test_a_damaged_encoder_is_refused_by_the_name_of_its_file(
        broken, sentences, pairs, tmp_path, name, change, said):
    done = typed("--encoder", broken(name, change), "--corpus", sentences, "--test", pairs,
                 "--out", tmp_path / "run")
    assert done.returncode == 3 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


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
    done = typed("--steps", "2", "--out", tmp_path / "run", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "acc@1" in done.stdout and "before" in done.stdout and "after" in done.stdout
    assert "corpus docs" in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()

"""PNR: the loss against worked numbers, the previous model, the tasks, and the measures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import mincse
from data import Corpus, read_corpus
from engine import run_folder
from engine.results import default_folder
from losses import info_nce
from model import Encoder, EncoderConfig, Head, SentenceEncoder
from papers import parse
from papers.pnr import PNR, Config, halves, pseudo_negative_nce, tasks_of, what_is_left
from papers.simcse import Encoded


def rows(*values):
    return torch.tensor(values, dtype=torch.double)


Z, Z2 = rows([1, 0], [0, 1]), rows([.8, .6], [.6, .8])
OLD, P = rows([.6, .8], [0, 1]), rows([1, 0], [.6, .8])


def each(anchor, positive, others, **settings):
    """The loss of every anchor, by a loop of the formula; the function gives their mean."""
    tau, w = settings.get("temperature", .05), settings.get("pseudo_weight", 1.)
    found = []
    for i in range(len(anchor)):
        def weight(x):
            return math.exp(F.cosine_similarity(anchor[i], x, dim=0) / tau)
        among = sum(weight(x) for x in positive)
        among += w * sum(weight(others[j]) for j in range(len(others)) if j != i)
        found.append(-math.log(weight(positive[i]) / among))
    mean = pseudo_negative_nce(anchor, positive, others, **settings).item()
    assert mean == pytest.approx(sum(found) / len(found), abs=1e-12)
    return found


def random_rows(count=3, B=7, D=5):
    torch.manual_seed(0)
    return [torch.randn(B, D).double() for _ in range(count)]


# ---- the loss -------------------------------------------------------------------------------

def test_the_worked_example():
    """τ is 0.5: logits 1.6 of the own z', 1.2 of the other's; of the other's f 0 and 1.6."""
    e = math.exp
    by_hand = [math.log(e(1.6) + e(1.2) + e(0)) - 1.6, math.log(e(1.6) + e(1.2) + e(1.6)) - 1.6]
    plain = each(Z, Z2, OLD, temperature=.5, pseudo_weight=0.)
    learned = each(Z, Z2, OLD, temperature=.5)
    distilled = each(P, OLD, Z2, temperature=.5, pseudo_weight=0.)
    remembered = each(P, OLD, Z2, temperature=.5)
    assert plain == pytest.approx([.513015, .513015], abs=1e-6)
    assert by_hand == pytest.approx([.627123, .982198], abs=1e-6)
    assert learned == pytest.approx(by_hand)
    assert distilled == pytest.approx([.263282, .913015], abs=1e-6)
    assert remembered == pytest.approx([.833428, 1.352984], abs=1e-6)
    assert sum(learned + remembered) / 2 == pytest.approx(1.897867, abs=1e-6)
    # The positive stays in the denominator, or `remembered` would be [.263282, 1.053947].
    assert min(each(Z, Z, -Z)) >= 0


def test_weight_zero_is_info_nce_and_any_other_is_more():
    z, z2, old = random_rows()
    losses = [pseudo_negative_nce(z, z2, old, pseudo_weight=w).item() for w in (0., .5, 1., 2.)]
    assert losses[0] == pytest.approx(info_nce(z, z2).item(), rel=1e-14)
    assert losses == sorted(losses) and losses[0] < losses[1]


def test_the_own_old_vector_is_no_negative_but_that_of_others_is():
    z, z2, old = random_rows()
    changed = old.clone()
    changed[3] = torch.randn(5)
    before, after = each(z, z2, old), each(z, z2, changed)
    assert after[3] == before[3]
    assert all(a != b for i, (a, b) in enumerate(zip(before, after)) if i != 3)
    assert each(z, changed, z2)[3] != each(z, old, z2)[3]         # there it is the positive


# ---- the method -----------------------------------------------------------------------------

def pnr(**settings):
    """The method on a small encoder with dropout, head and all, and that encoder."""
    shape = EncoderConfig("bert", vocab_size=11, width=6, layers=1, heads=2, inner=5)
    torch.manual_seed(1)
    model = SentenceEncoder(Encoder(shape), pooling="cls", head=Head(6))
    for tensor in model.parameters():                             # BERT's start is nearly a point
        nn.init.normal_(tensor, std=.5)
    config = Config(method="pnr", corpus=["a", "b"], batch_size=4, **settings)
    return PNR(Corpus("a", [[f"sentence {i}" for i in range(8)]], None, "", 0), config,
               model=model), model


def encoded(model, B=4, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(11, (B, 5)).repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    vectors = model.train()(ids, mask)
    return Encoded(list(vectors.chunk(2)), 1, 9, torch.arange(B), ids, mask)


def old_vectors(model, out):
    """What the model says without dropout, through the head as in training."""
    with torch.no_grad():
        return model.head(model.eval()(out.ids[:4], out.mask[:4]))


def test_on_the_first_corpus_it_is_simcse_exactly():
    method, model = pnr()
    out = encoded(model)
    assert method.loss(out) == info_nce(out.anchor, out.positive) and not method.logs()


@pytest.mark.parametrize("w", [1., .5, 0.])
@pytest.mark.parametrize("weight", [1., .3, 0.])
def test_the_loss_adds_what_is_learned_and_what_is_remembered(w, weight):
    method, model = pnr(pseudo_weight=w, distillation_weight=weight)
    method.remember(model)
    out = encoded(model)
    old = old_vectors(model, out)
    learned = pseudo_negative_nce(out.anchor, out.positive, old, pseudo_weight=w)
    remembered = pseudo_negative_nce(method.predictor(out.anchor), old, out.positive,
                                     pseudo_weight=w)
    total = (learned + weight * remembered).item()
    assert method.loss(out).item() == pytest.approx(total, rel=1e-5)
    logs = {"plasticity_loss": learned} | ({"stability_loss": remembered} if weight else {})
    expected = {name: value.item() for name, value in logs.items()} if w or weight else {}
    assert method.logs() == pytest.approx(expected, rel=1e-5)


def test_the_previous_model_has_no_dropout_and_nobody_trains_or_saves_it():
    method, model = pnr()
    method.remember(model)
    networks, out = nn.ModuleDict({"model": model, "method": method}), encoded(model)
    before = method.previous(out.ids[:4], out.mask[:4])
    assert torch.equal(before, old_vectors(model, out)) and not before.requires_grad
    optimizer = torch.optim.AdamW(networks.parameters(), lr=.01, weight_decay=.1)
    for step in range(10):
        optimizer.zero_grad()
        networks.train()
        method.loss(encoded(model, seed=step)).backward()
        optimizer.step()
    assert torch.equal(method.previous(out.ids[:4], out.mask[:4]), before)
    assert not torch.allclose(old_vectors(model, out), before, atol=.01)
    assert all(p.grad.any() for p in method.predictor.parameters())
    assert all(name.startswith("predictor.") for name in method.state_dict())


def test_what_is_remembered_does_not_move_the_second_view():
    """Detached in the method; the loss itself would give it a gradient."""
    method, model = pnr()
    method.remember(model)
    out = encoded(model)
    z, z2 = (x.detach().requires_grad_() for x in out.columns)
    old = old_vectors(model, out)
    total = method.loss(replace(out, columns=[z, z2]))
    found, expected = (torch.autograd.grad(loss, z2)[0] for loss in (
        total, pseudo_negative_nce(z, z2, old)))
    assert torch.allclose(found, expected, atol=1e-7)
    remembered = pseudo_negative_nce(method.predictor(z), old, z2)
    assert torch.autograd.grad(remembered, z2)[0].any()


def test_the_prediction_for_a_sentence_does_not_depend_on_the_others_of_the_batch():
    """Which is why it has LayerNorm: BatchNorm would let them in."""
    method, _ = pnr()
    x = torch.randn(5, 6)
    assert torch.allclose(method.train().predictor(x)[:2], method.predictor(x[:2]), atol=1e-6)


# ---- tasks ----------------------------------------------------------------------------------

def corpus(name="a.txt", rows=64, columns=1):
    texts = [[f"{name} {column} {i}" for i in range(rows)] for column in range(columns)]
    return Corpus(name, texts, None, "", 0)


def test_halves_are_told_apart_by_finding_the_other_half():
    test = halves(["one two three four five", "six seven eight nine"])
    assert test.twins == [("one two three four five", "one two three", "four five"),
                          ("six seven eight nine", "six seven", "eight nine")]


def test_a_sentence_belongs_to_one_corpus_and_to_training_or_probe():
    """64 sentences, a tenth held out; of the 48 of b four are in a, and a tenth of the others."""
    first, second = corpus("a.txt"), corpus("x/b.txt", rows=44)
    second.columns[0][20:20] = first.columns[0][:4]
    tasks, probes = tasks_of([first, second])
    groups = [*({*task.columns[0]} for task in tasks),
              *({whole for whole, *_ in test.twins} for test in probes.values())]
    assert list(probes) == ["a", "b"]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[:i])
    assert [len(group) for group in groups] == [58, 40, 6, 4]


@pytest.mark.parametrize("long, probe", [(30, 3), (19, 7)])
def test_a_probe_is_a_tenth_of_the_long_sentences_or_of_all_where_those_are_few(long, probe):
    """70 sentences; long are those of eight words or more, whose halves say something."""
    texts = [f"{i} is a row of eight words here" if i < long else f"{i}" for i in range(70)]
    _, probes = tasks_of([Corpus("a", [texts], None, "", 0)])
    asked = [whole for whole, *_ in probes["a"].twins]
    assert len(asked) == probe and (long < 20 or all("row" in text for text in asked))


@pytest.mark.parametrize("corpora, said", [
    ([corpus(), corpus("x/a.txt")], "of different names, none of them called test, found a a"),
    ([corpus(), corpus("x/test.txt")], "none of them called test, found a test"),
    ([corpus(), corpus("b.txt", columns=3)], "without labels, found 3 columns in b.txt"),
    ([corpus(), corpus("b.txt", rows=15)], "at least 20 sentences in b.txt beside its probe"),
    ([corpus(), corpus("b.txt")], "keeps the last step of each task, found --dev stsb"),
])
def test_what_cannot_be_learned_in_turn_is_refused_in_a_sentence(corpora, said):
    config = Config(method="pnr", dev="stsb", batch_size=8)
    with pytest.raises(ValueError, match=said):
        PNR.check(config, corpora, None)


def test_the_settings_and_the_folder_of_a_run_name_all_its_corpora():
    config = parse(["--method", "pnr", "--corpus", "wiki1m", "x/reviews.txt"])
    assert config.corpus == ["wiki1m", "x/reviews.txt"]
    assert parse(["--corpus", "wiki1m"]).corpus == "wiki1m"       # one stays a plain name
    folder = default_folder(Config(method="pnr", corpus=config.corpus))
    assert folder.name == "pnr-mini-wiki1m-reviews"


# ---- whole runs -----------------------------------------------------------------------------

FLAGS = dict(steps=3, learning_rate=1e-3, precision="fp32", device="cpu")
KINDS = {"pnr": {}, "distillation": dict(pseudo_weight=0.),
         "fine-tuning": dict(pseudo_weight=0., distillation_weight=0.)}


@pytest.fixture(scope="module")
def train(given, tmp_path_factory):
    """train(out, ...): a run on two corpora of 48 sentences; its folder."""
    top = tmp_path_factory.mktemp("runs")

    def run(out, *, resume=False, **settings):
        inputs = mincse.read_inputs(given("pnr", **FLAGS | settings))
        mincse.run(inputs, inputs.config, top / out, resume=resume)
        return top / out
    return run


@pytest.fixture(scope="module")
def runs(train):
    return {name: train(name, **settings) for name, settings in KINDS.items()}


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_sequence_leaves_a_model_and_a_matrix(runs):
    folder = runs["pnr"]
    found = results(folder)
    matrix = found["matrix"]
    assert list(matrix) == ["before", "after 1", "after later"]
    assert all(set(row) == {"1", "later", "test"} for row in matrix.values())
    learned = [[matrix[f"after {task}"][name] for name in ("1", "later")]
               for task in ("1", "later")]
    assert (found["average"], found["forgetting"]) == pytest.approx(what_is_left(learned))
    assert matrix["before"]["test"] == pytest.approx(found["before"]["avg"])
    assert matrix["after later"]["test"] == pytest.approx(found["test"]["avg"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in lines] == [matrix["after 1"], matrix["after later"]]
    assert {"plasticity_loss", "stability_loss"} <= lines[1].keys() - lines[0].keys()
    text = (folder / "results.md").read_text()
    assert " after later |" in text and "forgetting" in text
    args = json.loads((folder / "args.json").read_text())["config"]
    assert [name.rpartition("/")[2] for name in args["corpus"]] == ["1.txt", "later.txt"]


def test_a_score_that_is_no_number_is_nan_in_the_matrix(given, runs, tmp_path):
    """JSON has none, so metrics.jsonl says null."""
    inputs = mincse.read_inputs(given("pnr", **FLAGS))
    job = mincse.build(inputs, inputs.config)
    lines = run_folder.lines(runs["pnr"])
    lines[1]["scores"]["test"] = math.nan
    for line in lines:
        run_folder.add_line(tmp_path, line)
    assert "null" in (tmp_path / "metrics.jsonl").read_text()
    text, found = job.method.report(job, run_folder.lines(tmp_path))
    assert "nan |" in text and math.isnan(found["matrix"]["after later"]["test"])


def test_the_first_task_is_the_same_for_all_and_then_they_part_ways(runs):
    first = [results(folder)["matrix"]["after 1"] for folder in runs.values()]
    assert first[0] == first[1] == first[2]
    ends = [(folder / "model.safetensors").read_bytes() for folder in runs.values()]
    assert len(set(ends)) == 3


def test_with_both_weights_zero_it_is_simcse_on_each_corpus_in_turn(
        train, given, tmp_path, monkeypatch):
    """Two plain runs on what the tasks train on, the second from the folder of the first, with the
    seed of its turn. Mean pooling has no head, of which a folder keeps nothing."""
    def never(model):
        raise AssertionError("a previous model is of no use here")
    monkeypatch.setattr("papers.pnr.frozen", never)
    folder = train("mean", pooling="mean", **KINDS["fine-tuning"])
    paths, encoder = given("pnr")["corpus"], given("pnr")["encoder"]
    tasks, _ = tasks_of([read_corpus(path) for path in paths])
    for number, task in enumerate(tasks):
        path = tmp_path / f"{number}.txt"
        path.write_text("".join(f"{text}\n" for text in task.columns[0]))
        inputs = mincse.read_inputs(given("simcse", **FLAGS, corpus=str(path), pooling="mean",
                                          encoder=str(encoder), seed=42 + 1000 * number))
        encoder = tmp_path / f"run-{number}"
        mincse.run(inputs, inputs.config, encoder)
    plain, found = (load_file(each / "model.safetensors") for each in (encoder, folder))
    assert plain.keys() == found.keys() and all(torch.equal(plain[k], found[k]) for k in plain)


def test_the_head_is_drawn_as_in_simcse(given):
    """So that the first task is, with a head, what a plain run is."""
    jobs = [mincse.build(inputs, inputs.config) for inputs in (
        mincse.read_inputs(given("pnr")), mincse.read_inputs(given("simcse")))]
    assert torch.equal(jobs[0].model.head.weight, jobs[1].model.head.weight)


def test_a_task_goes_on_from_all_that_the_last_one_left(train, given, tmp_path, monkeypatch):
    """Head and predictor too. Both take as many steps as the smaller corpus has in an epoch."""
    first, later = given("pnr")["corpus"]
    few = "\n".join(Path(later).read_text().splitlines()[:24])
    (tmp_path / "few.txt").write_text(few)
    turns, train_on = [], mincse.train_on

    def spy(job, stop, rows, **plan):
        before = {name: x.clone() for name, x in job.networks.state_dict().items()}
        loss = train_on(job, stop, rows, **plan)
        after = {name: x.clone() for name, x in job.networks.state_dict().items()}
        turns.append((job, rows, plan, before, after))
        return loss
    monkeypatch.setattr(mincse, "train_on", spy)
    train("spied", steps=0, corpus=[first, str(tmp_path / "few.txt")])
    (_, rows1, plan1, _, left), (job, rows2, plan2, found, _) = turns
    assert all(torch.equal(left[name], x) for name, x in found.items())
    assert {"model.head.weight", "method.predictor.0.weight"} <= left.keys()
    assert not job.optimizer.state and (plan1["number"], plan2["number"]) == (0, 1)
    assert (len(rows1), len(rows2)) == (44, 22)                   # of 48 and 24
    assert plan1["steps"] == plan2["steps"] == 22 // 8


def test_stopped_in_the_second_task_it_begins_that_anew_and_ends_with_the_same_bits(
        train, runs, stopped_in_turn, capsys):
    assert stopped_in_turn(5, train, "parts") == 130
    assert "stopped at step 1 of 2" in capsys.readouterr().err
    parts = train("parts", resume=True)
    for name in ("model.safetensors", "metrics.jsonl", "results.json"):
        assert (parts / name).read_bytes() == (runs["pnr"] / name).read_bytes(), name


# ---- measures -------------------------------------------------------------------------------

def test_forgetting_counts_from_the_best_and_is_negative_where_later_tasks_helped():
    """Forgotten in the worked example: (80 - 74 + 72 - 70) / 2."""
    assert what_is_left([[80, 50, 60], [76, 72, 58], [74, 70, 81]]) == pytest.approx((75, 4))
    _, forgetting = what_is_left([[10, 0, 0], [30, 20, 0], [20, 50, 5]])
    assert forgetting == ((30 - 20) + (20 - 50)) / 2

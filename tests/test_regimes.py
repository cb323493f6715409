"""Outer loops: federated rounds and sequences of corpora, against single runs and by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import config
import data
import mincse
import regimes
import runs
from config import Config
from regimes import Drift, average, balanced_dirichlet, halves, hold_out, taking_part, tasks_of


def results(folder):
    return json.loads((folder / "results.json").read_text())


def timeless(folder):
    """All but losses, which are means since the line before, and so of other steps after a stop."""
    found = results(folder)
    return found | {"rounds": [{k: v for k, v in row.items() if k != "loss"}
                               for row in found.get("rounds", [])]}


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the average ----------------------------------------------------------------------------

def test_fed_avg_weighs_clients_by_their_sentences():
    ones, threes = ({"x": torch.tensor([value])} for value in (1., 3.))
    assert average([ones, threes], [1, 3])["x"].item() == 2.5
    assert average([ones, threes], [1, 1])["x"].item() == 2.0


def test_with_shards_of_one_size_weighted_and_plain_mean_are_the_same():
    """So the authors' plain mean and McMahan's weighted one agree on a balanced split."""
    torch.manual_seed(0)
    states = [{"x": torch.randn(7, 5)} for _ in range(3)]
    plain = sum(state["x"].double() for state in states) / 3
    assert torch.equal(average(states, [29, 29, 29])["x"], average(states, [1, 1, 1])["x"])
    assert torch.allclose(average(states, [29] * 3)["x"].double(), plain, atol=1e-7)


def test_the_mean_of_equal_models_is_that_model_bit_by_bit():
    torch.manual_seed(0)
    state = {"x": torch.randn(101), "count": torch.tensor(7)}
    assert equal(average([state] * 3, [3, 5, 9]), state)


def test_whole_numbers_are_those_of_the_first_client():
    states = [{"n": torch.tensor([n, 2 * n])} for n in (3, 8)]
    assert average(states, [1, 1])["n"].tolist() == [3, 6]


# ---- the split ------------------------------------------------------------------------------

LABELS = torch.arange(6).repeat(300)


def effective_classes(shards):
    """exp of the entropy of the classes, mean over clients."""
    shares = [torch.bincount(LABELS[shard], minlength=6) / len(shard) for shard in shards]
    return sum(math.exp(torch.special.entr(p).sum()) for p in shares) / len(shares)


@pytest.mark.parametrize("alpha", [.01, .1, .5, 100.])
@pytest.mark.parametrize("clients", [1, 7, 8])
def test_every_client_gets_as_much_and_no_sentence_twice(alpha, clients):
    shards = balanced_dirichlet(LABELS, clients, alpha=alpha, seed=3)
    assert [len(shard) for shard in shards] == [1800 // clients] * clients
    dealt = [row for shard in shards for row in shard]
    assert len(set(dealt)) == len(dealt) and all(shard == sorted(shard) for shard in shards)
    assert shards == balanced_dirichlet(LABELS, clients, alpha=alpha, seed=3)


def test_another_seed_deals_otherwise():
    assert (balanced_dirichlet(LABELS, 8, alpha=.1, seed=3)
            != balanced_dirichlet(LABELS, 8, alpha=.1, seed=4))


@pytest.mark.parametrize("alpha, expected", [(.1, 1.9), (.5, 3.5), (100., 6.)])
def test_alpha_sets_how_many_classes_a_client_knows(alpha, expected):
    """The first client of 60 drawn from a full bag: the Dirichlet's own effective number."""
    found = [effective_classes(balanced_dirichlet(LABELS, 20, alpha=alpha, seed=seed)[:1])
             for seed in range(120)]
    assert sum(found) / len(found) == pytest.approx(expected, abs=.25)


def test_clients_know_more_classes_the_higher_alpha_is():
    found = [effective_classes(balanced_dirichlet(LABELS, 8, alpha=alpha, seed=0))
             for alpha in (.05, .5, 5., 100.)]
    assert found == sorted(found) and found[0] < 3 < 5.8 < found[-1]


def test_where_the_liked_classes_run_out_any_sentence_will_do():
    labels = torch.tensor([0] * 2 + [1] * 98)
    shards = balanced_dirichlet(labels, 2, alpha=1e-3, seed=0)
    assert [len(shard) for shard in shards] == [50, 50]


def test_clients_of_a_round_depend_on_seed_and_round_alone():
    fed = Config(clients=8, client_share=.5, seed=1)
    chosen = [taking_part(fed, number) for number in range(1, 9)]
    assert all(len(set(some)) == 4 for some in chosen) and len(set(map(tuple, chosen))) > 4
    assert chosen[0] == taking_part(replace(fed, scl_weight=0., learning_rate=1.), 1)
    assert taking_part(replace(fed, client_share=1.), 5) == list(range(8))
    assert len(taking_part(replace(fed, client_share=.01), 5)) == 1


def test_the_probe_shares_no_text_with_the_rest_and_is_a_tenth():
    texts = [f"text {i % 90}" for i in range(100)]
    probe, rest = hold_out(texts, range(100))
    assert len(probe) == 10 and not {texts[i] for i in probe} & {texts[i] for i in rest}
    assert len(rest) >= 80 and (probe, rest) == hold_out(texts, range(100))


def test_drift_is_the_mean_cosine_distance_from_the_global_model():
    origin = torch.tensor([[1., 0], [0, 2]])
    drift = Drift(["a", "b"], origin)
    assert drift.score(lambda texts: origin * 3).scores["drift"] == pytest.approx(0)
    assert drift.score(lambda texts: origin[[1, 0]]).scores["drift"] == 1
    assert drift.score(lambda texts: torch.eye(2)[[0, 0]]).scores["drift"] == .5


# ---- a federation ---------------------------------------------------------------------------

FED = dict(method="fedrcl", clients=3, rounds=2, client_share=.7, classes=3, steps=2, levels=2)


def test_a_federation_leaves_a_model_and_a_line_a_round(program, pairs, tmp_path, capsys):
    folder = program(**FED, dev=pairs, alpha=1.)
    found = results(folder)
    assert found["steps"] == 2 and set(found["test"]) == {"pairs", "avg"}
    lines = runs.lines(folder)
    assert [line["step"] for line in lines] == [1, 2] == [row["step"] for row in found["rounds"]]
    for line in lines:
        assert {"loss", "drift", "same_class_cosine", "between_class_cosine",
                "participation_ratio", "class_accuracy", "dev"} <= line.keys()
        assert line["drift"] > 0 and 1 <= line["participation_ratio"] <= 32
    text = (folder / "results.md").read_text()
    assert "round 2" in text and "Of 3 clients 2 train in a round" in text
    assert not (folder / "stages").exists() and not (folder / "state.pt").exists()
    assert "classes: " in capsys.readouterr().err


def federation(program, monkeypatch, **settings):
    """A federation, and what each of its stages was given and left."""
    stages, run_stage = [], mincse.run_stage

    def spy(folder, inputs, config, name):
        left = run_stage(folder, inputs, config, name)
        stages.append((inputs, config, name, *left))
        return left
    monkeypatch.setattr(mincse, "run_stage", spy)
    return program(**FED | settings), stages


def test_a_round_is_local_training_from_one_model_and_then_the_mean(program, monkeypatch):
    folder, stages = federation(program, monkeypatch)
    names = [stage[2] for stage in stages]
    assert len(names) == 4 and names[0].startswith("round-1") and names[3].startswith("round-2")
    (first, *_, left1, _), (second, *_, left2, _) = stages[:2]
    encoder = [name for name in left1 if name.startswith("model.")]
    assert all(torch.equal(first.start[name], second.start[name]) for name in encoder)
    third = stages[2][0].start
    for name in [*encoder, "method.classifier.weight"]:
        assert torch.allclose(third[name], (left1[name] + left2[name]) / 2, atol=1e-7), name
    ends = [stage[3] for stage in stages[2:]]
    final = weights(folder)["embeddings.word_embeddings.weight"]
    assert torch.allclose(final, (ends[0]["model.encoder.words.weight"]
                                  + ends[1]["model.encoder.words.weight"]) / 2, atol=1e-7)


def test_clients_see_their_own_sentences_and_classes_and_none_of_the_probe(
        program, monkeypatch, sentences):
    _, stages = federation(program, monkeypatch)
    texts = sentences.read_text().splitlines()
    probe, rest = hold_out(texts, range(64))
    assert len(probe) == 6
    shards, known = {}, {}
    for inputs, _, name, left, _ in stages:
        own = inputs.corpus.columns[0]
        assert len(own) == 58 // 3 and not set(own) & {texts[i] for i in probe}
        labels = left["method.labels"].tolist()
        assert all(known.setdefault(text, label) == label for text, label in zip(own, labels))
        shards.setdefault(name.split("client-")[1], own)
        assert shards[name.split("client-")[1]] == own            # the same in every round
    a, b, *_ = shards.values()
    assert not set(a) & set(b)


def test_each_client_and_round_has_dropout_rate_and_optimizer_of_its_own(program, monkeypatch):
    _, stages = federation(program, monkeypatch, learning_rate=1e-3)
    seeds = [own.seed for _, own, *_ in stages]
    assert len(set(seeds)) == 4 and min(abs(a - b) for a in seeds for b in seeds if a != b) >= 1000
    assert [own.learning_rate for _, own, *_ in stages] == pytest.approx(
        [1e-3, 1e-3, 1e-3 * .998, 1e-3 * .998])
    assert all(own.dev == "none" and inputs.dev is None for inputs, own, *_ in stages)


def test_one_client_in_one_round_is_centralised_training_step_for_step(
        program, tiny, pairs, sentences, tmp_path):
    """The same sentences as a corpus of their own, with the classes that the federation found."""
    alone = program(method="fedrcl", clients=1, client_share=1., rounds=1, classes=3, levels=2,
                    steps=5, out="federated")
    texts = sentences.read_text().splitlines()
    _, rest = hold_out(texts, range(64))
    given = dict(encoder=str(tiny), corpus=str(sentences), test=str(pairs), batch_size=8, steps=5,
                 method="fedrcl", classes=3, levels=2)
    inputs = mincse.read_inputs(given)
    whole = mincse.build(inputs, inputs.config)
    whole.parts["method"].prepare(whole.encode, 42)
    start = regimes.snapshot(whole) | {"method.labels": whole.parts["method"].labels[rest]}
    inputs = replace(inputs, corpus=regimes.part(inputs.corpus, rest), start=start)
    central = tmp_path / "central"
    mincse.run(inputs, inputs.config, central,
               {"resume": False, "overwrite": False, "keep_state": False})
    assert equal(weights(alone), weights(central))


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_federation_stopped_in_any_client_goes_on_exactly(program, stopped, capsys, step):
    flags = FED | {"steps": 2}
    whole = program(out="whole", **flags)
    assert stopped(step, program, out="parts", **flags) == 130
    assert capsys.readouterr().err.rstrip().endswith("--resume")
    parts = program("--resume", out="parts", **flags)
    assert equal(weights(whole), weights(parts))
    assert timeless(whole) == timeless(parts)


def test_finished_clients_are_not_trained_again(program, stopped, monkeypatch):
    stopped(3, program, **FED)                                    # in the second client
    trained, fit = [], mincse.fit
    monkeypatch.setattr(mincse, "fit", lambda job, folder, *rest: trained.append(
        folder.name.split("-client")[0]) or fit(job, folder, *rest))
    program("--resume", **FED)
    assert trained == ["round-1", "round-2", "round-2"]


def test_a_federation_is_as_protected_as_any_run(program, capsys):
    program(**FED)
    with pytest.raises(SystemExit) as refused:
        program(**FED)
    assert refused.value.code == 2 and "holds a finished run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        program("--resume", **FED | {"alpha": 1.})
    assert "was started with --alpha 0.1, found 1.0" in capsys.readouterr().err


def test_overwriting_forgets_the_clients_of_the_old_federation(program, stopped):
    whole = program(out="whole", **FED, seed=7)
    stopped(3, program, out="again", **FED, seed=8)
    again = program("--overwrite", out="again", **FED, seed=7)
    assert equal(weights(whole), weights(again))


def test_seeds_work_for_a_federation(program):
    folder = program("--seeds", "0-1", **FED | {"rounds": 1})
    assert set(results(folder)["seeds"]) == {"0", "1"}
    alone = program(out="alone", **FED | {"rounds": 1}, seed=1)
    assert results(folder / "seed-1") == results(alone)           # nothing leaks out of seed 0


def test_without_clients_fedrcl_is_a_plain_run_on_the_whole_corpus(program):
    folder = program("--keep-state", method="fedrcl", classes=3, levels=2)
    labels = torch.load(folder / "state.pt")["parts"]["method.labels"]
    assert len(labels) == 64 and labels.min() >= 0
    assert {"ce_loss", "contrast", "penalty", "close_mates"} <= runs.lines(folder)[-1].keys()


# ---- a sequence -----------------------------------------------------------------------------

@pytest.fixture
def others(tmp_path):
    """A second corpus of 48 sentences; four of the first are in it, too."""
    path = tmp_path / "others.txt"
    path.write_text("the dog digs.\nthe dog sleeps.\na cat digs.\na cat sleeps.\n" + "".join(
        f"{a} {b}.\n" for a in ("stars", "rain", "snow", "wind")
        for b in ("falls", "is cold", "comes late", "is far", "was here", "shines", "stops",
                  "starts now", "is loud", "is old", "is new")))
    return path


def sequence(program, sentences, others, *flags, **settings):
    """program() gives one value a flag, and --corpus takes two here."""
    settings = {"corpus": sentences, "steps": 3, "method": "pnr"} | settings
    return program("--corpus", str(sentences), str(others), *flags, **settings)


def test_halves_are_told_apart_by_finding_the_other_half():
    test = halves(["one two three four five", "six seven eight nine"])
    assert test.twins == [("one two three four five", "one two three", "four five"),
                          ("six seven eight nine", "six seven", "eight nine")]


def test_a_sentence_belongs_to_one_corpus_and_to_training_or_probe(sentences, others):
    corpora = [data.read_corpus(str(path)) for path in (sentences, others)]
    (first, second), probes = tasks_of(corpora)
    texts = [set(first.columns[0]), set(second.columns[0])]
    asked = [{whole for whole, *_ in test.twins} for test in probes.values()]
    groups = [*texts, *asked]
    assert list(probes) == ["sentences", "others"]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[:i])
    assert [len(group) for group in groups] == [58, 40, 6, 4]


@pytest.mark.parametrize("flags", [{}, {"method": "simcse"}, {"pseudo_weight": 0.}])
def test_a_sequence_leaves_a_model_and_a_matrix(program, sentences, others, flags):
    folder = sequence(program, sentences, others, **flags)
    found = results(folder)
    assert list(found["matrix"]) == ["random weights", "before", "after sentences", "after others"]
    assert all(set(row) == {"sentences", "others", "test"} for row in found["matrix"].values())
    rows = [[found["matrix"][f"after {name}"][task] for task in ("sentences", "others")]
            for name in ("sentences", "others")]
    chance = [found["matrix"]["random weights"][task] for task in ("sentences", "others")]
    assert found["transfer"] == pytest.approx(regimes.transfer(rows, chance))
    assert found["matrix"]["before"]["test"] == pytest.approx(found["before"]["avg"])
    assert found["matrix"]["after others"]["test"] == pytest.approx(found["test"]["avg"])
    env = json.loads((folder / "env.json").read_text())["corpus"]
    assert (env["rows"], [each["rows"] for each in env["later"]]) == (64, [48])
    text = (folder / "results.md").read_text()
    assert " after others |" in text and "forgetting" in text
    assert not (folder / "stages").exists()


def test_together_all_corpora_are_one_with_the_steps_of_all_and_the_same_probes(
        program, sentences, others, tmp_path):
    """Equal, to the bit, to simcse on one file that holds what the tasks train on."""
    joint = sequence(program, sentences, others, method="simcse", order="together", out="joint")
    found = results(joint)
    assert list(found["matrix"]) == ["random weights", "before", "after all of them"]
    assert found["transfer"] == {"average": pytest.approx(
        (found["matrix"]["after all of them"]["sentences"]
         + found["matrix"]["after all of them"]["others"]) / 2)}
    tasks, _ = tasks_of([data.read_corpus(str(path)) for path in (sentences, others)])
    one = tmp_path / "one.txt"
    one.write_text("\n".join(text for task in tasks for text in task.columns[0]))
    plain = program(corpus=one, method="simcse", steps=6, out="plain")
    assert all(torch.equal(weights(joint)[name], x) for name, x in weights(plain).items())


def test_the_first_task_is_simcse_and_the_baselines_part_ways_after_it(
        program, sentences, others):
    folders = {name: sequence(program, sentences, others, out=name, learning_rate=1e-3, **flags)
               for name, flags in {"pnr": {}, "simcse": {"method": "simcse"},
                                   "distil": {"pseudo_weight": 0.}}.items()}
    first = [results(folder)["matrix"]["after sentences"] for folder in folders.values()]
    assert first[0] == first[1] == first[2]
    ends = [weights(folder)["encoder.layer.0.output.dense.weight"] for folder in folders.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_a_task_goes_on_from_all_that_the_last_one_left(program, sentences, others, monkeypatch):
    stages, run_stage = [], mincse.run_stage

    def spy(folder, inputs, config, name):
        left = run_stage(folder, inputs, config, name)
        stages.append((inputs, config, *left))
        return left
    monkeypatch.setattr(mincse, "run_stage", spy)
    sequence(program, sentences, others)
    (first, one, left, _), (second, two, _, _) = stages
    assert first.start is None and equal(second.start, left)
    assert {"model.head.weight", "method.predictor.0.weight"} <= left.keys()
    assert one.seed == 42 != two.seed and one.steps == two.steps == 3
    job = mincse.build(second, two)
    frozen, = job.parts["method"].previous
    assert equal(frozen.state_dict(), job.model.state_dict())
    trained = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in frozen.parameters()}


def test_without_steps_every_task_gets_those_of_the_smallest_corpus(
        program, sentences, others, monkeypatch):
    taken, run_stage = [], mincse.run_stage
    monkeypatch.setattr(mincse, "run_stage", lambda folder, inputs, config, name: taken.append(
        config.steps) or run_stage(folder, inputs, config, name))
    sequence(program, sentences, others, steps=0)
    assert taken == [40 // 8] * 2


@pytest.mark.parametrize("step", [2, 5])
def test_a_sequence_stopped_in_any_task_goes_on_exactly(
        program, sentences, others, stopped, capsys, step):
    def run(*flags, **settings):
        return sequence(program, sentences, others, *flags, **settings)
    whole = run(out="whole", learning_rate=1e-3)
    assert stopped(step, run, out="parts", learning_rate=1e-3) == 130
    assert capsys.readouterr().err.rstrip().endswith("--resume")
    parts = run("--resume", out="parts", learning_rate=1e-3)
    assert equal(weights(whole), weights(parts)) and results(whole) == results(parts)


# ---- one corpus, and wrong uses -------------------------------------------------------------

def test_one_corpus_stays_a_plain_name_in_the_settings(program, sentences, others):
    args = json.loads((program() / "args.json").read_text())
    assert args["config"]["corpus"] == str(sentences)
    assert config.parser().parse_args(["--corpus", "wiki1m"]).corpus == "wiki1m"
    folder = sequence(program, sentences, others, out="two")
    args = json.loads((folder / "args.json").read_text())
    assert args["config"]["corpus"] == [str(sentences), str(others)]


def test_the_folder_of_a_sequence_names_all_its_corpora():
    assert runs.default_folder(Config(method="pnr", corpus=["wiki1m", "x/reviews.txt"])).name == (
        "pnr-mini-wiki1m-reviews")
    assert runs.default_folder(Config(corpus="x/reviews.txt")).name == "simcse-mini-reviews"


def corpus(name="a.txt", rows=64, columns=1):
    texts = [[f"{name} {column} {i}" for i in range(rows)] for column in range(columns)]
    return data.Corpus(name, texts, None, "", 0)


@pytest.mark.parametrize("settings, corpora, said", [
    (dict(clients=4), [corpus()], "--clients 4: --method simcse has no classes to split by"),
    (dict(method="pnr"), [corpus()], "found a.txt alone: give --corpus two names or more"),
    (dict(method="fedrcl", clients=9), [corpus()],
     "expected at least --batch-size 8 sentences for each, found 6"),
    (dict(method="is-cse"), [corpus(), corpus("b.txt")], "--method is-cse takes one corpus"),
    (dict(dev="stsb"), [corpus(), corpus("b.txt")], "keeps the last step of each task"),
    (dict(method="pnr", order="together"), [corpus(), corpus("b.txt")], "--order together: "),
    (dict(), [corpus(), corpus("x/a.txt")], "corpora of different names, found one twice"),
    (dict(), [corpus(), corpus("b.txt", columns=3)], "without labels, found 3 columns in b.txt"),
    (dict(), [corpus(), corpus("b.txt", rows=15)], "at least 20 sentences in b beside its probe"),
])
def test_what_no_regime_can_do_is_refused_in_a_sentence(settings, corpora, said):
    given = [each.name for each in corpora]
    config = replace(Config(dev="none", batch_size=8), corpus=given if len(given) > 1 else given[0],
                     **settings)
    with pytest.raises(ValueError, match=said):
        regimes.check(config, corpora)


def test_a_refusal_comes_before_the_first_step_with_exit_code_2(program, capsys, tmp_path):
    with pytest.raises(SystemExit) as refused:
        program(method="pnr")
    assert refused.value.code == 2 and "one corpus after the other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_many_stages_there_are(program, sentences, others, tmp_path, capsys):
    program("--dry-run", **FED)
    assert "stages: 4; below, one on" in capsys.readouterr().out
    sequence(program, sentences, others, "--dry-run")
    assert "stages: 2; below, one on" in capsys.readouterr().out
    program("--dry-run")
    assert "stages" not in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, said", [
    (dict(rounds=0), "--rounds: expected above 0"), (dict(alpha=0.), "--alpha: expected above 0"),
    (dict(client_share=1.5), "--client-share: expected from 0 to 1"),
    (dict(classes=1), "--classes: expected 2 or more"), (dict(clients=-1), "--clients: expected 0"),
    (dict(levels=0), "--levels: expected above 0"),
    (dict(penalty_threshold=2.), "--penalty-threshold: expected from 0 to 1")])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(settings, said):
    with pytest.raises(ValueError, match=said):
        config.validate(Config(**settings))

"""SparseCSE, in the style of: which heads and neurons a sentence encoder does not need."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pruning
from data import Tokenizer, read_corpus
from folders import load
from losses import alignment, uniformity
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from pruning import (CRITERIA, blend, both_halves, gated, masks, ones, pruned, remove, score,
                     slopes)

ROOT = Path(__file__).parent.parent

# ---- the score: a toy of three gates --------------------------------------------------------

FIRST = torch.tensor([[1, 2, .1], [-1, .5, .1]]).double()
SECOND = torch.tensor([[1.2, 1.8, .1], [-.8, .7, .1]]).double()


def toy(gates=(1, 1, 1)):
    """Alignment of two pairs and uniformity of their first sides, behind three gates."""
    xi = torch.tensor([gates]).double().requires_grad_()
    return alignment(xi * FIRST, xi * SECOND), uniformity(xi * FIRST), {"toy": xi}


def test_the_losses_of_the_toy():
    align, uniform, _ = toy()
    assert align.item() == pytest.approx(.039830, abs=1e-6)
    assert uniform.item() == pytest.approx(-3.984080, abs=1e-6)


def test_the_scores_of_the_toy():
    align, uniform, gates = toy()
    a, u = slopes(align, gates), slopes(uniform, gates)
    assert a["toy"][0].tolist() == pytest.approx([-.015859, .016405, -.000545], abs=1e-6)
    assert u["toy"][0].tolist() == pytest.approx([-3.199907, 3.168224, .031683], abs=1e-6)
    a, u = {"toy": a["toy"].abs()}, {"toy": u["toy"].abs()}
    for weight, expected in ((1, [.694853, .718748, .023895]), (0, [.710598, .703563, .007036]),
                             (.5, [.702726, .711156, .015466])):
        # The 1e-7 beside the norm shows at the fifth digit of slopes as small as these.
        assert blend(a, u, weight=weight)["toy"][0].tolist() == pytest.approx(expected, abs=5e-6)


def test_a_common_factor_of_all_gates_changes_nothing_so_slopes_sum_to_zero():
    align, uniform, gates = toy((.5, 2, 1))
    for loss in (align, uniform):
        assert (gates["toy"] * slopes(loss, gates)["toy"]).sum().abs() < 1e-6


@pytest.mark.parametrize("gates, align, uniform", [
    ((1, 1, 0), .040105, -4), ((1, 0, 1), .000441, -7.920792), ((0, 1, 1), .001555, -.043397)])
def test_what_dropping_a_gate_of_the_toy_does(gates, align, uniform):
    """The lowest score hardly matters; the highest is best dropped, by both measures."""
    found = toy(gates)
    assert found[0].item() == pytest.approx(align, abs=1e-6)
    assert found[1].item() == pytest.approx(uniform, abs=1e-6)


def test_the_criterion_of_the_paper_drops_what_matters_least_and_the_signed_one_what_harms():
    align, uniform, gates = toy()
    a, u = slopes(align, gates), slopes(uniform, gates)
    sums = {"signed alignment": a, "signed uniformity": u,
            "alignment": {"toy": a["toy"].abs()}, "uniformity": {"toy": u["toy"].abs()}}
    for criterion, first in (("contribution", 2), ("signed", 1)):
        importance = CRITERIA[criterion](None, sums, .5, 0)
        assert masks(importance, 34)["toy"][0].tolist() == [float(k != first) for k in range(3)]


def test_uniformity_runs_from_collapse_to_two_poles():
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1., 0], [-1, 0]])).item() == pytest.approx(-8, abs=1e-6)


def random_units(seed=0, shapes=(("heads", (3, 4)), ("neurons", (3, 50)))):
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.rand(shape, generator=generator) for kind, shape in shapes}


def test_every_layer_has_length_one_in_either_score_and_their_scale_does_not_count():
    a, u = random_units(0), random_units(1)
    for weight in (0, 1):
        for x in blend(a, u, weight=weight).values():
            assert x.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)
    for kind, x in blend({k: 9 * x for k, x in a.items()}, u).items():
        assert torch.allclose(x, blend(a, u)[kind], atol=1e-6)


def test_a_weight_of_one_asks_alignment_alone_and_none_uniformity_alone():
    a, u, other = random_units(0), random_units(1), random_units(2)
    for kind in a:
        assert torch.equal(blend(a, u, weight=1)[kind], blend(a, other, weight=1)[kind])
        assert torch.equal(blend(a, u, weight=0)[kind], blend(other, u, weight=0)[kind])


# ---- which go -------------------------------------------------------------------------------

@pytest.mark.parametrize("sparsity, heads, neurons", [
    (0, 0, 0), (1, 1, 369), (5, 7, 1843), (10, 14, 3686), (20, 29, 7373), (30, 43, 11059)])
def test_how_many_units_of_bert_base_go(sparsity, heads, neurons):
    kept = masks(random_units(0, (("heads", (12, 12)), ("neurons", (12, 3072)))), sparsity)
    assert [(x == 0).sum().item() for x in kept.values()] == [heads, neurons]


def test_halves_round_up():
    """Python's round(2.5) would be 2."""
    assert (masks({"heads": torch.rand(1, 5)}, 50)["heads"] == 0).sum() == 3


def test_the_lowest_of_all_layers_go_heads_and_neurons_apart():
    importance = {"heads": torch.tensor([[5., 1], [2, 9]]),
                  "neurons": torch.tensor([[50., 60, 70], [30, 20, 10]])}
    kept = masks(importance, 50)
    assert kept["heads"].tolist() == [[1, 0], [0, 1]]
    assert kept["neurons"].tolist() == [[1, 1, 1], [0, 0, 0]]     # a layer may lose all


def test_a_higher_sparsity_removes_the_same_and_more():
    importance = {"neurons": (random_units()["neurons"] * 5).round()}     # with many ties
    gone = [masks(importance, sparsity)["neurons"] == 0 for sparsity in (0, 3, 10, 30, 31, 99)]
    for fewer, more in zip(gone, gone[1:]):
        assert more[fewer].all() and more.sum() > fewer.sum()


# ---- gates and weights ----------------------------------------------------------------------

def some_encoder(model_type="bert", activation="gelu", **settings):
    torch.manual_seed(0)
    config = EncoderConfig(model_type, 40, 12, 3, 4, 20, activation=activation, **settings)
    model = SentenceEncoder(Encoder(config), pooling="cls").eval()
    for parameter in model.parameters():                          # biases that are not 0, too
        torch.nn.init.normal_(parameter, std=.3)
    return model


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def test_gates_of_one_and_nothing_removed_change_not_a_bit():
    model = some_encoder()
    plain = model(IDS, MASK)
    with gated(model.encoder, ones(model.encoder)):
        assert torch.equal(model(IDS, MASK), plain)
    assert torch.equal(pruned(model, ones(model.encoder))(IDS, MASK), plain)


@pytest.mark.parametrize("kind, count", [("heads", 4), ("neurons", 20)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_gate_of_zero_is_the_unit_removed(kind, count, activation, model_type):
    model = some_encoder(model_type, activation)
    plain, moved = model(IDS, MASK), 0
    for layer, unit in ((0, 0), (1, count - 1), (2, 1)):
        gates = ones(model.encoder)
        gates[kind][layer, unit] = 0
        with gated(model.encoder, gates):
            expected = model(IDS, MASK)
        found = pruned(model, gates)(IDS, MASK)
        assert (found - expected).abs().max() < 1e-5
        moved += (plain - expected).abs().max()
    assert moved > 1e-3


def test_a_head_is_what_it_adds_to_the_attention_output():
    """By hand: zeroed columns of the output projection, its bias kept."""
    model = some_encoder()
    by_hand = pruned(model, ones(model.encoder))
    with torch.no_grad():
        by_hand.encoder.layers[1].attention.output.weight[:, 6:9] = 0     # head 2 of width 3
        by_hand.encoder.layers[0].outer.weight[:, 5] = 0
    gates = ones(model.encoder)
    gates["heads"][1, 2] = gates["neurons"][0, 5] = 0
    assert (pruned(model, gates)(IDS, MASK) - by_hand(IDS, MASK)).abs().max() < 1e-5


def test_neurons_removed_and_neurons_sliced_off_agree():
    model = some_encoder()
    gates = ones(model.encoder)
    gates["neurons"][:, ::3] = 0
    sliced = pruned(model, ones(model.encoder))
    for layer, keep in zip(sliced.encoder.layers, gates["neurons"].bool()):
        layer.inner.weight.data = layer.inner.weight.data[keep]
        layer.inner.bias.data = layer.inner.bias.data[keep]
        layer.outer.weight.data = layer.outer.weight.data[:, keep]
    assert (sliced(IDS, MASK) - pruned(model, gates)(IDS, MASK)).abs().max() < 1e-5


def test_embeddings_norms_and_the_readers_biases_are_never_touched():
    model = some_encoder()
    left = pruned(model, {kind: torch.zeros_like(x) for kind, x in ones(model.encoder).items()})
    untouched = [name for name, x in model.state_dict().items()
                 if torch.equal(x, left.state_dict()[name])]
    for name in model.state_dict():
        made = any(part in name for part in ("query", "key", "value", "inner"))
        read = name.endswith(("attention.output.weight", "outer.weight"))
        assert (name in untouched) != (made or read), name


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_training_leaves_removed_units_removed(activation):
    """Without any mask: exactly zero after steps of AdamW, while the others move."""
    model = some_encoder(activation=activation)
    kept = ones(model.encoder)
    kept["heads"][0, 1] = kept["heads"][2, 3] = 0
    kept["neurons"][:, 4:9] = 0
    remove(model.encoder, kept)
    before = pruned(model, ones(model.encoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=.1)
    model.train()
    for step in range(5):
        torch.manual_seed(step)
        loss = alignment(model(IDS, MASK), model(IDS, MASK)) + uniformity(model(IDS, MASK)).float()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = 0
    for (name, x), y in zip(model.encoder.layers.named_parameters(),
                            before.encoder.layers.parameters()):
        if any(part in name for part in ("query", "key", "value", "output.weight", "inner",
                                         "outer.weight")):
            assert ((x == 0) == (y == 0)).all(), name
            moved += (x != y).sum()
    assert moved > 1000


# ---- scoring --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def opened(tiny, sentences):
    return load(tiny, pooling="cls"), Tokenizer.read(tiny), read_corpus(str(sentences)).columns[0]


def test_the_score_is_the_slow_one(opened):
    """One gate at a time, by finite differences of the two losses of one batch."""
    model, tokenizer, texts = opened
    model = pruned(model, ones(model.encoder)).double()
    halves = score_double(model, tokenizer, texts[:8], seed=5)
    ids, mask = tokenizer(texts[:8], max_tokens=32)

    def losses(gates):
        with gated(model.encoder, gates), torch.no_grad():
            torch.manual_seed(5 * 1_000_003)
            model.train()
            align = alignment(model(ids, mask), model(ids, mask))
            model.eval()
            return align, uniformity(model(ids, mask))

    for kind, layer, unit in (("heads", 0, 1), ("heads", 1, 3), ("neurons", 0, 7),
                              ("neurons", 1, 0)):
        ends = []
        for change in (1e-4, -1e-4):
            gates = {k: x.double() for k, x in ones(model.encoder).items()}
            gates[kind][layer, unit] += change
            ends.append(losses(gates))
        for name, high, low in zip(("alignment", "uniformity"), *ends):
            slope = ((high - low) / 2e-4).item()
            assert halves[0][f"signed {name}"][kind][layer, unit].item() == pytest.approx(
                slope, rel=2e-3, abs=1e-9)
            assert halves[0][name][kind][layer, unit].item() == pytest.approx(
                abs(slope), rel=2e-3, abs=1e-9)


def score_double(model, tokenizer, texts, seed):
    """`score` in double precision, so that differences are exact enough."""
    original = pruning.ones
    try:
        pruning.ones = lambda encoder: {k: x.double() for k, x in original(encoder).items()}
        return score(model, tokenizer, texts, seed=seed, batch_size=8)
    finally:
        pruning.ones = original


def test_the_absolute_value_is_of_a_batch_and_the_sum_over_batches(opened):
    model, tokenizer, texts = opened
    halves = score(model, tokenizer, texts[:24], seed=0, batch_size=8)
    sums = both_halves(halves)
    for name in ("alignment", "uniformity"):
        size, net = sums[name]["neurons"], sums[f"signed {name}"]["neurons"].abs()
        assert (size >= .999 * net).all() and (size > 1.1 * net).any()    # some cancel out
        odd = halves[1]                                           # one batch of the three
        assert torch.equal(odd[name]["neurons"], odd[f"signed {name}"]["neurons"].abs())


def test_scoring_changes_no_weight_leaves_no_gradient_no_gate_and_the_mode(opened):
    model, tokenizer, texts = opened
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        score(model, tokenizer, texts[:16], seed=0, batch_size=8)
        assert model.training == training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_two_losses_do_not_leak_into_each_other(opened, monkeypatch):
    """The alignment score is to the bit the same where uniformity is another function."""
    model, tokenizer, texts = opened
    both = score(model, tokenizer, texts[:16], seed=0, batch_size=8)
    monkeypatch.setattr(pruning, "uniformity", lambda x: x.square().sum())
    other = score(model, tokenizer, texts[:16], seed=0, batch_size=8)
    for half, again in zip(both, other):
        for kind in ("heads", "neurons"):
            assert torch.equal(half["alignment"][kind], again["alignment"][kind])
            assert not torch.equal(half["uniformity"][kind], again["uniformity"][kind])


def test_twins_without_dropout_are_refused(tiny, opened):
    model = load(tiny, pooling="cls", dropout=0.)
    with pytest.raises(ValueError, match="expected an encoder with dropout .* found a rate of 0"):
        score(model, *opened[1:], seed=0, batch_size=8)


def test_the_magnitude_is_the_norm_of_what_reads_the_unit():
    model = some_encoder()
    found = CRITERIA["magnitude"](model, {}, .5, 0)
    layer = model.encoder.layers[1]
    assert found["heads"][1, 2].item() == pytest.approx(
        layer.attention.output.weight[:, 6:9].square().sum().sqrt().item())
    assert found["neurons"][1, 5].item() == pytest.approx(layer.outer.weight[:, 5].norm().item())


def test_the_control_knows_nothing_and_differs_by_seed():
    model = some_encoder()
    draws = [CRITERIA["random"](model, {}, .5, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0]["neurons"], draws[1]["neurons"])
    assert not torch.equal(draws[0]["neurons"], draws[2]["neurons"])


# ---- the program ----------------------------------------------------------------------------

@pytest.fixture
def prune(program, sentences, pairs, tmp_path, monkeypatch):
    """Prunes a run of the tiny encoder: prune("--sparsity", 50) -> its folder."""
    run = program(out="run", steps=2)

    def call(*flags, folder=run, out="pruned"):
        argv = [str(x) for x in (folder, "--corpus", sentences, "--test", pairs, "--out",
                                 tmp_path / out, *flags)]
        monkeypatch.setattr(sys, "argv", ["pruning.py", *argv])
        pruning.main(argv)
        return tmp_path / out
    return call


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_a_sweep_leaves_tables_and_folders(prune, capsys):
    folder = prune("--sparsity", 0, 25, 50, "--criteria", *CRITERIA, "--random-draws", 2)
    said = capsys.readouterr()
    assert said.out.count("\n| ") + 1 >= 2 + 1 + 4 * 2 and "halves agree: heads" in said.out
    rows = rows_of(folder)
    assert [(row["criterion"], row["sparsity"]) for row in rows] == [("dense", 0)] + [
        (criterion, sparsity) for criterion in CRITERIA for sparsity in (25, 50)
        for _ in range(2 if criterion == "random" else 1)]
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [float(row["avg"]) for row in table] == pytest.approx([row["avg"] for row in rows])
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "dense-0", *(f"{criterion}-{sparsity}" for criterion in CRITERIA if criterion != "random"
                     for sparsity in (25, 50))}


def test_the_dense_row_is_the_run_and_its_folder_has_the_same_vectors(prune, tmp_path):
    folder = prune("--sparsity", 50)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert rows_of(folder)[0]["avg"] == pytest.approx(results["test"]["avg"])
    for name, x in load(tmp_path / "run").state_dict().items():
        assert torch.equal(load(folder / "dense-0").state_dict()[name], x)


def test_a_pruned_folder_has_the_same_vectors_in_transformers(prune):
    transformers = pytest.importorskip("transformers")
    folder = prune("--sparsity", 50) / "contribution-50"
    model, tokenizer = load(folder), Tokenizer.read(folder)
    gone = sum((layer.outer.weight == 0).all(dim=0).sum() for layer in model.encoder.layers)
    assert gone == 64                                             # of 2 x 64 neurons
    ids, mask = tokenizer(["the dog runs home."], max_tokens=32)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()(ids, mask.long())
    ours = encode(model, tokenizer, ["the dog runs home."])
    assert torch.allclose(theirs.last_hidden_state[:, 0], ours, atol=1e-5)


def test_only_the_kind_of_unit_asked_for_is_removed(prune):
    dense, row = rows_of(prune("--sparsity", 50, "--units", "neurons", "--criteria", "signed"))
    assert row["heads left"] == dense["heads left"]
    assert row["neurons left"] == dense["neurons left"] / 2
    assert row["layers left"]["heads"] == dense["layers left"]["heads"]


@pytest.mark.parametrize("flags", [[], ["--rewind"]])
def test_what_is_left_is_trained_by_the_settings_of_the_run(prune, tmp_path, flags):
    folder = prune("--sparsity", 50, "--criteria", "contribution", "--retrain", 3, *flags)
    name = "contribution-50" + "-rewound" * bool(flags)
    before, after = load(folder / name), load(folder / f"{name}-retrained")
    for x, y in zip(before.encoder.layers.parameters(), after.encoder.layers.parameters()):
        assert (y[x == 0] == 0).all() or x.ndim == 1
    assert not all(map(torch.equal, before.parameters(), after.parameters()))
    now, then = (json.loads((path / "args.json").read_text())["config"]
                 for path in (folder / f"{name}-retrained", tmp_path / "run"))
    assert now["steps"] == 3 and now["corpus"] == then["corpus"]
    assert now["learning_rate"] == pytest.approx(then["learning_rate"] / (1 if flags else 10))
    results = json.loads((folder / f"{name}-retrained" / "results.json").read_text())
    assert rows_of(folder)[1]["retrained"] == pytest.approx(results["test"]["avg"])


def test_rewinding_begins_with_the_weights_that_the_run_began_with(prune, tiny):
    folder = prune("--sparsity", 50, "--criteria", "contribution", "--retrain", 3, "--rewind")
    start, rewound = load(tiny), load(folder / "contribution-50-rewound")
    for x, y in zip(start.encoder.parameters(), rewound.encoder.parameters()):
        assert torch.equal(x[y != 0], y[y != 0])


def test_a_stopped_pruning_goes_on_and_ends_the_same(prune, stopped, tmp_path, capsys):
    flags = ["--sparsity", 50, "--criteria", "contribution", "--retrain", 6]
    whole = prune(*flags, out="whole")
    assert stopped(9, lambda *_, **__: prune(*flags, out="parts")) == 130   # in the second training
    said = capsys.readouterr().err
    assert "go on with:" in said and "pruning.py" in said and said.rstrip().endswith("--resume")
    parts = prune(*flags, "--resume", out="parts")
    for name in ("dense-0-retrained", "contribution-50-retrained"):
        assert ((whole / name / "model.safetensors").read_bytes()
                == (parts / name / "model.safetensors").read_bytes())
    assert rows_of(whole) == rows_of(parts)


def test_the_control_is_averaged_with_its_spread():
    row = {"criterion": "random", "sparsity": 30, "heads left": 4, "neurons left": 9}
    dense = row | {"criterion": "dense", "sparsity": 0, "avg": 60.}
    first, second = pruning.averaged([dense] + [row | {"avg": avg} for avg in (50., 54.)])
    assert (first["avg"], second["avg"]) == (60, 52) and second["spread"] == pytest.approx(8 ** .5)
    lines = pruning.table([first, second]).splitlines()
    assert lines[-1].split("|")[1:-1] == ["    random ", "     30 % ", "          4 ",
                                          "            9 ", " 52.00 ", "   2.83 "]


def test_without_matplotlib_it_says_so(prune, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = prune("--sparsity", 50)
    assert "no figure, since matplotlib is not installed" in capsys.readouterr().err
    assert not (folder / "sparsity.png").exists()


def test_with_matplotlib_there_is_a_figure(prune):
    pytest.importorskip("matplotlib")
    folder = prune("--sparsity", 25, 50, "--retrain", 2)
    assert (folder / "sparsity.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("flags, said", [
    (["--weight", 2], "--weight: expected 0 to 1, found 2.0"),
    (["--random-draws", 0], "--random-draws: expected 1 or more, found 0"),
    (["--sentences", 3], "--sentences: expected 4 or more"),
    (["--rewind"], "--rewind says how to retrain: use it with --retrain STEPS"),
    (["--sparsity", 100], "expected 0 to below 100, found 100"),
    (["--device", "tpu"], "--device tpu"),
])
def test_a_wrong_use_gets_one_sentence_and_code_2(prune, capsys, flags, said):
    with pytest.raises(SystemExit) as refused:
        prune(*flags)
    assert refused.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_that_is_no_run_can_be_pruned_but_not_retrained(prune, tiny, capsys):
    prune("--sparsity", 50, folder=tiny)
    with pytest.raises(SystemExit) as refused:
        prune("--retrain", 3, folder=tiny, out="other")
    assert refused.value.code == 2 and "has no args.json" in capsys.readouterr().err


def test_a_kept_head_would_start_anew_so_only_rewinding_is_allowed(prune, program, tmp_path,
                                                                   capsys):
    triples = tmp_path / "nli.csv"
    triples.write_text("".join(f"a dog {i},an animal {i},no dog {i}\n" for i in range(16)))
    run = program(corpus=triples, out="supervised", steps=2)
    with pytest.raises(SystemExit) as refused:
        prune("--retrain", 2, folder=run)
    assert refused.value.code == 2 and "--retrain begins with a new head" in capsys.readouterr().err
    folder = prune("--sparsity", 50, "--criteria", "signed", "--retrain", 2, "--rewind", folder=run)
    assert load(folder / "signed-50").keep_head
    assert load(folder / "signed-50-rewound-retrained").keep_head


def test_what_the_out_folder_holds_is_never_lost_unasked(prune, tmp_path, capsys):
    prune("--sparsity", 50)
    for flags, said in (([], "holds a pruning: --resume goes on"),
                        (["--resume", "--weight", 1], "was begun with other settings: go on with")):
        with pytest.raises(SystemExit) as refused:
            prune("--sparsity", 50, *flags)
        assert refused.value.code == 2 and said in capsys.readouterr().err
    prune("--sparsity", 25, "--overwrite")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as refused:
        prune("--sparsity", 50, "--overwrite", out="thesis")
    assert refused.value.code == 2 and "holds no pruning" in capsys.readouterr().err


def test_what_is_not_there_is_refused_with_code_3(prune, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("one.\ntwo.\nthree.\n")
    for flags, said in ((["--corpus", "none.txt"], "none.txt: expected a file"),
                        (["--corpus", tmp_path / "few.txt"], "expected 4 sentences or more")):
        with pytest.raises(SystemExit) as refused:
            prune(*flags)
        assert refused.value.code == 3 and said in capsys.readouterr().err


def test_as_typed_it_ends_with_a_sentence_and_not_with_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "pruning.py", tmp_path / "nothing"], text=True,
                          capture_output=True, cwd=tmp_path)
    assert done.returncode == 3 and "nothing: not on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_of_papers_names_it():
    from config import listing
    assert "python pruning.py RUN" in listing() and "2311.03881" in listing()

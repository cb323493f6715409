"""SparseCSE, in the style of: which heads and neurons does a sentence encoder not need?"""

import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from data import Tokenizer, read_corpus
from engine.encoders import load
from losses import alignment, uniformity
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from papers import sparsecse
from papers.sparsecse import (CRITERIA, agreement, blend, contribution, gated, gradients, masks,
                              measure, ones, remove)

ROOT = Path(__file__).parent.parent

# ---- the score: a toy of three gates --------------------------------------------------------

FIRST = torch.tensor([[1, 2, .1], [-1, .5, .1]]).double()
SECOND = torch.tensor([[1.2, 1.8, .1], [-.8, .7, .1]]).double()


def toy(gates=(1, 1, 1)):
    """Alignment of two pairs and uniformity of their first sides, behind three gates."""
    xi = torch.tensor([gates]).double().requires_grad_()
    return [alignment(xi * FIRST, xi * SECOND), uniformity(xi * FIRST)], {"toy": xi}


def test_the_scores_of_the_toy():
    losses, gates = toy()
    assert [loss.item() for loss in losses] == pytest.approx([.039830, -3.984080], abs=1e-6)
    both = gradients(losses, gates)["toy"]                        # (2, 1, 3)
    assert both[0, 0].tolist() == pytest.approx([-.015859, .016405, -.000545], abs=1e-6)
    assert both[1, 0].tolist() == pytest.approx([-3.199907, 3.168224, .031683], abs=1e-6)
    lengths = [math.hypot(.015859, .016405, .000545), math.hypot(3.199907, 3.168224, .031683)]
    first = [.015859 / lengths[0], 3.199907 / lengths[1]]         # of the first gate: A, U
    assert first == pytest.approx([.694853, .710598], abs=5e-5)   # their mean is .7027
    for weight, expected in ((1, [.694853, .718748, .023895]), (0, [.710598, .703563, .007036]),
                             (.5, [.702726, .711156, .015466])):
        # The 1e-7 beside the norm shows at the fifth digit of slopes as small as these.
        score = blend({"toy": both.abs()}, weight=weight)["toy"][0]
        assert score.tolist() == pytest.approx(expected, abs=5e-6)


def test_a_common_factor_of_all_gates_changes_nothing_so_slopes_sum_to_zero():
    losses, gates = toy((.5, 2, 1))
    assert (gates["toy"] * gradients(losses, gates)["toy"]).sum(dim=-1).abs().max() < 1e-6


@pytest.mark.parametrize("gates, align, uniform", [
    ((1, 1, 0), .040105, -4), ((1, 0, 1), .000441, -7.920792), ((0, 1, 1), .001555, -.043397)])
def test_what_dropping_a_gate_of_the_toy_does(gates, align, uniform):
    """The lowest score hardly matters; the highest is best dropped, by both measures."""
    assert [loss.item() for loss in toy(gates)[0]] == pytest.approx([align, uniform], abs=1e-6)


@pytest.mark.parametrize("criterion, kept", [("contribution", [1, 1, 0]), ("signed", [1, 0, 1])])
def test_the_paper_drops_what_matters_least_and_the_signed_criterion_what_harms(criterion, kept):
    slopes = {"toy": gradients(*toy())["toy"][None]}              # of one batch
    assert masks(CRITERIA[criterion](slopes), 34)["toy"][0].tolist() == kept


def random_units(seed=0, *axes):
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.rand((*axes, 3, units), generator=generator)
            for kind, units in (("heads", 4), ("neurons", 20))}


def test_each_measure_has_length_one_in_every_layer_and_its_scale_does_not_count():
    both = random_units(0, 2)
    scaled = {kind: x * torch.tensor([9, .1])[:, None, None] for kind, x in both.items()}
    for weight, measures in ((1, [0]), (0, [1]), (.5, [0, 1])):   # alone, alone, together
        for kind, x in blend(scaled, weight=weight).items():
            length = both[kind].norm(dim=-1, keepdim=True)
            expected = (both[kind] / length)[measures].mean(dim=0)
            assert torch.allclose(x, expected, atol=1e-6)


# ---- which go -------------------------------------------------------------------------------

@pytest.mark.parametrize("sparsity, heads, neurons", [
    (0, 0, 0), (5, 7, 1843), (30, 43, 11059), (50, 72, 18432)])
def test_how_many_units_of_bert_base_go(sparsity, heads, neurons):
    kept = masks({"heads": torch.rand(12, 12), "neurons": torch.rand(12, 3072)}, sparsity)
    assert [(x == 0).sum().item() for x in kept.values()] == [heads, neurons]
    assert (masks({"heads": torch.rand(1, 5)}, 50)["heads"] == 0).sum() == 3   # round(2.5) is 2


def test_the_lowest_of_all_layers_go_heads_and_neurons_apart():
    kept = masks({"heads": torch.tensor([[5., 1], [2, 9]]),
                  "neurons": torch.tensor([[50., 60, 70], [30, 20, 10]])}, 50)
    assert kept["heads"].tolist() == [[1, 0], [0, 1]]
    assert kept["neurons"].tolist() == [[1, 1, 1], [0, 0, 0]]     # a layer may lose all


def test_a_higher_sparsity_removes_the_same_and_more():
    importance = {"neurons": (random_units()["neurons"] * 5).round()}     # with many ties
    gone = [masks(importance, sparsity)["neurons"] == 0 for sparsity in (0, 3, 10, 30, 31, 99)]
    for fewer, more in zip(gone, gone[1:]):
        assert more[fewer].all() and more.sum() > fewer.sum()


# ---- gates and weights ----------------------------------------------------------------------

def some_encoder(model_type="bert", activation="gelu"):
    torch.manual_seed(0)
    config = EncoderConfig(model_type, 40, 12, 3, 4, 20, activation=activation)
    model = SentenceEncoder(Encoder(config), pooling="cls").eval()
    for parameter in model.parameters():                          # biases that are not 0, too
        torch.nn.init.normal_(parameter, std=.3)
    return model


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


@pytest.fixture(scope="module")
def encoder():
    return some_encoder()


def test_gates_of_one_and_nothing_removed_change_not_a_bit(encoder):
    plain, all_kept = encoder(IDS, MASK), ones(encoder.encoder)
    with gated(encoder.encoder, all_kept):
        assert torch.equal(encoder(IDS, MASK), plain)
    assert torch.equal(remove(encoder, all_kept)(IDS, MASK), plain)


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
        assert (remove(model, gates)(IDS, MASK) - expected).abs().max() < 1e-5
        moved += (plain - expected).abs().max()
    assert moved > 1e-3


def test_removed_heads_are_zeroed_columns_and_removed_neurons_can_be_sliced_off(encoder):
    gates, by_hand = ones(encoder.encoder), deepcopy(encoder)
    gates["heads"][1, 2] = 0
    by_hand.encoder.layers[1].attention.output.weight.data[:, 6:9] = 0    # head 2 of width 3
    gates["neurons"][:, ::3] = 0
    for layer, keep in zip(by_hand.encoder.layers, gates["neurons"].bool()):
        layer.inner.weight.data = layer.inner.weight.data[keep]
        layer.inner.bias.data = layer.inner.bias.data[keep]
        layer.outer.weight.data = layer.outer.weight.data[:, keep]
    assert (by_hand(IDS, MASK) - remove(encoder, gates)(IDS, MASK)).abs().max() < 1e-5


def test_embeddings_norms_and_the_readers_biases_are_never_touched(encoder):
    nothing = {kind: 0 * x for kind, x in ones(encoder.encoder).items()}
    left = remove(encoder, nothing).state_dict()
    for name, x in encoder.state_dict().items():
        made = any(part in name for part in ("query", "key", "value", "inner"))
        read = name.endswith(("attention.output.weight", "outer.weight"))
        assert torch.equal(x, left[name]) != (made or read), name


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_training_leaves_removed_units_removed(activation):
    """Without any mask: exactly zero after steps of AdamW, while the others move."""
    whole = some_encoder(activation=activation)
    kept = ones(whole.encoder)
    kept["heads"][0, 1] = kept["heads"][2, 3] = 0
    kept["neurons"][:, 4:9] = 0
    before = remove(whole, kept)
    model = deepcopy(before).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=.1)
    for step in range(5):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (alignment(model(IDS, MASK), model(IDS, MASK)) + uniformity(model(IDS, MASK))).backward()
        optimizer.step()
    for layer, old in zip(model.encoder.layers, before.encoder.layers):
        for name, x in layer.named_parameters():
            y = old.get_parameter(name)
            if "norm" not in name and name not in ("attention.output.bias", "outer.bias"):
                assert ((x == 0) == (y == 0)).all() and (x != y).any(), name


# ---- measuring ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def opened(tiny, sentences):
    return load(tiny, pooling="cls"), Tokenizer.read(tiny), read_corpus(str(sentences)).columns[0]


def test_each_slope_is_the_finite_difference_of_its_own_loss(opened):
    """One gate at a time, the two losses of one batch, each computed alone."""
    model, tokenizer, texts = opened
    model = deepcopy(model).double()                              # or differences are too coarse
    slopes = measure(model, tokenizer, texts[:8], batch_size=8)
    ids, mask = tokenizer(texts[:8], max_tokens=32)

    def losses(kind, layer, unit, change):
        gates = ones(model.encoder)
        gates[kind][layer, unit] += change
        with gated(model.encoder, gates), torch.no_grad():
            torch.manual_seed(0)
            align = alignment(model.train()(ids, mask), model(ids, mask))
            return torch.stack([align, uniformity(model.eval()(ids, mask))])

    for kind, *place in (("heads", 0, 1), ("heads", 1, 3), ("neurons", 0, 7), ("neurons", 1, 0)):
        slow = (losses(kind, *place, 1e-4) - losses(kind, *place, -1e-4)) / 2e-4
        assert slopes[kind][(0, slice(None), *place)].tolist() == pytest.approx(
            slow.tolist(), rel=2e-3, abs=1e-9)


def test_the_absolute_value_is_of_a_batch_and_the_sum_over_batches():
    slopes = {"toy": torch.tensor([[3., 1], [-3, 1]])[:, None, None].expand(2, 2, 1, 2)}
    assert CRITERIA["contribution"](slopes)["toy"][0].tolist() == pytest.approx(
        [6 / 40 ** .5, 2 / 40 ** .5])
    assert CRITERIA["signed"](slopes)["toy"][0].tolist() == pytest.approx([0, -1])


def test_idle_units_are_found_and_go_first(opened):
    """Planted: what every second unit says hardly counts, as its reader has weights near 0."""
    model, tokenizer, texts = opened
    idle = deepcopy(model)
    with torch.no_grad():
        for layer in idle.encoder.layers:
            layer.outer.weight[:, ::2] *= 1e-4
            layer.attention.output.weight.unflatten(1, (4, -1))[:, ::2] *= 1e-4
    kept = masks(contribution(measure(idle, tokenizer, texts, batch_size=32)), 50)
    for x in kept.values():
        assert not x[:, ::2].any() and x[:, 1::2].all()


def test_halves_agree_where_all_batches_say_the_same_and_not_where_they_differ():
    one, other = random_units(0, 1, 2), random_units(1, 1, 2)
    same = {kind: torch.cat([x, x]) for kind, x in one.items()}
    assert agreement(same) == "heads 1.00, neurons 1.00"
    found = agreement({kind: torch.cat([x, other[kind]]) for kind, x in one.items()})
    assert all(abs(float(text.split()[1])) < .7 for text in found.split(", "))


def test_measuring_changes_no_weight_and_leaves_no_gradient_and_no_gate(opened):
    model, tokenizer, texts = opened
    before = deepcopy(model.state_dict())
    measure(model, tokenizer, texts[:16], batch_size=8)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_encoder_without_dropout_is_refused(tiny, opened):
    model = load(tiny, pooling="cls", dropout=0.)
    with pytest.raises(ValueError, match="expected an encoder with dropout .* found a rate of 0"):
        measure(model, *opened[1:], batch_size=8)


def test_the_control_knows_nothing_and_differs_by_draw():
    found = []
    for slopes, draw in ((random_units(0, 5, 2), 0), (random_units(1, 7, 2), 0),
                         (random_units(0, 5, 2), 1)):
        torch.manual_seed(draw)
        found.append(CRITERIA["random"](slopes)["neurons"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---- the program ----------------------------------------------------------------------------

@pytest.fixture
def prune(tiny, sentences, pairs, tmp_path):
    """Prunes an encoder in this process: prune("--sparsity", 50) -> the folder it wrote."""
    def call(*flags, run=tiny):
        sparsecse.main([str(x) for x in (run, "--corpus", sentences, "--test", pairs, "--device",
                                         "cpu", "--out", tmp_path / "pruned", *flags)])
        return tmp_path / "pruned"
    return call


def test_a_sweep_leaves_a_table_and_what_every_criterion_leaves(prune, capsys):
    folder = prune("--sparsity", 50, 0, 25, "--criteria", *CRITERIA, "--random-draws", 2)
    found = json.loads((folder / "results.json").read_text())
    left = [f"{criterion}-{sparsity}" for criterion in CRITERIA for sparsity in (25, 50)]
    assert list(found["rows"]) == ["dense-0", *left]
    said = (folder / "results.md").read_text()
    assert said.strip() == capsys.readouterr().out.strip()
    assert f"halves agree: {found['agreement']}" in said
    *_, head, _, dense, _, _, _, _, _, last = (line.replace(" ", "") for line in said.splitlines())
    assert head == "||average|alignment|uniformity|spread|"
    control = found["rows"]["random-50"]
    assert dense.startswith("|dense-0|") and dense.endswith("|nan|")
    assert last.startswith(f"|random-50|{control['average']:.3f}|{control['alignment']:.3f}|")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*left[:4]}


def test_the_control_has_mean_and_spread_of_its_draws(prune):
    def rows(draws):
        folder = prune("--sparsity", 50, "--criteria", "random", "--random-draws", draws,
                       "--overwrite")
        return json.loads((folder / "results.json").read_text())["rows"]["random-50"]
    first = rows(1)["average"]
    both = rows(2)
    second = 2 * both["average"] - first
    assert both["spread"] == pytest.approx(abs(first - second) / 2 ** .5)


def test_the_dense_row_is_the_score_of_the_run(prune, program):
    run = program("--precision", "fp32", steps=2, device="cpu")
    found = json.loads((prune("--sparsity", 0, run=run) / "results.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert found["rows"]["dense-0"]["average"] == pytest.approx(results["test"]["avg"])


def test_a_stopped_sweep_leaves_its_rows(prune, tmp_path, monkeypatch):
    """The disk is full at the second of two pruned encoders."""
    def full(model, folder):
        if folder.name == "signed-50":
            raise OSError("no room")
    monkeypatch.setattr(sparsecse, "save", full)
    with pytest.raises(OSError, match="no room"):
        prune("--sparsity", 50, "--criteria", "contribution", "signed")
    rows = json.loads((tmp_path / "pruned" / "results.json").read_text())["rows"]
    assert list(rows) == ["dense-0", "contribution-50"]


def test_a_pruned_folder_has_the_same_vectors_in_transformers(prune):
    transformers = pytest.importorskip("transformers")
    folder = prune("--sparsity", 50, "--criteria", "contribution") / "contribution-50"
    model, tokenizer = load(folder), Tokenizer.read(folder)
    gone = sum((layer.outer.weight == 0).all(dim=0).sum() for layer in model.encoder.layers)
    assert gone == 64                                             # of 2 x 64 neurons
    ids, mask = tokenizer(["the dog runs home."], max_tokens=32)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()(ids, mask.long())
    ours = encode(model, tokenizer, ["the dog runs home."])
    assert torch.allclose(theirs.last_hidden_state[:, 0], ours, atol=1e-5)


@pytest.mark.parametrize("flags, said", [
    (["--random-draws", 0], "--random-draws: expected 1 or more, found 0"),
    (["--sentences", 3], "--sentences: expected 4 or more, for two batches, found 3"),
    (["--sparsity", 10, 100], "--sparsity: expected 0 to below 100, found [10.0, 100.0]"),
    (["--sparsity", "nan"], "--sparsity: expected 0 to below 100, found [nan]"),
    (["--device", "tpu"], "--device tpu"),
])
def test_a_wrong_use_gets_one_sentence_and_code_2(prune, capsys, flags, said):
    with pytest.raises(SystemExit) as refused:
        prune(*flags)
    assert refused.value.code == 2 and said in capsys.readouterr().err


def test_what_the_out_folder_holds_is_never_lost_unasked(prune, tmp_path, capsys):
    thesis = tmp_path / "pruned" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(SystemExit) as refused:
        prune("--sparsity", 0)
    assert refused.value.code == 2 and "pruned is not empty: choose" in capsys.readouterr().err
    assert (prune("--sparsity", 0, "--overwrite") / "results.md").is_file()
    assert thesis.read_text() == "years of work"


def test_what_is_not_there_is_refused_with_code_3(prune, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("one.\ntwo.\nthree.\n")
    for flags, said in ((["--corpus", "none.txt"], "none.txt: expected a file"),
                        (["--corpus", tmp_path / "few.txt"], "expected 4 sentences or more")):
        with pytest.raises(SystemExit) as refused:
            prune(*flags)
        assert refused.value.code == 3 and said in capsys.readouterr().err


def test_as_typed_it_ends_with_a_sentence_and_not_with_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papers.sparsecse", tmp_path / "nothing"],
                          text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 3 and "nothing: expected a folder" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr

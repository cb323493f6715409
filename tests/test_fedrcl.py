"""FedRCL: the relaxed contrastive loss, its equilibrium, the method, and a federation by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mincse
from conftest import at
from data import Corpus
from model import Encoder, EncoderConfig, SentenceEncoder
from papers.corpus import hold_out
from papers.fedrcl import (Config, FedRCL, collapse, deal_out, fed_avg, relaxed_contrast,
                           taking_part)
from papers.simcse import Encoded


def random_batch(B=11, D=5, K=3):
    torch.manual_seed(0)
    return torch.randn(B, D).double(), torch.randint(K, (B,))


def relaxed(x, labels, **settings):
    return relaxed_contrast(F.cosine_similarity(x[:, None], x, dim=-1), labels, **settings)


# ---- the loss -------------------------------------------------------------------------------

def test_the_worked_example():
    """Logits of the first with the others: cos 20° / .5 = 1.8794, its class; 0; -1.7321."""
    contrast, penalty = relaxed(at(0, 20, 90, 150), torch.tensor([0, 0, 1, 1]),
                                         temperature=.5)
    attraction = math.log(math.exp(1.8794) + math.exp(0) + math.exp(-1.7321)) - 1.8794
    too_close = math.log(math.exp(1 / .5) + math.exp(1.8794)) - 1 / .5   # cos 20° > .7 > cos 60°
    assert [contrast[0], penalty[0]] == pytest.approx([attraction, too_close], abs=1e-4)
    assert contrast.tolist() == pytest.approx([.165258, .296257, .740493, .154266], abs=1e-6)
    assert penalty.tolist() == pytest.approx([.634657, .634657, 0, 0], abs=1e-6)
    assert (contrast.mean() + penalty.mean()).item() == pytest.approx(.656397, abs=1e-6)


def test_it_is_the_sum_over_every_pair_of_a_class():
    """The slow version: anchor by anchor, pair by pair."""
    x, y = random_batch()
    s = [[F.cosine_similarity(a, b, dim=0).item() for b in x] for a in x]
    contrasts, penalties = [], []
    for i in range(11):
        others = [j for j in range(11) if j != i and y[j] == y[i]]
        among = sum(math.exp(s[i][k] / .2) for k in range(11) if k != i)
        contrasts += [sum(-math.log(math.exp(s[i][j] / .2) / among) for j in others)
                      / len(others)] if others else []
        close = sum(math.exp(s[i][j] / .2) for j in others if s[i][j] > .3)
        penalties.append(math.log(math.exp(1 / .2) + close) - 1 / .2)
    contrast, penalty = relaxed(x, y, temperature=.2, threshold=.3)
    assert contrast.tolist() == pytest.approx(contrasts)
    assert penalty.tolist() == pytest.approx(penalties, abs=1e-9) and max(penalties) > .01


def test_two_views_a_class_without_penalty_are_nt_xent_over_2n_views():
    """Chen et al. 2020: every view must find its other one among all views but itself."""
    views, _ = random_batch(B=14)
    others, own = ~torch.eye(14, dtype=torch.bool), torch.arange(14).roll(7)
    logits = F.normalize(views) @ F.normalize(views).T / .05
    nt_xent = -(logits[torch.arange(14), own]
                - logits.masked_fill(~others, -math.inf).logsumexp(1)).mean()
    contrast, _ = relaxed(views, torch.arange(7).repeat(2))
    assert contrast.mean().item() == pytest.approx(nt_xent.item())


@pytest.mark.parametrize("cosine, threshold, expected", [
    (1., .7, math.log(2)), (.7, .69, .002476), (.69, .7, 0.)])
def test_the_penalty_of_a_pair_at_a_cosine(cosine, threshold, expected):
    x = at(0, math.degrees(math.acos(cosine)))
    _, penalty = relaxed(x, torch.zeros(2), threshold=threshold)
    assert penalty.tolist() == pytest.approx([expected] * 2, abs=1e-6)
    for temperature in (.01, .5, 3.):                             # an identical pair: at any
        _, penalty = relaxed(at(30, 30), torch.zeros(2), temperature=temperature)
        assert penalty.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("s, slope", [(.999999, 10.), (.7, .049453), (.95, 5.378828)])
def test_the_penalty_pushes_harder_the_closer_a_pair_is(s, slope):
    """d penalty / d s, from the gradient along the angle: d s / d θ = -sin θ."""
    angle = torch.tensor(math.acos(s), dtype=torch.double, requires_grad=True)
    x = torch.stack([torch.stack([angle.cos(), angle.sin()]), at(0)[0]])
    _, penalty = relaxed(x, torch.zeros(2), threshold=.69)
    found = torch.autograd.grad(penalty[0], angle)[0] / -angle.detach().sin()
    assert found.item() == pytest.approx(slope, rel=1e-4)


def pair_with_negatives(s, n):
    """Two vectors at cosine s, and two of other labels at n to both and far from each other."""
    c = n / math.sqrt((1 + s) / 2)                                # along the pair's middle
    half = math.acos(s) / 2
    pair = [[math.cos(half), sign * math.sin(half), 0] for sign in (1, -1)]
    return torch.tensor([*pair, *([c, 0, sign * math.sqrt(1 - c * c)] for sign in (1, -1))],
                        dtype=torch.double), torch.tensor([0, 0, 1, 2])


def loss_of_pair(s, n, beta=1.):
    """By the function, and by hand: log of e^(s/τ) and two e^(n/τ), less s/τ, and the penalty."""
    contrast, penalty = relaxed(*pair_with_negatives(s, n))
    by_hand = -s / .05 + math.log(math.exp(s / .05) + 2 * math.exp(n / .05))
    by_hand += beta * (math.log(1 + math.exp((s - 1) / .05)) if s > .7 else 0)
    assert contrast[0] + beta * penalty[0] == pytest.approx(by_hand)
    return by_hand


@pytest.mark.parametrize("n, equilibrium", [(.5, .7673), (.6, .8173), (.3, .7)])
def test_a_pair_comes_to_rest_at_the_closed_form(n, equilibrium):
    """s* = (1 + n) / 2 + τ / 2 · ln m with m = 2 negatives, but not below λ, where nothing is
    penalized. Without the penalty the class becomes a point."""
    closed = max((1 + n) / 2 + .025 * math.log(2), .7)
    assert closed == pytest.approx(equilibrium, abs=5e-5)
    grid = [i / 1000 + .0005 for i in range(500, 1000)]
    assert min(grid, key=lambda s: loss_of_pair(s, n)) == pytest.approx(equilibrium, abs=1e-3)
    assert min(grid, key=lambda s: loss_of_pair(s, n, beta=0.)) == grid[-1]


@pytest.mark.parametrize("labels, count", [([0] * 4, 4), ([0, 1, 2, 3], 0), ([0, 0, 1, 2], 2)])
def test_alone_an_anchor_has_no_contrast_and_gradients_are_finite_even_at_points(labels, count):
    x = torch.ones(4, 3).double().requires_grad_()
    for batch in (x, x + torch.eye(4, 3)):
        contrast, penalty = relaxed(batch, torch.tensor(labels))
        assert len(contrast) == count and len(penalty) == 4
        gradient, = torch.autograd.grad(contrast.sum() + penalty.sum(), x)
        assert gradient.isfinite().all()


# ---- measures of collapse -------------------------------------------------------------------

def test_class_cosines_are_means_over_pairs_of_two_different_rows():
    found = collapse(at(0, 60, 90), torch.tensor([0, 0, 1]))
    assert found["same_class_cosine"] == pytest.approx(.5)
    assert found["between_class_cosine"] == pytest.approx((0 + math.cos(math.radians(30))) / 2)


def test_the_participation_ratio_counts_the_directions_in_use():
    cross = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    for x, expected in ((cross, 5), (cross[[0, 1, 5, 6]], 2), (3 * cross[[0, 5]], 1)):
        found = collapse(x, torch.zeros(len(x)))["participation_ratio"]
        assert found == pytest.approx(expected)


# ---- the method -----------------------------------------------------------------------------

def corpus(rows=8):
    return Corpus("a.txt", [[f"sentence {i}" for i in range(rows)]], None, "", 0)


def fedrcl(L=6, D=5, **settings):
    config = Config(method="fedrcl", head="none", batch_size=4, **{"classes": 3} | settings)
    shape = EncoderConfig("bert", vocab_size=7, width=D, layers=L, heads=1, inner=5)
    torch.manual_seed(1)
    method = FedRCL(corpus(), config, model=SentenceEncoder(Encoder(shape), pooling="mean"))
    method.labels.copy_(torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]))
    return method.double()


def encoded(L=6, B=4, T=3, D=5, rows=(0, 1, 2, 6)):
    torch.manual_seed(0)
    hidden = [torch.randn(B, T, D).double() for _ in range(L + 1)]
    mask = torch.tensor([[True, True, i > 1] for i in range(B)])
    return Encoded([hidden[-1].mean(1)], 1, 9, torch.tensor(rows), mask=mask, hidden=hidden)


def pooled(out, layer):
    return torch.stack([x[real].mean(0) for x, real in zip(out.hidden[layer], out.mask)])


def test_levels_are_evenly_spaced_layers_and_the_last_is_always_among_them():
    def layers(n, L=6):
        return [L + 1 + level for level in fedrcl(levels=n, L=L).levels]
    assert [layers(n) for n in (1, 2, 3, 6)] == [[6], [3, 6], [2, 4, 6], [1, 2, 3, 4, 5, 6]]
    assert layers(3, L=4) == [1, 3, 4] and layers(3, L=12) == [4, 8, 12]


@pytest.mark.parametrize("scl, beta, threshold", [
    (3., .5, .7), (1., 1., .1), (0., 2., .1), (0., 0., .7)])
def test_the_loss_adds_cross_entropy_and_the_mean_over_levels_of_both_terms(scl, beta, threshold):
    method = fedrcl(scl_weight=scl, penalty_weight=beta, penalty_threshold=threshold)
    out, y = encoded(), torch.tensor([0, 0, 1, 0])
    expected = F.cross_entropy(method.classifier(pooled(out, 6)), y)
    for layer in (2, 4, 6):
        contrast, penalty = relaxed(pooled(out, layer), y, threshold=threshold)
        expected = expected + (scl * contrast.mean() + beta * penalty.mean()) / 3
    assert method.loss(out).item() == pytest.approx(expected.item())


def test_a_batch_of_all_different_classes_attracts_nothing():
    method, out = fedrcl(), encoded(B=3, rows=(0, 2, 4))
    assert method.loss(out) == F.cross_entropy(method.classifier(pooled(out, 6)), torch.arange(3))
    assert {"contrast": 0, "penalty": 0}.items() <= method.logs().items()


def test_classes_are_the_groups_in_what_the_bare_encoder_makes_of_the_sentences():
    """Planted far from the origin, where an encoder without training puts all sentences."""
    def encode(texts, pooling, max_tokens):
        assert (len(texts), pooling, max_tokens) == (8, "mean", 32)
        return 10 * torch.eye(3, 5).repeat(3, 1)[:8] + torch.randn(8, 5) + 50
    method = fedrcl()
    method.prepare(encode)
    assert len(method.labels.unique()) == 3
    assert torch.equal(method.labels[:3], method.labels[3:6])
    assert torch.equal(method.labels[:2], method.labels[6:])


@pytest.mark.parametrize("settings, said", [
    (dict(head="train"), "compares layers without a head, found --head train"),
    (dict(levels=7), "--levels: expected at most 6, the layers of mini, found 7"),
    (dict(clients=9), "expected 20 sentences and 8 a client, found 64 and 6"),
    (dict(clients=1, batch_size=2, rows=19), "20 sentences and 2 a client, found 19 and 18"),
])
def test_what_makes_no_sense_is_refused(settings, said):
    settings = dict(head="none", batch_size=8, rows=64) | settings
    texts = corpus(settings.pop("rows"))
    shape = EncoderConfig("bert", vocab_size=7, width=5, layers=6, heads=1, inner=5)
    with pytest.raises(ValueError, match=said):
        FedRCL.check(Config(method="fedrcl", **settings), [texts], shape)


# ---- the average ----------------------------------------------------------------------------

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_floats_are_averaged_exactly_and_whole_numbers_are_those_of_the_first_client():
    torch.manual_seed(0)
    state = {"x": torch.randn(101), "count": torch.tensor(7)}
    assert equal(fed_avg([state] * 3), state)
    states = [{"n": torch.tensor([n, 2 * n]), "x": torch.tensor([n / 2])} for n in (3, 8)]
    found = fed_avg(states)
    assert found["n"].tolist() == [3, 6] and found["x"].item() == 2.75


# ---- the split ------------------------------------------------------------------------------

LABELS = torch.arange(6).repeat(300)


def effective_classes(shards):
    """exp of the entropy of the classes, mean over clients."""
    shares = [torch.bincount(LABELS[shard], minlength=6) / len(shard) for shard in shards]
    return sum(math.exp(torch.special.entr(p).sum()) for p in shares) / len(shares)


@pytest.mark.parametrize("alpha", [.01, .1, .5, 100.])
@pytest.mark.parametrize("clients", [1, 7, 8])
def test_every_client_gets_as_much_and_no_sentence_twice(alpha, clients):
    rows = range(3, 1800, 2)
    shards = deal_out(rows, LABELS, clients, alpha=alpha, seed=3)
    assert [len(shard) for shard in shards] == [len(rows) // clients] * clients
    dealt = [row for shard in shards for row in shard]
    assert len(set(dealt)) == len(dealt) and set(dealt) <= set(rows)
    assert all(shard == sorted(shard) for shard in shards)
    assert shards == deal_out(rows, LABELS, clients, alpha=alpha, seed=3)
    assert clients == 1 or shards != deal_out(rows, LABELS, clients, alpha=alpha, seed=4)


@pytest.mark.parametrize("alpha, expected", [(.1, 1.9), (.5, 3.5), (100., 6.)])
def test_alpha_sets_how_many_classes_a_client_knows(alpha, expected):
    """The first client of 20 drawn from a full bag: the Dirichlet's own effective number."""
    found = [effective_classes(deal_out(range(1800), LABELS, 20, alpha=alpha, seed=seed)[:1])
             for seed in range(120)]
    assert sum(found) / len(found) == pytest.approx(expected, abs=.25)


def test_half_of_the_clients_take_part_and_seed_and_round_say_which():
    chosen = [taking_part(number, 8, seed=1) for number in range(1, 9)]
    assert all(len(set(some)) == 4 for some in chosen) and len(set(map(tuple, chosen))) > 4
    assert chosen == [taking_part(number, 8, seed=1) for number in range(1, 9)]
    assert chosen != [taking_part(number, 8, seed=2) for number in range(1, 9)]
    assert taking_part(5, 1, seed=1) == [0] and len(taking_part(5, 3, seed=1)) == 1


# ---- whole runs -----------------------------------------------------------------------------

FED = dict(clients=4, rounds=2, steps=2, alpha=1., learning_rate=1e-3, precision="fp32",
           device="cpu")


@pytest.fixture(scope="module")
def train(given, pairs, tmp_path_factory):
    """train(out, ...): two of four clients train in each of two rounds; the folder of the run."""
    top = tmp_path_factory.mktemp("runs")

    def run(out, *, resume=False, **settings):
        inputs = mincse.read_inputs(given("fedrcl", **FED | {"dev": str(pairs)} | settings))
        mincse.run(inputs, inputs.config, top / out, resume=resume)
        return top / out
    return run


def copied(networks):
    return {name: x.clone() for name, x in networks.state_dict().items()}


@pytest.fixture(scope="module")
def federation(train):
    """Its folder, and what each of its turns was given and left."""
    turns, train_on = [], mincse.train_on

    def spy(job, stop, rows, **plan):
        texts = job.inputs.corpus.columns[0]
        asked = [texts[row] for row in hold_out(texts, range(len(texts)))[0]]
        start, origin = copied(job.networks), job.encode(asked)
        loss = train_on(job, stop, rows, **plan)
        away = 1 - F.cosine_similarity(job.encode(asked), origin).mean().item()
        turns.append(dict(plan, rows=rows, start=start, left=copied(job.networks), away=away,
                          loss=loss, texts=texts, asked=asked, labels=job.method.labels))
        return loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mincse, "train_on", spy)
        return train("whole"), turns


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_federation_leaves_a_model_and_a_line_a_round(federation):
    folder, turns = federation
    found = json.loads((folder / "results.json").read_text())
    assert found["steps"] == 2 and set(found["test"]) == {"pairs", "avg"}
    assert found["rounds"] == lines(folder) and [line["step"] for line in lines(folder)] == [1, 2]
    for line, pair in zip(lines(folder), (turns[:2], turns[2:])):
        assert line["drift"] == pytest.approx(sum(turn["away"] for turn in pair) / 2) and (
            line["drift"] > 1e-4)
        assert line["loss"] == pytest.approx(sum(turn["loss"] for turn in pair) / 2)
        assert 1 <= line["participation_ratio"] <= 32 and "dev" in line
        assert {"same_class_cosine", "between_class_cosine"} <= line.keys()
    first, second = lines(folder)
    assert second["at_start"].items() <= first.items() and first["at_start"] != second["at_start"]
    text = (folder / "results.md").read_text()
    assert "round 2" in text and "half of 4 clients train" in text
    before = next(line for line in text.splitlines() if "before |" in line and "nan" in line)
    assert f"{first['at_start']['participation_ratio']:.3f}" in before


def test_a_round_is_local_training_from_one_model_and_then_the_mean(federation):
    folder, turns = federation
    assert len(turns) == 4
    first, second, third, fourth = turns
    assert equal(first["start"], second["start"]) and equal(third["start"], fourth["start"])
    mean = {name: (x + second["left"][name]) / 2 for name, x in first["left"].items()}
    assert "method.classifier.weight" in mean and third["start"].keys() == mean.keys()
    assert all(torch.allclose(third["start"][name].double(), x.double(), atol=1e-7)
               for name, x in mean.items())
    best = json.loads((folder / "results.json").read_text())["best_step"]
    words = "model.encoder.words.weight"
    server = third["start"][words] if best == 1 else (third["left"][words]
                                                      + fourth["left"][words]) / 2
    saved = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.allclose(saved, server, atol=1e-7)


def test_clients_see_their_own_sentences_and_none_of_the_probe(federation):
    _, turns = federation
    shards = {}
    for turn in turns:
        own = {turn["texts"][row] for row in turn["rows"]}
        assert len(turn["asked"]) == 4 and len(own) == 44 // 4 and not own & set(turn["asked"])
        assert own == shards.setdefault(turn["number"] % 4, own)  # the same in every round
    together = set().union(*shards.values())
    assert len(shards) >= 2 and len(together) == 11 * len(shards)


def test_each_turn_has_draws_and_a_learning_rate_of_its_own(federation):
    _, turns = federation
    assert len({turn["number"] for turn in turns}) == 4
    assert [turn["number"] // 4 for turn in turns] == [0, 0, 1, 1]
    assert [turn["learning_rate"] for turn in turns] == pytest.approx(
        [1e-3, 1e-3, 1e-3 * .998, 1e-3 * .998])
    assert all(turn["steps"] == 2 for turn in turns)


def test_one_client_in_one_round_is_centralised_training_step_for_step(train, given):
    """A plain run on the same sentences, with the classes that the federation found."""
    alone = train("alone", clients=1, rounds=1, steps=0)          # 44 sentences: 5 steps of 8
    plain = {name: FED[name] for name in FED.keys() - {"clients", "rounds", "alpha"}}
    inputs = mincse.read_inputs(given("fedrcl", **plain | {"steps": 5}))
    whole = mincse.build(inputs, inputs.config)
    whole.method.prepare(whole.encode)
    texts = inputs.corpus.columns[0]
    _, rest = hold_out(texts, range(len(texts)))
    job = mincse.build(replace(inputs, corpora=[inputs.corpus.part(rest)]), inputs.config)
    job.method.labels.copy_(whole.method.labels[rest])
    for _ in mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1):
        pass
    assert {"ce_loss", "contrast", "penalty"} == job.method.logs().keys()
    saved = load_file(alone / "model.safetensors")
    assert torch.equal(saved["embeddings.word_embeddings.weight"], job.model.encoder.words.weight)


@pytest.mark.parametrize("step, rounds", [(1, 0), (7, 1)])
def test_a_stopped_federation_begins_its_round_anew_and_ends_with_the_same_bits(
        federation, train, stopped_in_turn, capsys, monkeypatch, step, rounds):
    """In the first client of all, and in the second of the second round, of which nothing may be
    left; a round that has ended is not trained again."""
    whole, turns = federation
    assert stopped_in_turn(step, train, f"parts-{step}") == 130
    assert f"stopped at step {rounds} of 2" in capsys.readouterr().err
    again, train_on = [], mincse.train_on
    monkeypatch.setattr(mincse, "train_on", lambda *known, number, **plan: again.append(
        number) or train_on(*known, number=number, **plan))
    parts = train(f"parts-{step}", resume=True)
    assert again == [turn["number"] for turn in turns[2 * rounds :]]
    for name in ("model.safetensors", "metrics.jsonl", "results.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_score_that_is_no_number_is_nan_in_the_table(train):
    """Where each held-out sentence has a class of its own, none has a cosine within its class."""
    folder = train("lonely", clients=1, rounds=1, steps=1, classes=44)
    assert lines(folder)[0]["same_class_cosine"] is None
    row, = (line for line in (folder / "results.md").read_text().splitlines()
            if "round 1 |" in line)
    assert "nan |" in row


def test_a_dry_run_counts_the_rounds(given):
    """Two rounds, in each of which two of the four clients take three steps."""
    plan = mincse.dry_run(mincse.read_inputs(given("fedrcl", **FED | {"steps": 3})))
    assert "steps: 12 at " in plan and "dev scores: 2," in plan

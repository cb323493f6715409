"""Core-tuning, in the style of: hard pairs made harder, and a loss that looks at what it misses."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config, resolve, validate
from folders import load
from losses import info_nce, many_positives
from methods import CoreTuning, Encoded
from papers import check
from model import Encoder, EncoderConfig, SentenceEncoder
from positives import HardPairs, hard_pairs, mix


@dataclass(frozen=True)
class Texts:
    columns: list[list[str]]


def method(premises=None, columns=3, width=4, identity=True, **settings):
    """Core-tuning whose head is the identity, on an encoder that never runs."""
    premises = premises or [f"premise {i}" for i in range(8)]
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, width, 1, 1, 5)), pooling="cls")
    config = replace(Config(method="core-tuning"), **settings)
    torch.manual_seed(0)
    found = CoreTuning(Texts([premises] * columns), config, model=model).double()
    if identity:
        found.project = nn.Identity()
    return found


def batch(V=3, B=8, D=4, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, D).double().requires_grad_() for _ in range(V)]


def loss_of(built, columns, step=1):
    return built.loss(Encoded(columns, step, 9, torch.arange(len(columns[0]))))


CONTRAST = dict(classifier_weight=0.)
PLAIN = dict(mixing="none", focus=0., **CONTRAST)


# ---- the loss -------------------------------------------------------------------------------

U, V = torch.eye(2).double(), torch.tensor([[.8, .6], [.6, .8]]).double()


def worked(**settings):
    built = method(["a", "b"], columns=2, width=2, temperature=.5, **CONTRAST, **settings)
    half = torch.tensor([[.5], [.5]]).double()
    built.draw = lambda *_: HardPairs(torch.tensor([0, 1]), torch.tensor([1, 0]),
                                      torch.tensor([1, 0]), half, half + .3)
    return loss_of(built, [U, V]).item()


def test_the_worked_example():
    half, most = torch.tensor([[.5]]).double(), torch.tensor([[.8]]).double()
    positive, negative = mix(V, V.flip(0), half), mix(V.flip(0), U, most)
    assert torch.allclose(positive, torch.tensor([[.7, .7], [.7, .7]]).double())
    assert torch.allclose(negative, torch.tensor([[.68, .64], [.64, .68]]).double())
    cosines = F.cosine_similarity(U[:1], torch.cat([V, positive, negative]))
    assert cosines.tolist() == pytest.approx([.8, .6, .707107, .707107, .728200, .685365], abs=1e-6)
    assert worked() == pytest.approx(1.390627, abs=1e-6)
    assert worked(focus=0.) == pytest.approx(1.700844, abs=1e-6)
    assert worked(mixing="none", focus=0.) == pytest.approx(.513015, abs=1e-6)
    assert worked(mixing="none") == pytest.approx(.205879, abs=1e-6)


def test_without_mixing_and_focus_it_is_supervised_simcse():
    anchor, positive, hard = columns = batch()
    expected = info_nce(anchor, torch.cat([positive, hard]))
    assert loss_of(method(**PLAIN), columns).item() == pytest.approx(expected.item(), abs=1e-6)


def test_focus_of_one_weighs_every_pair_by_what_is_missing_and_so_lowers_the_loss():
    anchor, positive = columns = batch(V=2)
    p = (F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).mT / .05).softmax(dim=1)
    p = p.diagonal()
    found = loss_of(method(columns=2, mixing="none", **CONTRAST), columns)
    assert found.item() == pytest.approx((-(1 - p) * p.log()).mean().item())
    assert found <= loss_of(method(columns=2, **PLAIN), columns)


def test_the_slope_of_the_focal_loss():
    """-(1 - p) + p log p at log p = -0.5; the weight is not detached."""
    log_p = torch.tensor(-.5, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([log_p, torch.log1p(-log_p.exp())])[None]
    many_positives(logits, torch.tensor([[True, False]]), focus=1.).backward()
    p = math.exp(-.5)
    assert log_p.grad.item() == pytest.approx(-(1 - p) + p * -.5)
    assert log_p.grad.item() == pytest.approx(-.696735, abs=1e-6)


@pytest.mark.parametrize("focus", [0., .5, 1., 2.])
def test_what_is_taken_out_and_what_is_known_leave_no_nan(focus):
    logits = torch.tensor([[900., 0, -math.inf], [0., 1, -math.inf]], requires_grad=True)
    loss = many_positives(logits, torch.eye(2, 3, dtype=torch.bool), focus=focus)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


GROUPS = ["a", "b", "A ", "c", "b", "a", "d", "e"]                # 0, 2, 5 and 1, 4 belong together


def test_the_loss_over_groups_is_the_slow_one():
    columns = batch()
    built = method(GROUPS, **CONTRAST)
    u, v, w = columns
    same = torch.tensor([[a.strip().lower() == b.strip().lower() for b in GROUPS] for a in GROUPS])
    pairs = built.draw(u, torch.cat([v, w]), same, 1)
    x = torch.cat([v, w])
    total = 0
    for i in range(8):
        terms, positives = [], []
        for j in range(16):
            if j < 8 and same[i, j]:
                positives.append(len(terms))
            terms.append(x[j])
        for j in range(8):
            if j == i:
                positives.append(len(terms))
            if j == i or not same[i, j]:                          # a mate's f+ is not in the sum
                terms.append(pairs.of_positive[j] * v[pairs.positive[j]]
                             + (1 - pairs.of_positive[j]) * x[pairs.negative[j]])
        for j in range(8):
            terms.append((1 - pairs.of_stranger[j]) * u[j]
                         + pairs.of_stranger[j] * x[pairs.stranger[j]])
        scores = torch.stack([F.cosine_similarity(u[i], term, dim=0) / .05 for term in terms])
        p = scores.softmax(dim=0)[positives]
        total += (-(1 - p) * p.log()).mean() / 8
    assert loss_of(built, columns).item() == pytest.approx(total.item())


@pytest.mark.parametrize("mixing, extra", [("none", 0), ("positives", 8), ("negatives", 8),
                                           ("both", 16)])
def test_each_kind_of_mixing_can_be_left_out(mixing, extra, monkeypatch):
    import methods
    seen = []
    monkeypatch.setattr(methods, "many_positives",
                        lambda logits, *_, **__: seen.append(logits.shape) or logits.sum())
    loss_of(method(mixing=mixing, **CONTRAST), batch())
    assert seen == [(8, 16 + extra)]


# ---- what is mixed --------------------------------------------------------------------------

def drawn(same, copies=2, B=8, D=4, alpha=1., seed=0, positive=False):
    torch.manual_seed(seed)
    anchor, candidates = torch.randn(B, D).double(), torch.randn(copies * B, D).double()
    if positive:
        anchor, candidates = anchor.abs(), candidates.abs()
    rng = np.random.default_rng(seed)
    return anchor, candidates, hard_pairs(anchor, candidates, same, alpha=alpha, rng=rng)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("positive", [False, True])
def test_the_hardest_of_each_kind_are_found_even_where_all_cosines_are_positive(copies, positive):
    group = [0, 1, 0, 2, 1, 0, 3, 4]
    same = torch.tensor([[a == b for b in group] for a in group])
    anchor, candidates, pairs = drawn(same, copies, positive=positive)
    for i in range(8):
        cosines = [F.cosine_similarity(anchor[i], c, dim=0).item() for c in candidates]
        mates = [j for j in range(8) if group[j] == group[i]]
        others = [j for j in range(8 * copies) if j >= 8 or group[j] != group[i]]
        assert pairs.positive[i] == min(mates, key=lambda j: cosines[j])
        assert pairs.negative[i] == max(others, key=lambda j: cosines[j])
        assert group[pairs.stranger[i] % 8] != group[i]


def test_a_stranger_may_be_any_of_another_group():
    same = torch.eye(3, dtype=torch.bool)
    seen = {(i, int(j)) for seed in range(200)
            for i, j in enumerate(drawn(same, B=3, seed=seed)[2].stranger)}
    assert seen == {(i, j) for i in range(3) for j in range(6) if j % 3 != i}


def test_a_share_of_one_is_the_row_itself_to_the_bit():
    x, other = batch(V=2)
    one = torch.ones(8, 1).double()
    assert torch.equal(mix(x, other, one), x) and torch.equal(mix(x, other, 1 - one), other)


def test_mixed_negatives_are_strangers_by_four_fifths_at_least():
    """With a = 1, so uniform draws, four fifths of 10,000 are clipped; positives are not."""
    alone = torch.eye(500, dtype=torch.bool)
    draws = [drawn(alone, B=500, seed=seed)[2] for seed in range(20)]
    shares = torch.cat([pairs.of_stranger for pairs in draws])
    assert len(shares) == 10_000 and shares.min() == .8
    assert (shares == .8).double().mean().item() == pytest.approx(.8, abs=.02)
    shares = torch.cat([pairs.of_positive for pairs in draws])
    assert shares.mean().item() == pytest.approx(.5, abs=.02) and shares.min() < .01


def test_the_draws_are_a_function_of_seed_and_step():
    built, columns = method(**CONTRAST), batch()
    first = loss_of(built, columns)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(loss_of(built, columns), first)
    assert not torch.equal(loss_of(built, columns, step=2), first)
    assert not torch.equal(loss_of(method(seed=1, **CONTRAST), columns), first)


def test_a_batch_in_another_order_has_the_same_loss_if_its_draws_move_along():
    columns, built = batch(), method(GROUPS)
    pairs = built.draw(columns[0], torch.cat(columns[1:]),
                       built.group[:, None] == built.group, 1)
    whole = loss_of(built, columns)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    place = torch.cat([order.argsort(), order.argsort() + 8])
    moved = HardPairs(place[pairs.positive][order], place[pairs.negative][order],
                      place[pairs.stranger][order], pairs.of_positive[order],
                      pairs.of_stranger[order])
    built.draw = lambda *_: moved
    again = built.loss(Encoded([x[order] for x in columns], 1, 9, order))
    assert again.item() == pytest.approx(whole.item())


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("mixing", ["both", "none"])
def test_all_columns_and_parts_learn(V, mixing):
    built, columns = method(columns=V, identity=False, mixing=mixing), batch(V)
    loss_of(built, columns).backward()
    assert all(x.grad.isfinite().all() and (x.grad != 0).any(dim=1).all() for x in columns)
    assert all(p.grad.any() for p in built.parameters())


@pytest.mark.parametrize("V", [2, 3])
def test_a_batch_of_one_premise_is_not_mixed(V):
    columns = batch(V)
    built, plain = (method(["one premise"] * 8, columns=V, mixing=mixing)
                    for mixing in ("both", "none"))
    assert torch.equal(loss_of(built, columns), loss_of(plain, columns))
    assert loss_of(built, columns).isfinite()


# ---- the classifier -------------------------------------------------------------------------

@pytest.mark.parametrize("V, mixing", [(3, "both"), (3, "none"), (2, "both"), (3, "positives"),
                                       (3, "negatives")])
def test_the_classifier_loss_is_the_slow_one(V, mixing):
    columns = batch(V)
    built = method(GROUPS, columns=V, contrast_weight=0., mixing=mixing)
    u, v = columns[:2]
    x = torch.cat(columns[1:])
    pairs = built.draw(u, x, built.group[:, None] == built.group, 1)
    rows = []
    for i in range(8):
        of_positive, of_stranger = pairs.of_positive[i].item(), pairs.of_stranger[i].item()
        stranger, hardest = x[pairs.stranger[i]], pairs.negative[i].item()
        rows += [(u[i], v[i], [1, 0, 0]), (u[i], stranger, [0, 0, 1])]
        if V == 3:
            rows.append((u[i], columns[2][i], [0, 1, 0]))
        if mixing in ("both", "positives"):
            soft = [of_positive, 0, 0]
            soft[1 if hardest == 8 + i else 2] = 1 - of_positive
            rows.append((u[i], of_positive * v[pairs.positive[i]]
                         + (1 - of_positive) * x[hardest], soft))
        if mixing in ("both", "negatives"):
            rows.append((u[i], (1 - of_stranger) * u[i] + of_stranger * stranger,
                         [1 - of_stranger, 0, of_stranger]))
    total = 0
    for a, b, label in rows:
        scores = built.classify.weight @ torch.cat([a, b, (a - b).abs()])
        log_p = scores.log_softmax(dim=0)
        total -= sum(y * log_p[k] for k, y in enumerate(label)) / len(rows)
    assert loss_of(built, columns).item() == pytest.approx(total.item())
    assert built.classify.bias is None


def test_the_two_losses_are_weighed_and_logged():
    built = method(contrast_weight=.3, classifier_weight=2.)
    found = loss_of(built, batch()).item()
    parts = built.logs()
    assert found == pytest.approx(.3 * parts["contrastive_loss"] + 2 * parts["classifier_loss"])


# ---- settings and runs ----------------------------------------------------------------------

@pytest.mark.parametrize("settings, columns, said", [
    ({}, 1, "takes a corpus of 2 or 3 columns, found 1 in docs: use --method simcse, or a file of "
            "pairs, such as nli"),
    (dict(loss="focal"), 2, "has a loss and a head of its own, found --loss focal"),
    (dict(hard_negative_weight=2.), 3, "found --hard-negative-weight 2.0"),
    (dict(head="keep"), 3, "found --head keep: use --head none"),
    (dict(contrast_weight=0., classifier_weight=0.), 3, "are both 0, so there is nothing to learn"),
])
def test_what_makes_no_sense_is_refused(settings, columns, said):
    with pytest.raises(ValueError) as refused:
        check(replace(Config(method="core-tuning"), **settings), columns)
    assert said in str(refused.value)


@pytest.mark.parametrize("settings, said", [
    (dict(mixing_alpha=0.), "--mixing-alpha: expected above 0, found 0"),
    (dict(focus=-1.), "--focus: expected 0 or more, found -1")])
def test_a_value_out_of_range_is_refused(settings, said):
    with pytest.raises(ValueError) as refused:
        validate(Config(**settings))
    assert said in str(refused.value)


@pytest.mark.parametrize("model_type, width, rate", [
    ("bert", 768, 5e-5), ("roberta", 1024, 1e-5), ("bert", 256, 3e-4)])
def test_it_trains_like_supervised_simcse_but_without_a_head_between(model_type, width, rate):
    config = resolve({"method": "core-tuning"}, model_type=model_type, width=width, columns=3)
    assert (config.head, config.learning_rate, config.epochs) == ("none", rate, 3)
    usual = resolve({}, model_type=model_type, width=width, columns=3)
    assert usual.head == "keep"


@pytest.fixture
def train(program, tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text("sent0,sent1,hard_neg\n" + "".join(
        f"a dog {i // 2},an animal {i},no dog {i}\n" for i in range(24)))
    return partial(program, method="core-tuning", corpus=path)


def test_a_run_saves_the_encoder_without_head_and_classifier(train):
    folder = train(steps=10)
    assert load(folder).head is None and not (folder / "2_Dense").exists()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["contrastive_loss"] > 0 and row["classifier_loss"] > 0


def test_a_run_that_goes_on_ends_with_the_same_weights(train, stopped):
    whole = (train(out="whole", steps=8) / "model.safetensors").read_bytes()
    assert stopped(3, train, out="parts", steps=8) == 130
    assert (train("--resume", out="parts", steps=8) / "model.safetensors").read_bytes() == whole

"""Core-tuning, in the style of: hard pairs made harder, and a loss that looks at what it misses."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import resolved
from data import Corpus
from engine.encoders import load
from losses import info_nce, many_positives
from model import Encoder, EncoderConfig, SentenceEncoder
from papers import check
from papers.core_tuning import Config, CoreTuning, choose, harder, mix
from papers.simcse import Encoded

SHAPE = EncoderConfig("bert", 7, 4, 1, 1, 5)                      # of width 4
ALONE = torch.eye(8, dtype=torch.bool)                            # every row is its own group
GROUPS = ["a", "b", "A ", "c", "b", "a", "d", "e"]                # 0, 2, 5 and 1, 4 belong together
SAME = torch.tensor([[a.strip().lower() == b.strip().lower() for b in GROUPS] for a in GROUPS])


def corpus_of(columns, premises=GROUPS):
    return Corpus("nli", [premises] * columns, None, "", 0)


def build(columns=3, premises=GROUPS, identity=True, **settings):
    """Core-tuning whose head is the identity, on an encoder that never runs."""
    model = SentenceEncoder(Encoder(SHAPE), pooling="cls")
    torch.manual_seed(0)
    method = CoreTuning(corpus_of(columns, premises), Config(**settings), model=model).double()
    if identity:
        method.project = nn.Identity()
    return method


def batch(V=3, B=8, D=4, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, D).double().requires_grad_() for _ in range(V)]


def loss_of(method, columns, step=1):
    return method.loss(Encoded(columns, step, 9, torch.arange(len(columns[0]))))


def given(*columns):
    return list(zip(columns, torch.eye(3).double()))


# ---- the contrastive loss -------------------------------------------------------------------

class Draws:
    """A random source that was told what to draw."""
    def __init__(self, chance, shares):
        self.random, self.beta = lambda shape: chance, lambda a, b, shape: shares


def test_the_worked_example():
    """Both anchors have one positive, one negative and one stranger; the shares are .5 and .8.

    τ is 0.5: logits 1.6, 1.2, 1.414, 1.414, 1.456, 1.371, the log of their sum of exponentials
    3.208. The positives are 1.6 and 1.414, so 3.208 - 1.507 = 1.701; with focus 1, p is .200 and
    .166, so ((1 - .200) · 1.608 + (1 - .166) · 1.794) / 2 = 1.391.
    """
    U, V = torch.eye(2).double(), torch.tensor([[.8, .6], [.6, .8]]).double()
    alone, half = ALONE[:2, :2], Draws(np.full((2, 2), .5), np.full((2, 2, 1), .5))
    _, mixed = harder(U, given(V), alone, alpha=1., rng=half)
    (positive, _), (negative, _) = mixed
    assert torch.allclose(positive, .5 * V + .5 * V.flip(0))      # (.7, .7) twice
    assert torch.allclose(negative, .8 * V.flip(0) + .2 * U)      # (.68, .64), (.64, .68)
    cosines = F.cosine_similarity(U[:1], torch.cat([V, positive, negative]))
    assert cosines.tolist() == pytest.approx([.8, .6, .707107, .707107, .728200, .685365], abs=1e-6)
    for focus, mixes, expected in [(1., mixed, 1.390627), (0., mixed, 1.700844), (0., [], .513015),
                                   (1., [], .205879)]:
        method = build(2, temperature=.5, focus=focus)
        found = method.supervised_contrast(U, given(V), mixes, alone).item()
        assert found == pytest.approx(expected, abs=1e-6)


def test_without_mixing_it_is_supervised_simcse_and_focus_weighs_pairs_by_what_is_missing():
    anchor, *others = batch()
    x = torch.cat(others)
    found, plain = (build(focus=focus).supervised_contrast(anchor, given(*others), [], ALONE).item()
                    for focus in (1., 0.))
    p = (F.normalize(anchor, dim=1) @ F.normalize(x, dim=1).mT / .05).softmax(dim=1).diagonal()
    assert plain == pytest.approx(info_nce(anchor, x).item(), abs=1e-6)
    assert found == pytest.approx((-(1 - p) * p.log()).mean().item()) and found <= plain


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


def drawn(u, x):
    """Rows and shares of step 1: positive, negative, stranger; of the positive, of the stranger."""
    rng = np.random.default_rng([42, 1])
    rows = [row.tolist() for row in choose(u, x, SAME, rng)]
    shares = rng.beta(2, 2, (2, 8))
    return *rows, shares[0].tolist(), shares[1].clip(.8).tolist()


def same_with_gradients(found, expected, columns):
    torch.testing.assert_close([found, *torch.autograd.grad(found, columns, retain_graph=True)],
                               [expected, *torch.autograd.grad(expected, columns)])


def test_the_loss_over_groups_is_the_slow_one():
    u, v, w = columns = batch()
    x = torch.cat([v, w])
    positive, negative, stranger, share, most = drawn(u, x)
    total = 0
    for i in range(8):
        terms, positives = list(x), [j for j in range(8) if SAME[i, j]]
        for j in range(8):
            if j == i:
                positives.append(len(terms))
            if j == i or not SAME[i, j]:                          # else not in the sum
                terms.append(share[j] * v[positive[j]] + (1 - share[j]) * x[negative[j]])
        terms += [(1 - most[j]) * u[j] + most[j] * x[stranger[j]] for j in range(8)]
        scores = torch.stack([F.cosine_similarity(u[i], term, dim=0) / .05 for term in terms])
        p = scores.softmax(dim=0)[positives]
        total += (-(1 - p) * p.log()).mean() / 8
    method = build(classifier_weight=0., mixing_alpha=2.)
    same_with_gradients(loss_of(method, columns), total, columns)


# ---- the classifier -------------------------------------------------------------------------

@pytest.mark.parametrize("V", [2, 3])
def test_the_classifier_loss_is_the_slow_one(V):
    u, v, *w = columns = batch(V, seed=1)
    x = torch.cat([v, *w])
    positive, negative, stranger, share, most = drawn(u, x)
    rows = []
    for i in range(8):
        rows += [(u[i], v[i], [1, 0, 0]), (u[i], x[stranger[i]], [0, 0, 1])]
        rows += [(u[i], contradicted[i], [0, 1, 0]) for contradicted in w]
        soft = [share[i], 0, 0]
        soft[1 if negative[i] == 8 + i else 2] = 1 - share[i]
        rows += [(u[i], share[i] * v[positive[i]] + (1 - share[i]) * x[negative[i]], soft),
                 (u[i], (1 - most[i]) * u[i] + most[i] * x[stranger[i]], [1 - most[i], 0, most[i]])]
    assert V == 2 or any(negative[i] == 8 + i for i in range(8))  # else a label is not tested
    method, total = build(V, contrast_weight=0., mixing_alpha=2.), 0
    for a, b, label in rows:
        log_p = (method.classify.weight @ torch.cat([a, b, (a - b).abs()])).log_softmax(dim=0)
        total -= sum(y * log_p[k] for k, y in enumerate(label)) / len(rows)
    same_with_gradients(loss_of(method, columns), total, columns)
    assert method.classify.bias is None


def test_the_two_losses_are_weighed_and_logged():
    method = build(contrast_weight=.3, classifier_weight=2.)
    found, log = loss_of(method, batch()).item(), method.logs()
    assert found == pytest.approx(.3 * log["contrastive_loss"] + 2 * log["classifier_loss"])


@pytest.mark.parametrize("V", [2, 3])
def test_all_columns_and_networks_learn(V):
    method, columns = build(V, identity=False), batch(V)
    loss_of(method, columns).backward()
    assert all(x.grad.isfinite().all() and (x.grad != 0).any(dim=1).all() for x in columns)
    assert all(p.grad.any() for p in method.parameters())


# ---- what is mixed --------------------------------------------------------------------------

@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("sign", [torch.clone, torch.abs])
def test_the_hardest_of_each_kind_are_found_even_where_all_cosines_are_positive(copies, sign):
    anchor, x = (sign(x.detach()) for x in (batch(1)[0], torch.cat(batch(copies, seed=1))))
    positive, negative, stranger = choose(anchor, x, SAME, np.random.default_rng(0))
    for i in range(8):
        cosines = [F.cosine_similarity(anchor[i], c, dim=0).item() for c in x]
        positives = [j for j in range(8) if SAME[i, j]]
        negatives = [j for j in range(8 * copies) if j >= 8 or not SAME[i, j]]
        assert positive[i] == min(positives, key=lambda j: cosines[j])
        assert negative[i] == max(negatives, key=lambda j: cosines[j])
        assert not SAME[i, stranger[i] % 8]


def test_a_stranger_may_be_any_of_another_group():
    anchor, x, rng = torch.randn(3, 4), torch.randn(6, 4), np.random.default_rng(0)
    seen = {(i, int(j)) for _ in range(200)
            for i, j in enumerate(choose(anchor, x, ALONE[:3, :3], rng)[2])}
    assert seen == {(i, j) for i in range(3) for j in range(6) if j % 3 != i}


def test_a_share_of_one_is_the_row_itself_to_the_bit():
    a, b = given(*batch(V=2))
    one = torch.ones(8, 1).double()
    for share, pairs in ((one, a), (1 - one, b)):
        vectors, label = mix(a, b, share)
        assert torch.equal(vectors, pairs[0]) and torch.equal(label, pairs[1].expand(8, 3))


def test_mixed_negatives_are_strangers_by_four_fifths_at_least():
    """With a = 1 draws are uniform: four fifths of 10,000 are raised. A label tells the share."""
    alone, rng = torch.eye(100, dtype=torch.bool), np.random.default_rng(0)
    u, v = batch(2, B=100)
    draws = [harder(u, given(v), alone, alpha=1., rng=rng)[1] for _ in range(100)]
    shares = torch.cat([label[:, 2] for _, (_, label) in draws])
    assert len(shares) == 10_000 and shares.min() == .8
    assert (shares == .8).double().mean().item() == pytest.approx(.8, abs=.02)
    shares = torch.cat([label[:, 0] for (_, label), _ in draws])
    assert shares.mean().item() == pytest.approx(.5, abs=.02) and shares.min() < .01


def test_the_draws_are_a_function_of_seed_and_step():
    method, columns = build(), batch()
    first = loss_of(method, columns)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(loss_of(method, columns), first)
    assert not torch.equal(loss_of(method, columns, step=2), first)
    assert not torch.equal(loss_of(build(seed=1), columns), first)


def test_a_batch_in_another_order_has_the_same_loss_if_its_draws_move_along(monkeypatch):
    columns, method = batch(), build()
    whole = loss_of(method, columns)
    rng, order = np.random.default_rng([42, 1]), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = Draws(rng.random((8, 16))[order][:, torch.cat([order, order + 8])],
                  rng.beta(1, 1, (2, 8, 1))[:, order])
    monkeypatch.setattr(np.random, "default_rng", lambda seed: moved)
    again = method.loss(Encoded([x[order] for x in columns], 1, 9, order))
    assert again.item() == pytest.approx(whole.item())


@pytest.mark.parametrize("V", [2, 3])
def test_a_batch_of_one_premise_is_not_mixed(V):
    u, *others = columns = batch(V)
    method, same = build(V, ["one premise"] * 8), torch.ones(8, 8, dtype=torch.bool)
    plain = (method.supervised_contrast(u, given(*others), [], same)
             + method.classifier_loss(u, given(*others)))
    assert torch.equal(loss_of(method, columns), plain) and plain.isfinite()


# ---- settings and runs ----------------------------------------------------------------------

@pytest.mark.parametrize("settings, said", [
    (dict(hard_negative_weight=2.), "found --hard-negative-weight 2.0"),
    (dict(head="keep"), "found --head keep: use --head none"),
    (dict(contrast_weight=0., classifier_weight=0.), "are both 0, so there is nothing to learn")])
def test_what_makes_no_sense_is_refused(settings, said):
    config = Config(**dict(method="core-tuning", head="none", batch_size=8) | settings)
    with pytest.raises(ValueError, match=said):
        check(config, [corpus_of(3)], SHAPE)


@pytest.mark.parametrize("model_type, width, rate", [
    ("bert", 768, 5e-5), ("roberta", 1024, 1e-5), ("bert", 256, 3e-4)])
def test_it_trains_like_supervised_simcse_but_without_a_head_between(model_type, width, rate):
    config, usual = (resolved(method, model_type, width, 3) for method in ("core-tuning", "simcse"))
    assert (config.head, config.learning_rate, config.epochs) == ("none", rate, 3)
    assert usual.head == "keep"


def test_a_run_saves_the_encoder_without_head_and_classifier(program, corpora):
    folder = program(method="core-tuning", corpus=corpora[3], steps=1)
    assert load(folder).head is None and not (folder / "2_Dense").exists()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["contrastive_loss"] > 0 and row["classifier_loss"] > 0

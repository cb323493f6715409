"""PNR: the loss against worked numbers, the frozen model, and the measures of transfer."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config
from losses import info_nce, pseudo_negative_nce
from methods import PNR, Encoded
from papers import check
from model import Encoder, EncoderConfig, Head, SentenceEncoder
from regimes import transfer


def rows(*values):
    return torch.tensor(values, dtype=torch.double)


Z, Z2 = rows([1, 0], [0, 1]), rows([.8, .6], [.6, .8])
OLD, P = rows([.6, .8], [0, 1]), rows([1, 0], [.6, .8])


def each(anchor, positive, others, **settings):
    """The loss of every anchor, from two batches: the mean of all, and a loop of the formula."""
    tau, w = settings.get("temperature", .05), settings.get("pseudo_weight", 1.)
    found = []
    for i in range(len(anchor)):
        def likeness(x):
            return math.exp(F.cosine_similarity(anchor[i], x, dim=0) / tau)
        among = sum(likeness(x) for x in positive)
        among += w * sum(likeness(others[j]) for j in range(len(others)) if j != i)
        found.append(-math.log(likeness(positive[i]) / among))
    mean = pseudo_negative_nce(anchor, positive, others, **settings).item()
    assert mean == pytest.approx(sum(found) / len(found), abs=1e-12)
    return found


def random_rows(count=3, B=7, D=5, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, D).double() for _ in range(count)]


# ---- the loss -------------------------------------------------------------------------------

def test_the_worked_example():
    plain = each(Z, Z2, OLD, temperature=.5, pseudo_weight=0.)
    learned = each(Z, Z2, OLD, temperature=.5)
    distilled = each(P, OLD, Z2, temperature=.5, pseudo_weight=0.)
    remembered = each(P, OLD, Z2, temperature=.5)
    assert plain == pytest.approx([.513015, .513015], abs=1e-6)
    assert learned == pytest.approx([.627123, .982198], abs=1e-6)
    assert distilled == pytest.approx([.263282, .913015], abs=1e-6)
    assert remembered == pytest.approx([.833428, 1.352984], abs=1e-6)
    assert sum(learned + remembered) / 2 == pytest.approx(1.897867, abs=1e-6)


def test_the_positive_stays_in_the_denominator():
    """Without it, as in the authors' SimCLR form, L2 would be [.263282, 1.053947] and could go
    below 0."""
    assert each(P, OLD, Z2, temperature=.5) != pytest.approx([.263282, 1.053947], abs=1e-2)
    same = Z.clone()
    assert min(each(same, same, -same)) >= 0


def test_weight_zero_is_info_nce_and_any_other_is_more():
    """In double precision: a product of other size may round its last bit otherwise."""
    z, z2, old = (x.double() for x in random_rows())
    plain = pseudo_negative_nce(z, z2, old, pseudo_weight=0.).item()
    assert plain == pytest.approx(info_nce(z, z2).item(), rel=1e-14)
    losses = [pseudo_negative_nce(z, z2, old, pseudo_weight=w).item() for w in (0., .5, 1., 2.)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_pseudo_negatives_on_the_far_side_do_not_count():
    """The old vectors of the others are opposite: each adds e^-20 to a sum near e^20."""
    z = rows([1, 0], [1, .01])
    assert pseudo_negative_nce(z, z, -z).item() == pytest.approx(info_nce(z, z).item(), abs=1e-3)


def test_the_own_old_vector_is_no_negative_but_that_of_others_is():
    z, z2, old = random_rows()
    changed = old.clone()
    changed[3] = torch.randn(5)
    before, after = each(z, z2, old), each(z, z2, changed)
    assert after[3] == before[3]
    assert all(a != b for i, (a, b) in enumerate(zip(before, after)) if i != 3)
    assert each(z, changed, z2)[3] != each(z, old, z2)[3]         # there it is the positive


def test_one_sentence_alone_costs_nothing():
    z, z2, old = random_rows(B=1)
    assert pseudo_negative_nce(z, z2, old).item() == 0


def test_a_permuted_batch_permutes_the_losses():
    z, z2, old = random_rows()
    order = torch.randperm(7)
    moved = each(z[order], z2[order], old[order])
    assert moved == pytest.approx([each(z, z2, old)[i] for i in order])


def test_a_model_that_has_not_moved_still_pays_for_the_duplicates():
    """p = f = z' without dropout: InfoNCE of the model with itself, and every other one twice."""
    z, = random_rows(1)
    twice = [math.log(sum((2 - (i == j)) * math.exp(F.cosine_similarity(z[i], z[j], dim=0) / .05)
                          for j in range(7))) - 20 for i in range(7)]
    assert pseudo_negative_nce(z, z, z).item() == pytest.approx(sum(twice) / 7)
    assert pseudo_negative_nce(z, z, z) > info_nce(z, z)


# ---- the method -----------------------------------------------------------------------------

class Texts:
    columns = [[f"sentence {i}" for i in range(8)]]


def pnr(**settings):
    """The method on a small encoder with dropout, head and all, and that encoder."""
    shape = EncoderConfig("bert", vocab_size=11, width=6, layers=1, heads=2, inner=5)
    torch.manual_seed(1)
    model = SentenceEncoder(Encoder(shape), pooling="cls", head=Head(6))
    for tensor in model.parameters():                             # BERT's start is nearly a point
        nn.init.normal_(tensor, std=.5)
    config = replace(Config(method="pnr", batch_size=4), **settings)
    return PNR(Texts, config, model=model), model


def encoded(model, B=4, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(11, (B, 5)).repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    vectors = model.train()(ids, mask)
    return Encoded(list(vectors.chunk(2)), 1, 9, torch.arange(B), ids, mask)


def test_on_the_first_corpus_it_is_simcse_exactly():
    method, model = pnr()
    out = encoded(model)
    assert method.loss(out) == info_nce(out.anchor, out.positive)


def test_the_loss_adds_what_is_learned_and_what_is_remembered():
    method, model = pnr(distillation_weight=.3)
    method.follow(model)
    out = encoded(model)
    with torch.no_grad():
        model.eval()
        old = model.head(model(out.ids[:4], out.mask[:4]))        # the head as in training
    learned = pseudo_negative_nce(out.anchor, out.positive, old)
    remembered = pseudo_negative_nce(method.predictor(out.anchor), old, out.positive)
    assert method.loss(out).item() == pytest.approx((learned + .3 * remembered).item(), rel=1e-5)
    logs = method.logs()
    assert logs["plasticity_loss"] == pytest.approx(learned.item(), rel=1e-5)
    assert logs["stability_loss"] == pytest.approx(remembered.item(), rel=1e-5)
    assert logs["kept"] == pytest.approx(F.cosine_similarity(out.anchor, old).mean().item())


def test_the_baselines_are_weights_of_zero():
    for settings, terms in [(dict(pseudo_weight=0.), (0., 1.)),
                            (dict(distillation_weight=0.), (1., 0.)),
                            (dict(pseudo_weight=0., distillation_weight=0.), (0., 0.))]:
        method, model = pnr(**settings)
        method.follow(model)
        out = encoded(model)
        w, weight = terms
        old = method.previous[0](out.ids[:4], out.mask[:4])
        expected = pseudo_negative_nce(out.anchor, out.positive, old, pseudo_weight=w)
        if weight:
            expected = expected + info_nce(method.predictor(out.anchor), old)
        assert method.loss(out).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_previous_model_is_a_frozen_copy_without_dropout_that_nobody_trains_or_saves():
    method, model = pnr()
    method.follow(model)
    frozen, = method.previous
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    parts = nn.ModuleDict({"model": model, "method": method})
    optimizer = torch.optim.AdamW(parts.parameters(), lr=.01, weight_decay=.1)
    assert len(parts.state_dict()) == len(model.state_dict()) + len(method.predictor.state_dict())
    for step in range(10):
        optimizer.zero_grad()
        parts.train()
        method.loss(encoded(model, seed=step)).backward()
        optimizer.step()
    assert not frozen.training and all(p.grad is None for p in frozen.parameters())
    assert all(torch.equal(before[name], x) for name, x in frozen.state_dict().items())
    assert not torch.equal(before["head.weight"], model.head.weight)
    assert all(p.grad.any() for p in method.predictor.parameters())


def test_what_is_remembered_does_not_move_the_second_view():
    """Detached in the method; the loss itself would give it a gradient."""
    method, model = pnr(pseudo_weight=1.)
    method.follow(model)
    out = encoded(model)
    z, z2 = (x.detach().requires_grad_() for x in out.columns)
    old = method.previous[0](out.ids[:4], out.mask[:4])
    learned = pseudo_negative_nce(z, z2, old)
    total = method.loss(replace(out, columns=[z, z2]))
    found, expected = (torch.autograd.grad(loss, z2)[0] for loss in (total, learned))
    assert torch.allclose(found, expected, atol=1e-7)
    remembered = pseudo_negative_nce(method.predictor(z), old, z2)
    assert torch.autograd.grad(remembered, z2)[0].any()


def test_the_loss_belongs_to_the_method():
    with pytest.raises(ValueError, match="--method pnr has a loss of its own, found --loss focal"):
        check(Config(method="pnr", loss="focal"), 1)


# ---- measures -------------------------------------------------------------------------------

def test_the_measures_of_transfer_on_the_worked_example():
    """F: (80 - 74 + 72 - 70) / 2. BWT: (-6 - 2) / 2. FWT: (50 - 45 + 58 - 55) / 2."""
    found = transfer([[80, 50, 60], [76, 72, 58], [74, 70, 81]], [33, 45, 55])
    assert found == pytest.approx({"average": 75., "forgetting": 4., "backward": -4.,
                                   "forward": 4., "plasticity": 233 / 3})


def test_forgetting_counts_from_the_best_and_is_negative_where_later_tasks_helped():
    climbing = [[10, 0, 0], [30, 20, 0], [20, 50, 5]]
    found = transfer(climbing, [0, 0, 0])
    assert found["forgetting"] == ((30 - 20) + (20 - 50)) / 2
    assert found["backward"] == ((20 - 10) + (50 - 20)) / 2

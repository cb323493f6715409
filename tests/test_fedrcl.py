"""FedRCL's relaxed contrastive loss: worked numbers, its equilibrium, and the method."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import Config
from losses import (RELAXED, class_cosines, participation_ratio, relaxed_all_pairs,
                    relaxed_hardest)
from corpus_methods import FedRCL
from methods import Encoded
from papers import check
from model import Encoder, EncoderConfig, SentenceEncoder
from negatives import topics


def at(*degrees):
    """Unit vectors at these angles."""
    turns = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1)


def random_batch(B=11, D=5, K=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, D).double(), torch.randint(K, (B,))


# ---- the loss -------------------------------------------------------------------------------

WORKED = at(0, 20, 90, 150), torch.tensor([0, 0, 1, 1])
CONTRAST = [.165258, .296257, .740493, .154266]


@pytest.mark.parametrize("form, penalty, total", [
    ("all-pairs", [.634657, .634657, 0, 0], .656397),
    ("hardest", [.634657, .634657, .018150, .018150], .665472)])
def test_the_worked_example(form, penalty, total):
    contrast, brake = RELAXED[form](*WORKED, temperature=.5)
    assert contrast.tolist() == pytest.approx(CONTRAST, abs=1e-6)
    assert brake.tolist() == pytest.approx(penalty, abs=1e-6)
    assert (contrast.mean() + brake.mean()).item() == pytest.approx(total, abs=1e-6)


def test_all_pairs_is_the_sum_over_every_pair_of_a_class():
    """The slow version: anchor by anchor, mate by mate."""
    x, y = random_batch()
    s = [[F.cosine_similarity(a, b, dim=0).item() for b in x] for a in x]
    contrasts, penalties = [], []
    for i in range(11):
        mates = [j for j in range(11) if j != i and y[j] == y[i]]
        among = sum(math.exp(s[i][k] / .2) for k in range(11) if k != i)
        contrasts += [sum(-math.log(math.exp(s[i][j] / .2) / among) for j in mates)
                      / len(mates)] if mates else []
        close = sum(math.exp(s[i][j] / .2) for j in mates if s[i][j] > .3)
        penalties.append(math.log(math.exp(1 / .2) + close) - 1 / .2)
    contrast, penalty = relaxed_all_pairs(x, y, temperature=.2, threshold=.3)
    assert contrast.tolist() == pytest.approx(contrasts)
    assert penalty.tolist() == pytest.approx(penalties, abs=1e-9) and max(penalties) > .01


def test_two_views_a_class_without_penalty_are_nt_xent_over_2n_views():
    """Chen et al. 2020: every view must find its other one among all views but itself."""
    views, _ = random_batch(B=14)
    labels = torch.arange(7).repeat(2)
    others = ~torch.eye(14, dtype=torch.bool)
    order = torch.arange(14).roll(7)
    logits = F.normalize(views) @ F.normalize(views).T / .05
    nt_xent = -(logits[torch.arange(14), order]
                - logits.masked_fill(~others, -math.inf).logsumexp(1)).mean()
    assert relaxed_all_pairs(views, labels)[0].mean().item() == pytest.approx(nt_xent.item())


@pytest.mark.parametrize("cosine, threshold, expected", [
    (1., .7, math.log(2)), (.7, .69, .002476), (.69, .7, 0.)])
def test_the_penalty_of_a_pair_at_a_cosine(cosine, threshold, expected):
    x = at(0, math.degrees(math.acos(cosine)))
    _, penalty = relaxed_all_pairs(x, torch.zeros(2), threshold=threshold)
    assert penalty.tolist() == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("temperature", [.01, .05, .5, 3.])
def test_an_identical_pair_costs_log_2_at_any_temperature(temperature):
    for form in RELAXED.values():
        _, penalty = form(at(30, 30), torch.zeros(2), temperature=temperature)
        assert penalty.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("s, slope", [(.999999, 10.), (.7, .049453), (.95, 5.378828)])
def test_the_brake_pulls_harder_the_closer_a_pair_is(s, slope):
    """d penalty / d s, from the gradient along the angle: d s / d θ = -sin θ."""
    angle = torch.tensor(math.acos(s), dtype=torch.double, requires_grad=True)
    x = torch.stack([torch.stack([angle.cos(), angle.sin()]), at(0)[0]])
    _, penalty = relaxed_all_pairs(x, torch.zeros(2), threshold=.69)
    found = torch.autograd.grad(penalty[0], angle)[0] / -angle.detach().sin()
    assert found.item() == pytest.approx(slope, rel=1e-4)


def total_of_pair(s, n, m, threshold=.7, beta=1.):
    """One pair at cosine s, m negatives at n to both: simplified by hand from the definition."""
    attract = -s / .05 + math.log(math.exp(s / .05) + m * math.exp(n / .05))
    return attract + beta * (math.log(1 + math.exp((s - 1) / .05)) if s > threshold else 0)


def pair_with_negatives(s, n):
    """Vectors with these cosines: the pair, and two of other labels at n to both and far apart."""
    c = n / math.sqrt((1 + s) / 2)                                # along the pair's middle
    half = math.acos(s) / 2
    pair = [[math.cos(half), sign * math.sin(half), 0] for sign in (1, -1)]
    return torch.tensor([*pair, *([c, 0, sign * math.sqrt(1 - c * c)] for sign in (1, -1))],
                        dtype=torch.double), torch.tensor([0, 0, 1, 2])


@pytest.mark.parametrize("n, equilibrium", [(.5, .7673), (.6, .8173)])
def test_a_pair_comes_to_rest_at_the_closed_form(n, equilibrium):
    """s* = (1 + n) / 2 + τ / 2 · ln m, with m = 2 negatives: the minimum on a grid is there."""
    assert (1 + n) / 2 + .025 * math.log(2) == pytest.approx(equilibrium, abs=5e-5)

    def loss(s, beta=1.):
        contrast, penalty = relaxed_all_pairs(*pair_with_negatives(s, n))
        assert contrast[0] + beta * penalty[0] == pytest.approx(total_of_pair(s, n, 2, beta=beta))
        return (contrast[0] + beta * penalty[0]).item()
    grid = [i / 1000 for i in range(705, 1000)]
    assert min(grid, key=loss) == pytest.approx(equilibrium, abs=1e-3)
    assert min(grid, key=lambda s: loss(s, beta=0.)) == .999      # attraction alone: a point


def test_where_negatives_are_far_the_pair_rests_at_the_threshold():
    """n = .3: the formula gives .667, below λ, where nothing brakes; just above, something does."""
    grid = [i / 1000 for i in range(500, 1000)]

    def loss(s):
        contrast, penalty = relaxed_all_pairs(*pair_with_negatives(s, .3))
        return (contrast[0] + penalty[0]).item()
    assert min(grid, key=loss) == pytest.approx(.7, abs=2e-3)


def test_alone_of_its_label_an_anchor_is_left_out_or_its_own_positive():
    x, y = at(0, 25, 60, 100), torch.tensor([0, 1, 2, 2])
    contrast, penalty = relaxed_all_pairs(x, y)
    assert len(contrast) == 2 and len(penalty) == 4
    assert len(relaxed_all_pairs(x, torch.arange(4))[0]) == 0
    contrast, penalty = relaxed_hardest(x, y)
    two = math.exp(math.cos(math.radians(25)) / .05) + math.exp(math.cos(math.radians(60)) / .05)
    own = math.exp(20)
    assert contrast[0].item() == pytest.approx(-math.log(own / (own + two)))
    assert penalty[0].item() == pytest.approx(0, abs=1e-12)


def test_the_released_penalty_waits_for_the_least_similar_mate():
    """A class of three with cosines .996, .174, .259 costs nothing there; each pair counts here."""
    x, y = at(0, 5, 80), torch.zeros(3)
    assert relaxed_hardest(x, y)[1].max() < 1e-7
    assert relaxed_all_pairs(x, y)[1][0] > .6


@pytest.mark.parametrize("form", RELAXED.values(), ids=RELAXED)
def test_names_of_labels_order_of_the_batch_and_lengths_do_not_matter(form):
    x, y = random_batch()
    expected = [part.sum().item() for part in form(x, y)]
    order = torch.randperm(11)
    for batch in [(x, 7 - 3 * y), (x[order], y[order]), (x * torch.rand(11, 1).add(.1), y)]:
        assert [part.sum().item() for part in form(*batch)] == pytest.approx(expected)


@pytest.mark.parametrize("form", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]])
def test_the_gradient_is_finite_even_where_classes_are_points_or_alone(form, labels):
    x = torch.ones(4, 3).double().requires_grad_()
    for batch in (x, x + torch.eye(4, 3)):
        contrast, penalty = form(batch, torch.tensor(labels))
        gradient, = torch.autograd.grad(contrast.sum() + penalty.sum(), x)
        assert gradient.isfinite().all()


# ---- measures of collapse -------------------------------------------------------------------

def test_class_cosines_are_means_over_pairs_of_two_different_rows():
    same, between = class_cosines(at(0, 60, 90), torch.tensor([0, 0, 1]))
    assert same == pytest.approx(.5)
    assert between == pytest.approx((0 + math.cos(math.radians(30))) / 2)


def test_the_participation_ratio_counts_the_directions_in_use():
    cross = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    assert participation_ratio(cross) == pytest.approx(5)
    assert participation_ratio(cross[[0, 1, 5, 6]]) == pytest.approx(2)
    assert participation_ratio(3 * cross[[0, 5]]) == pytest.approx(1)


def test_topics_find_the_groups_that_are_there():
    torch.manual_seed(0)
    centres, truth = 10 * torch.eye(4, 7), torch.arange(4).repeat(9)
    found = topics(centres[truth] + torch.randn(36, 7) + 50, 4, seed=0)
    assert all(len(found[truth == k].unique()) == 1 for k in range(4))
    assert len(found.unique()) == 4


# ---- the method -----------------------------------------------------------------------------

class Texts:
    columns = [[f"sentence {i}" for i in range(8)]]


def fedrcl(L=6, D=5, **settings):
    config = replace(Config(method="fedrcl", head="none", batch_size=4, classes=3), **settings)
    shape = EncoderConfig("bert", vocab_size=7, width=D, layers=L, heads=1, inner=5)
    torch.manual_seed(1)
    method = FedRCL(Texts, config, model=SentenceEncoder(Encoder(shape), pooling="mean")).double()
    method.labels.copy_(torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]))
    return method


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
    assert layers(3, L=4) == [1, 3, 4]


def test_the_loss_adds_cross_entropy_and_the_mean_over_levels_of_both_terms():
    method, out = fedrcl(ce_weight=2., scl_weight=3., penalty_weight=.5), encoded()
    y = torch.tensor([0, 0, 1, 0])
    terms = [relaxed_all_pairs(pooled(out, layer), y) for layer in (2, 4, 6)]
    expected = 2 * F.cross_entropy(method.classifier(pooled(out, 6)), y)
    expected += 3 * sum(c.mean() for c, _ in terms) / 3 + .5 * sum(p.mean() for _, p in terms) / 3
    assert method.loss(out).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("form", RELAXED)
def test_the_form_and_the_threshold_are_those_asked_for(form):
    method, out = fedrcl(relaxed=form, penalty_threshold=.1, ce_weight=0., levels=1), encoded()
    contrast, penalty = RELAXED[form](pooled(out, 6), torch.tensor([0, 0, 1, 0]), threshold=.1)
    assert method.loss(out).item() == pytest.approx((contrast.mean() + penalty.mean()).item())


def test_without_attraction_and_brake_it_is_the_classifier_alone():
    method, out = fedrcl(scl_weight=0., penalty_weight=0.), encoded()
    expected = F.cross_entropy(method.classifier(pooled(out, 6)), torch.tensor([0, 0, 1, 0]))
    assert method.loss(out) == expected and "contrast" not in method.logs()


def test_a_batch_of_all_different_classes_attracts_nothing():
    method, out = fedrcl(ce_weight=0.), encoded(B=3, rows=(0, 2, 4))
    assert method.loss(out).item() == 0 and method.logs()["close_mates"] == 0


def test_the_log_says_which_share_of_mates_is_held_apart():
    method, out = fedrcl(), encoded()
    x = pooled(out, 6)
    close = [F.cosine_similarity(x[a], x[b], dim=0) > .7 for a, b in [(0, 1), (0, 3), (1, 3)]]
    method.loss(out)
    assert method.logs()["close_mates"] == pytest.approx(sum(close) / 3)


def test_classes_are_found_once_and_kept_where_they_were_given(capsys):
    calls = []

    def encode(texts, pooling, max_tokens):
        calls.append(pooling)
        return torch.eye(3).repeat(3, 1)[:8] + torch.arange(8)[:, None] / 100
    method = fedrcl()
    method.prepare(encode, 0)
    assert not calls and method.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 1]
    method.labels.fill_(-1)
    method.prepare(encode, 0)
    assert calls == ["mean"] and len(method.labels.unique()) == 3
    assert torch.equal(method.labels[:3], method.labels[3:6])
    assert "classes: 3 clusters of 8 sentences, the largest of 3" in capsys.readouterr().err


@pytest.mark.parametrize("settings, said", [
    (dict(head="train"), "compares layers without a head, found --head train"),
    (dict(loss="focal"), "--method fedrcl has a loss of its own, found --loss focal"),
    (dict(ce_weight=0., scl_weight=0., penalty_weight=0.), "nothing would be learned"),
    (dict(levels=7), "--levels: expected at most 6, the layers of mini, found 7"),
])
def test_what_makes_no_sense_is_refused(settings, said):
    config = replace(Config(method="fedrcl", head="none"), **settings)
    with pytest.raises(ValueError, match=said):
        check(config, 1, layers=6)

"""The losses against worked examples, loops and laws. Most numbers fit on a sheet of paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import alignment, cosine, info_nce, pick_own, uniformity
from papers.focal import LOSSES

# Three anchors, their positives and their hard negatives, in the plane.
A = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
P = torch.tensor([[1, .2], [.1, 1], [1, .8]], dtype=torch.float64)
H = torch.tensor([[.9, -.1], [.2, .7], [-1, 1]], dtype=torch.float64)


def close(value, expected, tolerance=1e-6):
    return torch.allclose(torch.as_tensor(value, dtype=torch.float64),
                          torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def own_weighted(alpha):
    """Weights (3, 6) over [positives, hard negatives]: α on the own hard negative."""
    weight = torch.ones(3, 6, dtype=torch.float64)
    for i in range(3):
        weight[i, 3 + i] = alpha
    return weight


def random_pair(B=7, C=11, D=5):
    torch.manual_seed(0)
    return torch.randn(B, D).double(), torch.randn(C, D).double()


# ---- InfoNCE --------------------------------------------------------------------------------

def test_a_batch_of_three_on_a_sheet_of_paper():
    """Each anchor must find its own positive, on the diagonal, among three. τ is 0.2."""
    anchor = torch.tensor([[1, 0], [3, 4], [0, 2]]).double()      # of lengths 1, 5 and 2
    positive = torch.tensor([[.8, .6], [.6, .8], [-.6, .8]]).double()               # of length 1
    cosines = [[.8, .6, -.6],                                     # 1 · .8 + 0 · .6, and so on
               [4.8 / 5, 5 / 5, 1.4 / 5],                         # (3 · .8 + 4 · .6) / 5, ...
               [1.2 / 2, 1.6 / 2, 1.6 / 2]]                       # (0 · .8 + 2 · .6) / 2, ...
    logits = [[4, 3, -3], [4.8, 5, 1.4], [3, 4, 4]]               # cosine / τ
    assert close(cosine(anchor, positive), cosines) and close(torch.tensor(cosines) / .2, logits)
    # e^3 = 20.086, e^4 = 54.598, e^4.8 = 121.510 ...: how sure is each of its own positive?
    sure = [54.598 / (54.598 + 20.086 + .0498), 148.413 / (121.510 + 148.413 + 4.055),
            54.598 / (20.086 + 54.598 + 54.598)]
    assert sure == pytest.approx([.7306, .5417, .4223], abs=1e-4)
    loss = -sum(map(math.log, sure)) / 3                          # (.3139 + .6131 + .8620) / 3
    assert loss == pytest.approx(.5963, abs=1e-4)
    assert info_nce(anchor, positive, temperature=.2).item() == pytest.approx(loss, abs=1e-5)


def test_info_nce_is_the_mean_surprise_at_finding_the_own_positive():
    anchor, candidates = random_pair(3, 5, 7)
    surprise = []
    for i in range(3):
        similarity = [math.exp(F.cosine_similarity(anchor[i], c, dim=0) / 0.05) for c in candidates]
        surprise.append(-math.log(similarity[i] / sum(similarity)))
    assert info_nce(anchor, candidates).item() == pytest.approx(sum(surprise) / 3)


@pytest.mark.parametrize("temperature, expected", [(.05, .02305473), (1, .84672834)])
def test_the_worked_example_of_unsupervised_simcse(temperature, expected):
    assert close(info_nce(A, P, temperature=temperature), expected)


def test_the_first_view_asks_and_the_second_answers_so_order_matters():
    assert close(info_nce(P, A), .02552545)


def test_identical_orthogonal_views_leave_only_the_temperature():
    eye = torch.eye(64, dtype=torch.float64)
    assert close(info_nce(eye, eye), math.log1p(63 * math.exp(-20)), 1e-12)
    assert close(info_nce(eye, eye), 1.29853e-7, 1e-12)


def test_where_all_sentences_look_alike_the_loss_is_that_of_a_blind_guess():
    ones = torch.ones(64, 5)
    assert info_nce(ones, ones).item() == pytest.approx(math.log(64))
    assert info_nce(ones, torch.cat([ones, ones])).item() == pytest.approx(math.log(128))


def test_a_single_sentence_has_nobody_to_be_told_from_so_nothing_to_learn():
    anchor = torch.randn(1, 5, requires_grad=True)
    for loss in LOSSES.values():
        value = loss(anchor, torch.randn(1, 5))
        gradient, = torch.autograd.grad(value, anchor)
        assert value.item() == 0 and gradient.abs().max() == 0


def test_the_gradient_of_a_similarity_is_its_probability_minus_the_answer():
    s = cosine(A, P).requires_grad_()
    gradient, = torch.autograd.grad(pick_own(s / .05), s)
    assert close(gradient, ((s / .05).softmax(dim=1) - torch.eye(3)) / (3 * .05))
    assert close(gradient[0], [-.12058866, 1.5e-7, .12058851])
    assert close(gradient.sum(dim=1), [0, 0, 0])


# ---- Hard negatives and weights -------------------------------------------------------------

def test_hard_negatives_are_more_candidates_and_they_count():
    with_hard = info_nce(A, torch.cat([P, H]))
    assert close(with_hard, .46420945)
    assert with_hard > info_nce(A, P)


@pytest.mark.parametrize("alpha, expected", [
    (1, .46420945), (2, .70974585), (.5, .29270133),
    (math.exp(2), 1.35524770)])                                   # their command line takes ln α
def test_alpha_multiplies_the_own_hard_negative_only(alpha, expected):
    assert close(info_nce(A, torch.cat([P, H]), weight=own_weighted(alpha)), expected)


@pytest.mark.parametrize("times", [0, 2])
def test_a_weight_is_how_often_a_candidate_is_there(times):
    anchor, candidates = random_pair(5, 11)
    weight = torch.ones(5, 11).double()
    weight[:, 7] = times
    same = torch.cat([candidates[:7], *[candidates[7:8]] * times, candidates[8:]])
    for loss in LOSSES.values():
        assert close(loss(anchor, candidates, weight=weight), loss(anchor, same), 1e-12)


# ---- Laws of every loss ---------------------------------------------------------------------

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_every_loss_prefers_the_true_pairing_and_no_zero_vector_makes_it_nan(loss):
    x, (anchor, candidates) = torch.eye(5) + .1, random_pair()
    assert loss(x, x) < loss(x, x.roll(1, dims=0))                # than its neighbour's positive
    assert loss(x, x) < loss(x, torch.cat([x, x]))                # than with itself as a negative
    anchor[0] = 0                                                 # has cosine 0 with all
    assert loss(anchor, candidates).isfinite()


@every_loss
def test_no_loss_depends_on_length_or_rotation(loss):
    anchor, candidates = random_pair()
    scale = torch.rand(7, 1).double() + .5
    turn = torch.linalg.qr(torch.randn(5, 5).double()).Q
    assert close(loss(anchor * scale, candidates * 3), loss(anchor, candidates), 1e-12)
    assert close(loss(anchor @ turn, candidates @ turn), loss(anchor, candidates), 1e-12)


@every_loss
def test_the_gradient_turns_an_embedding_and_never_stretches_it(loss):
    anchor, candidates = random_pair()
    anchor.requires_grad_()
    gradient, = torch.autograd.grad(loss(anchor, candidates), anchor)
    assert (gradient * anchor).sum(dim=1).abs().max() < 1e-12


@every_loss
def test_the_order_of_the_batch_does_not_matter_but_the_pairing_does(loss):
    anchor, candidates = random_pair(7, 7)
    order = torch.randperm(7)
    assert close(loss(anchor[order], candidates[order]), loss(anchor, candidates), 1e-12)
    assert not close(loss(anchor, candidates.roll(1, dims=0)), loss(anchor, candidates), 1e-3)


# ---- Alignment and uniformity ---------------------------------------------------------------

def test_alignment_is_the_mean_squared_distance_on_the_sphere():
    left, right = torch.tensor([[1., 0], [0, 1]]), torch.tensor([[.6, .8], [0, 1]])
    assert alignment(left, right).item() == pytest.approx(.4)
    assert close(alignment(A, P), .02033227)


def test_uniformity_averages_over_distinct_pairs():
    x = torch.tensor([[1., 0], [0, 1], [-1, 0]])
    assert uniformity(x).item() == pytest.approx(-4.396349, abs=1e-5)
    assert close(uniformity(torch.cat([A, P])), -.89313790)
    total = [math.exp(-2 * (u - v).square().sum()) for i, u in enumerate(x) for v in x[i + 1:]]
    assert uniformity(x).item() == pytest.approx(math.log(sum(total) / 3), abs=1e-5)


def test_collapse_has_uniformity_zero_and_random_directions_come_near_minus_four():
    torch.manual_seed(0)
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.randn(2000, 768)).item() == pytest.approx(-3.9896, abs=2e-3)


def test_both_measures_ignore_length_and_the_chunks_of_uniformity_change_nothing():
    x = random_pair(53, 53, 7)[0]
    assert close(alignment(3 * A, P / 7), alignment(A, P), 1e-12)
    assert close(uniformity(3 * A), uniformity(A), 1e-12)
    assert close(uniformity(x, chunk=11), uniformity(x), 1e-12)

"""Focal-InfoNCE against worked examples, a loop and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import Corpus
from losses import cosine, info_nce, pick_own
from model import EncoderConfig
from papers import METHODS, check
from papers.focal import focal_info_nce

# Three anchors and their positives, in the plane.
A = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
P = torch.tensor([[1, .2], [.1, 1], [1, .8]], dtype=torch.float64)


def close(value, expected, tolerance=1e-6):
    return torch.allclose(torch.as_tensor(value, dtype=torch.float64),
                          torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def with_cosines(s):
    """Unit anchors, which are axes, and candidates of these cosines: (B, C) -> (B | C, B + 1)."""
    rest = (1 - s.square().sum(dim=0)).sqrt()
    return torch.eye(len(s), len(s) + 1, dtype=s.dtype), torch.cat([s, rest[None]]).mT


def slope(s, **settings):
    """The gradient of the loss with respect to each cosine."""
    s = s.clone().requires_grad_()
    gradient, = torch.autograd.grad(focal_info_nce(*with_cosines(s), **settings), s)
    return gradient


# ---- the formula ----------------------------------------------------------------------------

def test_a_batch_of_two_on_a_sheet_of_paper():
    """τ is 0.1, m 0.3. InfoNCE has the same loss for both anchors: log(1 + e^-2) = .1269."""
    found = focal_info_nce(*with_cosines(torch.tensor([[.8, .6], [.5, .7]]).double()),
                           temperature=.1)
    first = math.log1p(math.exp((.6 * (.6 + .3) - .8 * .8) / .1))   # .54 - .64: log(1 + e^-1)
    second = math.log1p(math.exp((.5 * (.5 + .3) - .7 * .7) / .1))  # .40 - .49: log(1 + e^-.9)
    assert [first, second] == pytest.approx([.3133, .3412], abs=1e-4)
    assert found.item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("temperature, hardness, expected",
                         [(.05, .3, .15269911), (.05, 0, .00133764), (1, .3, .86291774)])
def test_the_worked_example(temperature, hardness, expected):
    assert close(focal_info_nce(A, P, temperature=temperature, hardness=hardness), expected)


def test_a_loop_over_more_candidates_than_anchors_gives_the_same():
    torch.manual_seed(0)
    B, C, D = 3, 5, 7
    anchor, candidates = torch.randn(B, D).double(), torch.randn(C, D).double()
    weight = torch.rand(B, C).double()
    total = 0
    for i in range(B):
        s = [F.cosine_similarity(anchor[i], c, dim=0).item() for c in candidates]
        each = [math.exp(s[j] * (s[j] if j == i else s[j] + .2) / .05) for j in range(C)]
        among = sum(weight[i, j].item() * each[j] for j in range(C))
        total -= math.log(weight[i, i].item() * each[i] / among)
    found = focal_info_nce(anchor, candidates, weight=weight, hardness=.2)
    assert found.item() == pytest.approx(total / B)


def test_hardness_zero_is_info_nce_on_squares_and_not_info_nce():
    assert close(focal_info_nce(A, P, hardness=0), pick_own(cosine(A, P).square() / .05), 1e-12)
    assert not close(focal_info_nce(A, P, hardness=0), info_nce(A, P))


@pytest.mark.parametrize("hardness", [0, .3, .9])
def test_on_orthogonal_views_focal_and_plain_agree(hardness):
    eye = torch.eye(64, dtype=torch.float64)
    assert close(focal_info_nce(eye, eye, hardness=hardness), 1.29853e-7, 1e-12)


def all_equal(n, s):
    """n unit anchors and candidates whose cosines are all s."""
    anchor = torch.tensor([[1., 0]], dtype=torch.float64)
    candidate = torch.tensor([[s, math.sqrt(1 - s * s)]], dtype=torch.float64)
    return anchor.expand(n, 2), candidate.expand(n, 2)


@pytest.mark.parametrize("n, s, expected", [
    (64, .2, 5.34790419), (64, .5, 7.14392469), (64, 0, math.log(64)), (2, 1, 6.00247569)])
def test_where_all_cosines_are_equal_it_has_a_closed_form_and_info_nce_is_log_n(n, s, expected):
    """So a duplicate in the batch, the last case, costs focal far more."""
    closed_form = math.log1p((n - 1) * math.exp(.3 * s / .05))
    assert close(focal_info_nce(*all_equal(n, s)), closed_form, 1e-9)
    assert close(closed_form, expected) and close(info_nce(*all_equal(n, s)), math.log(n))


@pytest.mark.parametrize("s, cheaper", [(.5, True), (.7, None), (.9, False)])
def test_a_negative_counts_more_than_in_info_nce_from_one_minus_hardness_on(s, cheaper):
    anchor = torch.tensor([[1., 0]], dtype=torch.float64)         # its positive is itself
    candidates = torch.tensor([[1, 0], [s, math.sqrt(1 - s * s)]], dtype=torch.float64)
    focal, plain = focal_info_nce(anchor, candidates), info_nce(anchor, candidates)
    assert close(focal, plain, 1e-12) if cheaper is None else (focal < plain) == cheaper


# ---- the gradient ---------------------------------------------------------------------------

def test_gradient_flows_through_both_factors():
    torch.manual_seed(0)
    s = .4 * torch.rand(5, 5).double()
    own = torch.eye(5, dtype=torch.bool)
    chance = (torch.where(own, s * s, s * (s + .3)) / .05).softmax(dim=1)
    expected = torch.where(own, (chance - 1) * 2 * s, chance * (2 * s + .3)) / .05 / 5
    found = slope(s)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert (found.diagonal() <= 0).all() and (found[~own] >= 0).all()


def test_a_positive_below_zero_is_pushed_away():
    s = torch.tensor([[-.2, .1], [.1, .9]], dtype=torch.float64)
    assert close(focal_info_nce(*with_cosines(s)), .34657369)
    assert close(slope(s), [[2, 2.5], [1e-6, -3.7e-6]], 1e-5)


def test_a_negative_is_driven_to_minus_half_the_hardness_and_not_to_minus_one():
    found = slope(torch.tensor([[.9, -.4], [-.1, .9]], dtype=torch.float64))
    assert close(found[0, 1], -1.03e-6, 1e-8) and close(found[1, 0], 6.2e-8, 1e-9)


# ---- the page -------------------------------------------------------------------------------

def corpus(columns):
    return Corpus("nli.csv", [["a", "b"]] * columns, None, "", 0)


def test_the_hardness_is_a_setting():
    method = METHODS["simcse"]
    assert method.Config().hardness == .3                         # the authors'
    built = method(corpus(1), method.Config(loss="focal", hardness=.1, temperature=.2), model=None)
    assert built.loss_of(A, P) == focal_info_nce(A, P, hardness=.1, temperature=.2)


def test_a_corpus_with_hard_negatives_is_refused_and_pairs_are_not():
    config = METHODS["simcse"].Config(loss="focal", corpus="nli.csv", batch_size=2)
    shape = EncoderConfig("bert", 7, 3, 2, 1, 5)
    check(config, [corpus(1)], shape), check(config, [corpus(2)], shape)
    with pytest.raises(ValueError, match=r"nli.csv has hard negatives \(3 columns\): use --lo"):
        check(config, [corpus(3)], shape)

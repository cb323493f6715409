"""IS-CSE: the memory, the blend of a positive with its neighbours, and the loss with both."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import resolved
from data import Corpus
from losses import cosine, info_nce
from model import Encoder, EncoderConfig, SentenceEncoder
from papers.focal import focal_info_nce
from papers.is_cse import ISCSE, Config, alpha, smooth
from papers.memory import Memory
from papers.simcse import Encoded

# The worked example: a memory of four, which is full, and a batch of two in three dimensions.
ROWS = torch.tensor([[1, 0, 0], [0, 0, 1], [.6, .8, 0], [0, 1, 0]], dtype=torch.float64)
ANCHOR = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.float64)
POSITIVE = torch.tensor([[.8, .6, 0], [0, .6, .8]], dtype=torch.float64)


def worked_memory():
    memory = Memory(4, 3).double()
    memory.rows.copy_(ROWS)
    memory.push(POSITIVE)
    return memory


# ---- the memory -----------------------------------------------------------------------------

def test_the_newest_rows_come_in_at_the_end_without_gradient_and_of_unit_length():
    memory = worked_memory()
    assert memory.rows.tolist() == [[.6, .8, 0], [0, 1, 0], [.8, .6, 0], [0, .6, .8]]
    memory.push(torch.full((2, 3), 7., requires_grad=True))
    assert not memory.rows.requires_grad
    assert torch.allclose(memory.rows[2:].norm(dim=1), torch.ones(2).double())


@pytest.mark.parametrize("slots, batch, first", [(1024, 64, 16), (1024, 100, 11), (1024, 512, 2)])
def test_the_memory_is_full_after_as_many_batches_as_it_takes(slots, batch, first):
    memory, pushes = Memory(slots, 2), 0
    while not memory.full:
        memory.push(torch.ones(batch, 2))
        pushes += 1
    assert pushes == first and len(memory.rows) == slots


def test_a_batch_larger_than_the_memory_is_our_own_bug():
    with pytest.raises(AssertionError, match="larger than the memory"):
        Memory(3, 2).push(torch.ones(4, 2))


# ---- smoothing ------------------------------------------------------------------------------

def test_a_blend_on_a_sheet_of_paper():
    """x = (.8, .6, 0) and its nearest memory, β = 2."""
    rows = worked_memory().rows                                   # x itself is the third
    assert (rows @ POSITIVE[0]).tolist() == pytest.approx([.96, .6, 1, .36])
    own = math.exp(1 / 2) / (math.exp(1 / 2) + math.exp(.96 / 2))   # .505: nearly a plain mean
    blend = [own * .8 + (1 - own) * .6, own * .6 + (1 - own) * .8, 0]
    assert blend == pytest.approx([.7010, .6990, 0], abs=1e-4)
    assert smooth(POSITIVE, rows, neighbours=1)[0].tolist() == pytest.approx(blend)


@pytest.mark.parametrize("neighbours, blends", [
    (0, POSITIVE.tolist()), (1, [[.70099997, .69900003, 0], [0, .7800664, .4398672]]),
    (2, [[.49594648, .78704724, 0], [.178637, .7860012, .30890627]])])
def test_the_worked_blends(neighbours, blends):
    found = smooth(POSITIVE * 3, worked_memory().rows, neighbours=neighbours)
    assert torch.allclose(found, torch.tensor(blends, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("neighbours, temperature, expected", [
    (1, 2, .01812284), (2, 2, .12227844), (3, 2, .36596425),
    (2, 1, .12075641), (2, 1e9, .13539289), (2, 1e-9, .34657365)])
def test_beta_goes_from_the_positive_alone_to_the_plain_mean(neighbours, temperature, expected):
    found = smooth(POSITIVE, worked_memory().rows, neighbours=neighbours, temperature=temperature)
    assert info_nce(ANCHOR, found).item() == pytest.approx(expected, abs=1e-6)


def test_the_own_copy_is_the_nearest_row_and_is_left_out():
    rows = worked_memory().rows
    assert (POSITIVE @ rows.mT).argmax(dim=1).tolist() == [2, 3]
    twice = torch.cat([POSITIVE[:, None], rows[(POSITIVE @ rows.mT).topk(2).indices]], dim=1)
    wrong = ((twice @ POSITIVE[:, :, None] / 2).softmax(dim=1) * twice).sum(dim=1)
    assert info_nce(ANCHOR, wrong).item() == pytest.approx(.05062045, abs=1e-6)
    assert not torch.allclose(smooth(POSITIVE, rows, neighbours=2), wrong, atol=1e-3)


def test_a_loop_over_sorted_memories_gives_the_same():
    torch.manual_seed(0)
    memory, x = Memory(23, 5), torch.randn(7, 5)
    memory.push(torch.randn(16, 5))
    memory.push(x)
    found = smooth(x, memory.rows, neighbours=3)
    for i, unit in enumerate(x / x.norm(dim=1, keepdim=True)):
        ranked = sorted(memory.rows, key=lambda row: -float(row @ unit))
        group = torch.stack([unit, *ranked[1:4]])
        weight = torch.exp(group @ unit / 2)
        blend = (weight[:, None] * group).sum(dim=0) / weight.sum()
        assert torch.allclose(found[i], blend, atol=1e-6)


def test_gradient_reaches_the_positive_in_its_own_blend_and_nothing_remembered():
    memory = worked_memory()
    anchor, positive = ANCHOR.clone().requires_grad_(), POSITIVE.clone().requires_grad_()
    loss = info_nce(anchor, smooth(positive, memory.rows, neighbours=2))
    found = torch.autograd.grad(loss, [anchor, positive])
    expected = [[[0, .0009, .0052], [.7039, 0, -.7723]],
                [[-.2941, .3922, 0], [.1835, -.3046, .2285]]]
    for gradient, wanted in zip(found, expected):
        assert torch.allclose(gradient, torch.tensor(wanted, dtype=torch.float64), atol=1e-3)
    assert not memory.rows.requires_grad and memory.rows.grad_fn is None
    assert (found[1] * positive).sum(dim=1).abs().max() < 1e-12


def test_a_blend_is_never_longer_than_one_and_weighs_the_positive_most():
    torch.manual_seed(0)
    memory, x = Memory(64, 5), torch.randn(16, 5)
    for _ in range(4):
        memory.push(x + torch.randn(16, 5))
    memory.push(x)
    blend, mean = (smooth(x, memory.rows, neighbours=8, temperature=t) for t in (2, 1e9))
    assert (blend.norm(dim=1) <= 1 + 1e-6).all()
    assert (cosine(x, blend).diagonal() > cosine(x, mean).diagonal()).all()


# ---- the loss -------------------------------------------------------------------------------

SMALL = Config(method="is-cse", batch_size=2, buffer_size=4, neighbours=2)
SHAPE = EncoderConfig("bert", 7, 3, 1, 1, 5)


def method(*, full=False, **settings):
    """The method on an encoder of width 3, which it never runs; perhaps with the worked memory."""
    corpus = Corpus("animals", [["a dog runs", "a cat sleeps"]], None, "", 0)
    model = SentenceEncoder(Encoder(SHAPE), pooling="cls")
    built = ISCSE(corpus, replace(SMALL, **settings), model=model).double()
    if full:
        built.memory.rows.copy_(ROWS)
    return built


def random_columns(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, 3).double() for _ in range(2)]


@pytest.mark.parametrize("neighbours, expected", [(1, .34838593), (2, .35880150)])
def test_the_worked_loss(neighbours, expected):
    built = method(neighbours=neighbours, full=True)
    found = built.loss(Encoded([ANCHOR, POSITIVE], 1, 9)).item()
    assert found == pytest.approx(expected, abs=1e-6)
    assert built.logs()["instance_loss"] == pytest.approx(.34657365)
    assert found == pytest.approx(
        built.logs()["instance_loss"] + .1 * built.logs()["smoothing_loss"])


def test_until_the_memory_is_full_it_is_simcse_gradients_included():
    built = method()
    for step in (1, 2):                                           # 2 x 2 rows fill the 4 slots
        a, p = (x.requires_grad_() for x in random_columns(step))
        losses = built.loss(Encoded([a, p], step, 9)), info_nce(a, p)
        gradients = [torch.autograd.grad(loss, [a, p]) for loss in losses]
        same = torch.equal(*losses) and all(map(torch.equal, *gradients))
        assert same == (step < 2)


@pytest.mark.parametrize("loss, of_it", [("info-nce", info_nce), ("focal", focal_info_nce)])
@pytest.mark.parametrize("weight", [0., .1])
def test_the_loss_that_is_asked_for_serves_both_terms_and_weight_zero_leaves_one(
        loss, of_it, weight):
    """Without neighbours a blend is the positive itself, which counts 1 + α times."""
    built = method(loss=loss, neighbours=0, alpha_start=weight, alpha_end=weight, full=True)
    found, plain = built.loss(Encoded(random_columns(), 1, 9)), of_it(*random_columns())
    assert found == plain if not weight else found.item() == pytest.approx(1.1 * plain.item())


def test_the_memory_is_saved_with_the_run():
    built, again = method(), method()
    built.loss(Encoded(random_columns(), 1, 9))
    again.load_state_dict(built.state_dict())
    assert torch.equal(again.memory.rows, built.memory.rows) and again.memory.rows[-1].any()


# ---- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("share, expected", [
    (0, .005), (.05, .0055540247), (.1, .0072024568), (.2, .0135942353), (.25, .0181801948),
    (.3, .0235496636), (.4, .0360942353), (.45, .0429604491), (.5, .05), (.75, .05)])
def test_the_weight_climbs_until_mid_training_and_a_constant_one_stays(share, expected):
    step = round(share * 1000) + 1
    assert alpha(step, 1000, start=.005, end=.05) == pytest.approx(expected, abs=1e-9)
    assert alpha(step, 1000, start=.1, end=.1) == .1
    theirs = min(math.cos(math.pi * (step - 1) / 1000) * (.005 - .05), 0) + .05   # their code
    assert alpha(step, 1000, start=.005, end=.05) == theirs


@pytest.mark.parametrize("width, weights", [(768, (.1, .1)), (1024, (.005, .05))])
def test_the_weight_is_constant_for_base_and_a_ramp_for_large(width, weights):
    config = resolved("is-cse", "bert", width)
    assert (config.alpha_start, config.alpha_end) == weights
    assert (config.buffer_size, config.neighbours, config.smoothing_temperature) == (1024, 16, 2)


@pytest.mark.parametrize("settings, said", [
    (dict(batch_size=5), "--buffer-size 4 must be at least the batch size (5)"),
    (dict(neighbours=4), "--buffer-size 4 must be at least the batch size (2) and more than --nei"),
    (dict(alpha_start=.5), "--alpha-end: expected at least --alpha-start, 0.5, found 0.1")])
def test_a_memory_too_small_and_a_weight_that_falls_are_refused(settings, said):
    ISCSE.check(SMALL, [], SHAPE)
    with pytest.raises(ValueError) as refused:
        ISCSE.check(replace(SMALL, **settings), [], SHAPE)
    assert said in str(refused.value)

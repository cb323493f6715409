"""What a solution must do. Run one by its number: python -m pytest docs/exercises -k 03."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import exercises as yours                                         # noqa: E402
import losses                                                     # noqa: E402
import mincse                                                     # noqa: E402
from data import Corpus                                           # noqa: E402
from engine.flags import check_ranges                             # noqa: E402
from model import Encoder, EncoderConfig, SentenceEncoder, places_of          # noqa: E402
from papers.simcse import Encoded                                 # noqa: E402

# Anchors, positives and hard negatives in the plane.
A = torch.tensor([[1., 0], [0, 1], [1, 1]])
P = torch.tensor([[1, .2], [.1, 1], [1, .8]])
H = torch.tensor([[.9, -.1], [.2, .7], [-1, 1]])


def random_rows(count, B=5, D=7):
    torch.manual_seed(0)
    return torch.randn(count, B, D)


def batch(B=8, T=6):
    """A small encoder with dropout, and tokens for it; the second half of some rows is padding."""
    torch.manual_seed(0)
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 50, 16, 2, 2, 32)), pooling="mean")
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[::2, T // 2 :] = False
    return model, torch.randint(5, 50, (B, T)) * mask, mask


def test_01_info_nce_from_its_formula():
    assert yours.info_nce(A, P, temperature=1).item() == pytest.approx(.846728, abs=1e-5)
    assert yours.info_nce(A, P, temperature=.05).item() == pytest.approx(.023055, abs=1e-5)
    same = torch.ones(8, 3)                                       # a blind guess among eight
    assert yours.info_nce(same, same, temperature=.05).item() == pytest.approx(math.log(8))


def test_02_a_low_temperature_pushes_the_closest_negative_alone():
    a, p = random_rows(2)
    for temperature in (.05, 1):
        s = losses.cosine(a, p).requires_grad_()
        slope, = torch.autograd.grad(losses.pick_own(s / temperature), s)
        slope = slope.fill_diagonal_(0)
        expected = slope / slope.sum(dim=1, keepdim=True)
        assert torch.allclose(yours.push_shares(a, p, temperature=temperature), expected, atol=1e-5)
    cold, warm = (yours.push_shares(a, p, temperature=t).amax(dim=1) for t in (.01, 100))
    assert cold.mean() > .95 and warm == pytest.approx([1 / 4] * 5, abs=.01)


def test_03_a_symmetric_loss_asks_in_both_directions():
    there, back = (losses.info_nce(x, y, temperature=.05).item() for x, y in ((A, P), (P, A)))
    assert there != pytest.approx(back, abs=1e-4)
    for x, y in ((A, P), (P, A)):
        assert yours.symmetric(x, y, temperature=.05).item() == pytest.approx((there + back) / 2)


def test_04_dropout_makes_two_views_of_a_sentence_and_one_mask_for_both_makes_one():
    model, ids, mask = batch()
    passes = []
    model.register_forward_hook(lambda *call: passes.append(1))
    for views, same in ((yours.two_views, False), (yours.broken_views, True)):
        model.eval()                                              # the caller may have scored it
        first, second = views(model, ids, mask)
        assert first.shape == second.shape == (8, 16)
        assert (F.cosine_similarity(first, second) > .9999).all() == same
        assert not torch.allclose(first, model.eval()(ids, mask))   # dropout was on, in both cases
        assert same or len(passes) <= 2                           # its own pass, and that of eval


def test_05_uniformity_is_lower_the_more_evenly_the_sphere_is_used():
    x, = random_rows(1)
    assert yours.uniformity(x).item() == pytest.approx(losses.uniformity(x).item(), abs=1e-5)
    assert yours.uniformity(3 * x).item() == pytest.approx(yours.uniformity(x).item(), abs=1e-5)
    assert yours.uniformity(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-5)
    assert yours.uniformity(torch.tensor([[1., 0], [-1, 0]])).item() == pytest.approx(-8, abs=1e-5)


def test_06_padding_has_no_vote_in_a_pooling():
    model, ids, mask = batch()
    hidden = [x - 5 for x in model.eval().layers(ids, mask)]      # all negative, padding as well
    expected = [max(hidden[-1][0, t, 3].item() for t in range(3)),  # half of row 0 is padding
                max(hidden[-1][1, t, 3].item() for t in range(6))]
    found = yours.max_pooling(hidden, mask)
    assert found.shape == (8, 16) and found[:2, 3].tolist() == pytest.approx(expected)
    padded = [F.pad(x, (0, 0, 0, 4), value=9.) for x in hidden]
    assert torch.equal(yours.max_pooling(padded, F.pad(mask, (0, 4))), found)


def test_07_the_weight_of_the_own_hard_negative():
    for alpha, expected in ((1, .464209), (2, .709746), (.5, .292701)):
        found = yours.hard_info_nce(A, P, H, alpha=alpha, temperature=.05)
        assert found.item() == pytest.approx(expected, abs=1e-5)
    hard = H.clone().requires_grad_()                             # at α = 0 others still count it
    yours.hard_info_nce(A, P, hard, alpha=0, temperature=.05).backward()
    assert hard.grad.isfinite().all() and hard.grad[1].any()


def test_08_an_equal_sentence_is_no_negative():
    ids = torch.tensor([[1, 7, 2], [1, 8, 2], [1, 7, 2], [1, 7, 3]])
    weight = yours.true_negatives(ids)
    assert weight.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    a, p = random_rows(2, B=4)
    p.requires_grad_()
    losses.info_nce(a[:1], p, weight=weight[:1]).backward()
    assert p.grad[1].any() and not p.grad[2].any()                # 2 is not pushed away from 0


def test_09_a_view_changes_few_words_and_never_leaves_nothing():
    text, seeds = "the quick brown animal jumps over another lazy animal today", range(200)
    views = [yours.my_view(text, random.Random(seed), rate=.2) for seed in seeds]
    assert views == [yours.my_view(text, random.Random(seed), rate=.2) for seed in seeds]
    assert all(view.strip() for view in views) and len({*views}) > 10
    kept = [len({*view.split()} & {*text.split()}) / 9 for view in views]
    assert sum(kept) / 200 > .5                                   # words of the text that it has
    assert all(yours.my_view(word, random.Random(seed), rate=.9).strip()
               for word in ("a", "animals", "12.5", "é") for seed in seeds)
    assert yours.my_view(text, random.Random(0), rate=0) == text


def test_10_a_paper_of_your_own_has_a_setting_a_loss_and_terms_and_it_learns():
    model, ids, mask = batch()
    config = yours.Geometry.Config(uniformity_weight=.3, batch_size=8, learning_rate=1e-3)
    corpus = Corpus("mine", [[f"sentence {row}" for row in range(8)]], None, "", 0)
    method = yours.Geometry(corpus, config, model=model)
    a, p = random_rows(2)
    near, spread = losses.alignment(a, p).item(), losses.uniformity(torch.cat([a, p])).item()
    assert method.loss(Encoded([a, p], 1, 9)).item() == pytest.approx(near + .3 * spread, abs=1e-5)
    assert sorted(method.logs().values()) == pytest.approx(sorted([near, spread]), abs=1e-5)
    with pytest.raises(ValueError, match="--uniformity-weight: expected 0 or more"):
        check_ranges(yours.Geometry.Config(uniformity_weight=-1.))
    block = [x.repeat(2, 1) for x in (ids, mask)]
    batches = [mincse.Batch(*block, places_of(block[1]), torch.arange(8), 2)] * 20
    optimizer = torch.optim.AdamW(model.parameters())
    found = [losses.uniformity(out.anchor).item() for _, _, out in mincse.train(
        model, method, optimizer, iter(batches), config, steps=20)]
    assert found[-1] < found[0] - .5                              # the sphere is used better

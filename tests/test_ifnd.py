"""IFND, in the style of: negatives that share the anchor's cluster, accepted by confidence."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
from engine.flags import check_ranges, dashed
from losses import info_nce, many_positives
from model import Encoder, EncoderConfig, SentenceEncoder
from papers.corpus import EMPTY
from papers.ifnd import IFND, Config, accept, false_negatives
from papers.simcse import Encoded, SimCSE


WORDS = "dog cat owl elk bee cow".split()
CORPUS = data.Corpus("a", [[f"{word} {i}" for i in range(10) for word in WORDS]], None, "", 0)
TRIPLES = data.Corpus("a", CORPUS.columns * 3, None, "", 0)
BOTH = ["eliminate", "attract"]


def method(labels=None, corpus=CORPUS, **settings):
    """IFND with these accepted labels, one list for each granularity."""
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 4, 1, 1, 5)), pooling="cls")
    found = IFND(corpus, Config(**{"batch_size": 8} | settings), model=model)
    if labels is not None:
        found.label[:, : len(labels[0])] = torch.tensor(labels, dtype=torch.int32)
    return found


def with_cosines(cosines):
    """Anchors and positives that have just these cosines: x x⁻¹ s, with unit rows."""
    s = torch.tensor(cosines, dtype=torch.float64)
    n, width = len(s), 2 * len(s)
    anchor = torch.eye(n, width, dtype=torch.float64)
    rest = (1 - s.square().sum(dim=0)).clamp(min=0).sqrt()        # of each positive
    return anchor, torch.cat([s.mT, torch.diag(rest)], dim=1)


def batch(B=6, V=2, D=5, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, D).double().requires_grad_() for _ in range(V)]


def loss_of(ifnd, columns):
    return ifnd.loss(Encoded(columns, 1, 9, torch.arange(len(columns[0]))))


def per_anchor(cosines, false, strategy, tau):
    """The formulas, in loops."""
    found = []
    for i, row in enumerate(cosines):
        s = [x / tau for x in row]
        kept = [math.exp(x) for j, x in enumerate(s) if strategy == "attract" or not false[i][j]]
        group = [i] + [j for j in range(len(row)) if false[i][j] and strategy == "attract"]
        found.append(sum(math.log(sum(kept)) - s[j] for j in group) / len(group))
    return found


# ---- the losses -----------------------------------------------------------------------------

COSINES = [[.9, .7, .1], [.6, .8, .2], [0., .3, .7]]
SAME = [[False, True, False], [True, False, False], [False] * 3]


@pytest.mark.parametrize("strategy, each, mean", [
    ("eliminate", [.183901, .263282, .528229], .325137),
    ("attract", [.827123, .878802, .528229], .744718)])
def test_the_worked_example(strategy, each, mean):
    """τ is 0.5, so the first anchor has logits 1.8, 1.4 and .2; 1.4 is a false negative."""
    by_hand = {"eliminate": math.log(1 + math.exp(.2 - 1.8)),
               "attract": math.log(math.exp(1.8) + math.exp(1.4) + math.exp(.2)) - (1.8 + 1.4) / 2}
    assert by_hand[strategy] == pytest.approx(each[0], abs=1e-6)
    assert per_anchor(COSINES, SAME, strategy, .5) == pytest.approx(each, abs=1e-6)
    logits = torch.tensor(COSINES).double() / .5
    same = torch.tensor(SAME)
    assert false_negatives(torch.tensor([0, 0, 1])).tolist() == SAME
    if strategy == "attract":
        found = many_positives(logits, same | torch.eye(3, dtype=torch.bool))
    else:
        found = F.cross_entropy(logits.masked_fill(same, -math.inf), torch.arange(3))
    assert found.item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("strategy", BOTH)
def test_with_one_of_two_labels_accepted_it_is_info_nce(strategy):
    anchor, positive = with_cosines([[.6, .5, .1], [.4, .7, .2], [0., .3, .7]])
    cosines = F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).mT
    one = method([[0, EMPTY, 1]] * 2, temperature=.5, false_negatives=strategy)
    plain = per_anchor(cosines.tolist(), [[False] * 3] * 3, strategy, .5)
    assert loss_of(one, [anchor, positive]).item() == pytest.approx(sum(plain) / 3)
    all_three = method([[0, 0, 1]] * 2, temperature=.5, false_negatives=strategy)
    expected = per_anchor(cosines.tolist(), SAME, strategy, .5)
    assert loss_of(all_three, [anchor, positive]).item() == pytest.approx(sum(expected) / 3)


def test_before_any_label_is_accepted_it_is_info_nce_and_elimination_to_the_bit():
    columns = batch()
    losses = [loss_of(method(), columns), info_nce(*columns)]
    assert torch.equal(*losses)
    assert all(map(torch.allclose, *(torch.autograd.grad(loss, columns) for loss in losses)))
    attract = loss_of(method(false_negatives="attract"), columns)
    assert attract.item() == pytest.approx(losses[1].item(), abs=1e-14)


def test_elimination_is_never_above_info_nce_and_equal_only_where_nothing_is_left_out():
    cosines = (torch.rand(6, 6) * 2 - 1).tolist()
    false = false_negatives(torch.tensor([0, 1, 0, 2, EMPTY, EMPTY])).tolist()
    pairs = zip(per_anchor(cosines, false, "eliminate", .05),
                per_anchor(cosines, [[False] * 6] * 6, "eliminate", .05))
    assert [a < b for a, b in pairs] == [True, False, True, False, False, False]
    columns = batch()
    assert loss_of(method([[0, 1, 0, 2, EMPTY, EMPTY]] * 2), columns) < info_nce(*columns)


def test_an_eliminated_pair_has_no_slope_and_an_attracted_one_is_pulled_up_to_its_share():
    """d loss / d S of cosines S; a negative that is kept is pushed away."""
    torch.manual_seed(3)
    s, own = torch.randn(4, 4).double().requires_grad_(), torch.eye(4, dtype=torch.bool)
    false, p = false_negatives(torch.tensor([0, 0, 1, EMPTY])), (2 * s).softmax(dim=1).detach()
    slope, = torch.autograd.grad(F.cross_entropy(2 * s + (~false).log(), torch.arange(4)), s)
    assert (slope[false] == 0).all() and false.sum() == 2
    assert (slope[~false & ~own] > 0).all() and (slope[own] < 0).all()
    false = false_negatives(torch.tensor([0, 0, 0, 1]))
    slope, = torch.autograd.grad(many_positives(2 * s, own | false), s)
    share = 1 / (1 + false.sum(dim=1, keepdim=True)).expand_as(p)
    assert ((slope < 0) == (p < share))[false].all() and (slope[false] < 0).any()


def test_who_is_a_false_negative():
    found = false_negatives(torch.tensor([3, EMPTY, 3, EMPTY, 0, 3]))
    pairs = {(i, j) for i in range(6) for j in range(6) if found[i, j]}
    assert pairs == {(0, 2), (2, 0), (0, 5), (5, 0), (2, 5), (5, 2)}


@pytest.mark.parametrize("strategy", BOTH)
def test_the_names_of_clusters_mean_nothing(strategy):
    columns, build = batch(), partial(method, false_negatives=strategy)
    assert torch.equal(loss_of(build([[0, 1, 0, 2, 1, EMPTY]] * 2), columns),
                       loss_of(build([[7, 0, 7, 1, 0, EMPTY]] * 2), columns))


@pytest.mark.parametrize("strategy", BOTH)
def test_the_loss_is_the_mean_over_both_granularities(strategy):
    columns, coarse, fine = batch(), [0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 3, 3]
    build = partial(method, false_negatives=strategy)
    one, other = (loss_of(build([x, x]), columns) for x in (coarse, fine))
    both = build([coarse, fine])
    assert loss_of(both, columns).item() == pytest.approx((one + other).item() / 2)
    assert both.logs()["false_negatives"] == pytest.approx((12 + 4) / 60)


@pytest.mark.parametrize("strategy", BOTH)
def test_hard_negatives_are_never_left_out_or_attracted(strategy):
    """Of equal labels everywhere, only the anchors' own (B, B) block changes."""
    anchor, positive, hard = batch(V=3)
    built = method([[0] * 6] * 2, corpus=TRIPLES, false_negatives=strategy)
    cosines = (F.normalize(anchor, dim=1)
               @ F.normalize(torch.cat([positive, hard]), dim=1).mT).tolist()
    false = [[i != j for j in range(6)] + [False] * 6 for i in range(6)]
    expected = sum(per_anchor(cosines, false, strategy, .05)) / 6
    assert loss_of(built, [anchor, positive, hard]).item() == pytest.approx(expected)


def test_the_weight_of_the_own_hard_negative_still_counts():
    columns = batch(V=3)
    heavier = loss_of(method(corpus=TRIPLES, hard_negative_weight=2.), columns)
    weight = torch.cat([torch.ones(6, 6), torch.ones(6, 6) + torch.eye(6)], dim=1)
    expected = info_nce(columns[0], torch.cat(columns[1:]), weight=weight)
    assert heavier.item() == pytest.approx(expected.item())


# ---- labels ---------------------------------------------------------------------------------

def test_the_surest_labels_are_accepted_the_first_of_equals_and_a_greater_share_has_more():
    label = torch.tensor([5, 6, 7, 8])
    assert accept(label, torch.tensor([.9, .5, .7, .2]), .5).tolist() == [5, EMPTY, 7, EMPTY]
    assert accept(label, torch.tensor([.5, .5, .5, .5]), .5).tolist() == [5, 6, EMPTY, EMPTY]
    sure, before = torch.rand(37, generator=torch.Generator().manual_seed(0)), set()
    for share in (0, .1, .2, .4, .6, .8, 1):
        kept = accept(torch.arange(37), sure, share)
        now = set(kept[kept != EMPTY].tolist())
        assert len(now) == math.floor(share * 37) and before <= now
        before = now


# ---- refreshing -----------------------------------------------------------------------------

def by_word(texts, *, pooling=None, max_tokens=None):
    """An encoder that tells the first words apart, and hardly anything else."""
    assert max_tokens == 32
    found = torch.zeros(len(texts), len(WORDS))
    for row, text in zip(found, texts):
        word, number = text.split()
        row[WORDS.index(word)] = 1
        row[0] += int(number) / 100
    return found


def test_the_ramp_accepts_as_much_more_with_every_refresh_and_ends_at_the_share_asked_for():
    for accepted, rows in ((1., [15, 30, 45, 60]), (.5, [7, 15, 22, 30])):   # of 60, floored
        ifnd = method(clusters=6, accepted=accepted)
        assert (ifnd.label == EMPTY).all()                        # round 0 is SimCSE
        for number, expected in enumerate(rows, start=1):
            ifnd.refresh(by_word, range(60))
            assert (ifnd.label != EMPTY).sum(dim=1).tolist() == [expected, expected]
            assert ifnd.logs()["accepted"] == pytest.approx(accepted * number / 4)


def test_what_clusters_together_is_what_the_encoder_finds_alike():
    ifnd = method(clusters=6, cluster_rounds=1)
    ifnd.refresh(by_word, range(60))
    words = [text.split()[0] for text in CORPUS.columns[0]]
    same = torch.tensor([[a == b for b in words] for a in words])
    assert torch.equal((ifnd.label[0, :, None] == ifnd.label[0]), same)
    fine = ifnd.label[1, :, None] == ifnd.label[1]
    assert fine.sum() < same.sum() and same[fine].all()           # 24 clusters: parts of the 6


def test_a_short_run_clusters_just_the_rows_that_it_will_train_on():
    ifnd, asked = method(clusters=2, steps=3, seed=5), []
    ifnd.refresh(lambda texts, **how: asked.extend(texts) or by_word(texts, **how), range(60))
    seen = sum(data.row_order(ifnd.rounds(3), 8, seed=5), [])
    assert set(asked) == {CORPUS.columns[0][row] for row in seen} and len(set(asked)) == 24
    assert (ifnd.label[:, seen] != EMPTY).sum() == (ifnd.label != EMPTY).sum() == 2 * (24 // 4)


@pytest.mark.parametrize("batch_size, expected", [(64, (64, 256)), (512, (512, 2048)), (2, (1, 4))])
def test_the_number_of_clusters_follows_the_batch(batch_size, expected):
    assert method(batch_size=batch_size).sizes == expected
    assert method(clusters=10).sizes == (10, 40)


def test_rounds_are_one_more_than_refreshes_and_take_the_rows_in_the_order_of_simcse():
    assert [count for count, _ in method().rounds(23)] == [4, 5, 4, 5, 5]
    assert [count for count, _ in method(cluster_rounds=1).rounds(23)] == [11, 12]
    assert [count for count, _ in method().rounds(3)] == [1, 1, 1]
    plain = SimCSE(CORPUS, SimCSE.Config(), model=None)
    orders = [list(data.row_order(x.rounds(15), 8, seed=3)) for x in (plain, method())]
    assert orders[0] == orders[1] and len(orders[0]) == 15


def test_where_all_sentences_fall_into_one_cluster_it_warns_and_the_loss_is_nothing():
    ifnd = method(clusters=1, cluster_rounds=1)
    with pytest.warns(UserWarning, match="more than 95 % of all pairs share a cluster"):
        ifnd.refresh(lambda texts, **how: torch.ones(len(texts), 3), range(60))
    assert loss_of(ifnd, batch()).item() == 0


def test_as_many_clusters_as_sentences_make_it_info_nce(recwarn):
    ifnd, columns = method(clusters=60, cluster_rounds=1), batch()
    torch.manual_seed(0)
    vectors = torch.randn(60, 9)
    ifnd.refresh(lambda texts, **how: vectors[[CORPUS.columns[0].index(t) for t in texts]],
                 range(60))
    assert (ifnd.label != EMPTY).all() and torch.equal(loss_of(ifnd, columns), info_nce(*columns))


# ---- settings and runs ----------------------------------------------------------------------

def test_attraction_has_a_loss_of_its_own():
    with pytest.raises(ValueError, match="--false-negatives attract has its own loss, found"):
        IFND.check(Config(false_negatives="attract", loss="focal"), [CORPUS], None)
    IFND.check(Config(loss="focal"), [CORPUS], None)


@pytest.mark.parametrize("name, value", dict(cluster_rounds=0, clusters=-1, accepted=1.5).items())
def test_a_value_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{dashed(name)}: expected .*, found {value}"):
        check_ranges(Config(**{name: value}))


@pytest.fixture
def train(program):
    return partial(program, method="ifnd", clusters=4, cluster_rounds=2, steps=12)


def test_with_nothing_accepted_a_run_is_that_of_simcse(train, program):
    """But for rounding: half the loss of either granularity makes the whole."""
    flags = {"precision": "fp32", "device": "cpu"}
    found, expected = (load_file(folder / "model.safetensors") for folder in (
        train(accepted=0, **flags), program(out="plain", steps=12, **flags)))
    assert all(torch.allclose(found[name], x, atol=1e-4) for name, x in expected.items())


def test_a_run_logs_the_ramp_and_what_is_left_out(train):
    folder = train(steps=30)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["accepted"] for row in rows] == [0, .5, 1]
    assert rows[0]["false_negatives"] == 0 < rows[-1]["false_negatives"]

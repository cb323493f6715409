"""Papers as classes: what each one makes of rows, and of what the encoder returned."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch

from config import Config
from losses import focal_info_nce, info_nce
from methods import Encoded, own_hard_negative
from papers import METHODS, PAPERS, check
from model import Encoder, EncoderConfig, SentenceEncoder


@dataclass(frozen=True)
class Texts:
    """As much of a corpus as a method looks at."""
    columns: list[list[str]]
    documents: list[int] | None = None


SENTENCES = Texts([["a dog runs", "a cat sleeps", "an owl sees", "an elk walks"]], [0, 0, 1, 1])
TRIPLES = Texts([[f"{side} {i}" for i in range(4)] for side in ("premise", "entailed", "denied")])
SMALL = Config(batch_size=2, buffer_size=4, neighbours=2)


def random_columns(V=2, B=2, D=3, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, D).double() for _ in range(V)]


def method(name="simcse", corpus=SENTENCES, **settings):
    """A method on an encoder of width 3, which it never runs."""
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    return METHODS[name](corpus, replace(SMALL, method=name, **settings), model=model).double()


# ---- SimCSE ---------------------------------------------------------------------------------

def test_without_labels_the_positive_is_the_sentence_itself():
    columns = method().views([2, 0], random.Random(0))
    assert columns == [["an owl sees", "a dog runs"]] * 2


def test_a_text_view_changes_the_positive_and_never_the_anchor():
    anchor, positive = method(positives="delete-words", rate=.5).views([0, 1], random.Random(0))
    assert anchor == ["a dog runs", "a cat sleeps"] and positive != anchor


def test_a_corpus_with_hard_negatives_is_used_whole():
    assert method(corpus=TRIPLES).views([3, 1], random.Random(0)) == [
        ["premise 3", "premise 1"], ["entailed 3", "entailed 1"], ["denied 3", "denied 1"]]


def test_the_loss_is_info_nce_among_the_positives():
    anchor, positive = random_columns()
    assert method().loss(Encoded([anchor, positive], 1, 9)) == info_nce(anchor, positive)


def test_hard_negatives_join_the_candidates():
    a, p, h = random_columns(3)
    expected = info_nce(a, torch.cat([p, h]))
    assert method(corpus=TRIPLES).loss(Encoded([a, p, h], 1, 9)) == expected


def test_the_weight_of_hard_negatives_is_that_of_equation_8():
    columns = random_columns(3, 4)
    total = 0
    for i in range(4):
        def likeness(column, j):
            return math.exp(torch.cosine_similarity(columns[0][i], columns[column][j], dim=0) / .05)
        among = sum(likeness(1, j) + (2 if j == i else 1) * likeness(2, j) for j in range(4))
        total -= math.log(likeness(1, i) / among)
    found = method(corpus=TRIPLES, hard_negative_weight=2.).loss(Encoded(columns, 1, 9))
    assert found.item() == pytest.approx(total / 4)


def test_weight_zero_leaves_the_own_hard_negative_out_and_keeps_those_of_others():
    assert own_hard_negative(3, 0.).tolist() == [[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1],
                                                 [1, 1, 1, 1, 1, 0]]


def test_the_menus_combine():
    a, p = random_columns()
    assert method(loss="focal", hardness=.1).loss(Encoded([a, p], 1, 9)) == focal_info_nce(
        a, p, hardness=.1)
    assert method(temperature=.5).loss(Encoded([a, p], 1, 9)) == info_nce(a, p, temperature=.5)


# ---- IS-CSE ---------------------------------------------------------------------------------

Q0 = [[1, 0, 0], [0, 0, 1], [.6, .8, 0], [0, 1, 0]]
Z1 = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.float64)
Z2 = torch.tensor([[.8, .6, 0], [0, .6, .8]], dtype=torch.float64)


@pytest.mark.parametrize("neighbours, expected", [(1, .34838593), (2, .35880150)])
def test_the_worked_example_of_is_cse(neighbours, expected):
    smoothing = method("is-cse", neighbours=neighbours)
    smoothing.memory.rows.copy_(torch.tensor(Q0))
    found = smoothing.loss(Encoded([Z1, Z2], 1, 9))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert smoothing.logs()["instance_loss"] == pytest.approx(.34657365)
    assert found.item() == pytest.approx(smoothing.logs()["instance_loss"]
                                         + .1 * smoothing.logs()["smoothing_loss"])


def test_until_the_buffer_is_full_is_cse_is_simcse_gradients_included():
    smoothing, plain = method("is-cse"), method()
    for step in (1, 2):
        a, p = (x.requires_grad_() for x in random_columns(seed=step))
        losses = [m.loss(Encoded([a, p], step, 9)) for m in (smoothing, plain)]
        gradients = [torch.autograd.grad(loss, [a, p]) for loss in losses]
        same = torch.equal(losses[0], losses[1]) and all(map(torch.equal, *gradients))
        assert same == (step < 2)                                 # 2 x 2 rows fill the 4 slots


def test_weight_zero_makes_it_simcse_for_good():
    smoothing = method("is-cse", alpha_start=0., alpha_end=0.)
    for step in range(1, 6):
        columns = random_columns(seed=step)
        assert smoothing.loss(Encoded(columns, step, 9)) == info_nce(*columns)


def test_without_neighbours_the_loss_counts_one_and_a_tenth_times():
    smoothing = method("is-cse", neighbours=0)
    for step in range(1, 4):
        columns = random_columns(seed=step)
        found = smoothing.loss(Encoded(columns, step, 9))
    assert found.item() == pytest.approx(1.1 * info_nce(*columns).item())


def test_the_focal_loss_serves_both_terms_of_is_cse():
    smoothing = method("is-cse", loss="focal", neighbours=0)
    smoothing.memory.rows.copy_(torch.tensor(Q0))
    a, p = random_columns()
    assert smoothing.loss(Encoded([a, p], 1, 9)).item() == pytest.approx(
        1.1 * focal_info_nce(a, p).item())


def test_the_ramp_of_the_large_models():
    ramp = method("is-cse", alpha_start=.005, alpha_end=.05)
    table = {0: .005, .05: .0055540247, .1: .0072024568, .2: .0135942353, .25: .0181801948,
             .3: .0235496636, .4: .0360942353, .45: .0429604491, .5: .05, .75: .05}
    for share, expected in table.items():
        assert ramp.alpha(round(share * 1000) + 1, 1000) == pytest.approx(expected, abs=1e-9)
    assert method("is-cse").alpha(1, 10) == method("is-cse").alpha(10, 10) == .1


def test_the_memory_is_saved_with_the_run():
    smoothing = method("is-cse")
    smoothing.loss(Encoded(random_columns(), 1, 9))
    again = method("is-cse")
    again.load_state_dict(smoothing.state_dict())
    assert torch.equal(again.memory.rows, smoothing.memory.rows) and again.memory.rows[-1].any()


# ---- The menu -------------------------------------------------------------------------------

def refusal(columns, **settings):
    with pytest.raises(ValueError) as refused:
        check(replace(SMALL, corpus="nli.csv", **settings), columns)
    return str(refused.value)


def test_hard_negatives_are_never_silently_dropped():
    assert "found 3 in nli.csv" in refusal(3, method="is-cse")
    assert "has hard negatives (3 columns)" in refusal(3, loss="focal")


def test_a_text_view_for_pairs_is_refused_since_they_bring_their_own_positives():
    assert "--positives crop makes positives" in refusal(2, positives="crop")


def test_a_buffer_smaller_than_a_batch_is_refused():
    assert "--buffer-size 4 must be at least the batch size (5)" in refusal(
        1, method="is-cse", batch_size=5)


def test_every_method_and_loss_has_a_row_in_the_list():
    flags = " ".join(paper.flags for paper in PAPERS)
    assert all(f"--method {name}" in flags for name in METHODS)
    assert "--loss focal" in flags

"""Ways to make a positive: text views, and the memory buffer of IS-CSE."""

import random

import pytest
import torch

from losses import cosine, info_nce
from positives import POSITIVES, MemoryBuffer, crop, delete_words, keep

SENTENCE = "the quick brown fox jumps over the lazy dog today"


# ---- Text views -----------------------------------------------------------------------------

def test_the_base_view_is_the_sentence_itself():
    assert keep(SENTENCE, random.Random(0)) == SENTENCE


def test_crop_keeps_a_run_of_neighbouring_words():
    found = {crop(SENTENCE, random.Random(seed), rate=.3) for seed in range(50)}
    words = SENTENCE.split()
    assert found == {" ".join(words[start : start + 7]) for start in range(4)}


def test_deletion_drops_that_share_of_words_and_keeps_their_order():
    kept = [delete_words(SENTENCE, random.Random(seed), rate=.2).split() for seed in range(500)]
    for words in kept:
        rest = iter(SENTENCE.split())
        assert all(word in rest for word in words)
    assert sum(map(len, kept)) / 5000 == pytest.approx(.8, abs=.02)


@pytest.mark.parametrize("view", POSITIVES.values(), ids=POSITIVES)
def test_every_view_is_a_function_of_sentence_and_seed_and_never_empty(view):
    for text in ("word", "two words", SENTENCE):
        for seed in range(20):
            first = view(text, random.Random(seed))
            assert first and first == view(text, random.Random(seed))


# ---- The memory buffer ----------------------------------------------------------------------

Q0 = torch.tensor([[1, 0, 0], [0, 0, 1], [.6, .8, 0], [0, 1, 0]], dtype=torch.float64)
Z1 = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.float64)
Z2 = torch.tensor([[.8, .6, 0], [0, .6, .8]], dtype=torch.float64)


def worked_memory():
    memory = MemoryBuffer(4, 3).double()
    memory.rows.copy_(Q0)
    memory.push(Z2)
    return memory


def test_the_newest_rows_come_in_at_the_end_and_the_oldest_leave():
    assert worked_memory().rows.tolist() == [[.6, .8, 0], [0, 1, 0], [.8, .6, 0], [0, .6, .8]]


@pytest.mark.parametrize("neighbours, smoothed, loss", [
    (1, [[.70099997, .69900003, 0], [0, .7800664, .4398672]], .01812284),
    (2, [[.49594648, .78704724, 0], [.178637, .7860012, .30890627]], .12227844),
])
def test_the_worked_example_of_smoothing(neighbours, smoothed, loss):
    found = worked_memory().smooth(Z2, neighbours=neighbours)
    assert torch.allclose(found, torch.tensor(smoothed, dtype=torch.float64), atol=1e-6)
    assert info_nce(Z1, found).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("temperature, loss", [(1, .12075641), (1e9, .13539289), (1e-9, .34657365)])
def test_beta_goes_from_the_anchor_alone_to_the_plain_mean(temperature, loss):
    found = worked_memory().smooth(Z2, neighbours=2, temperature=temperature)
    assert info_nce(Z1, found).item() == pytest.approx(loss, abs=1e-6)


def test_three_neighbours_of_the_worked_example():
    found = worked_memory().smooth(Z2, neighbours=3)
    assert info_nce(Z1, found).item() == pytest.approx(.36596425, abs=1e-6)


def test_the_own_copy_is_the_nearest_row_and_is_left_out():
    memory = worked_memory()
    assert (Z2 @ memory.rows.mT).argmax(dim=1).tolist() == [2, 3]
    wrong = torch.cat([Z2[:, None], memory.rows[(Z2 @ memory.rows.mT).topk(2).indices]], dim=1)
    weight = (wrong @ Z2[:, :, None] / 2).softmax(dim=1)
    counted_twice = (weight * wrong).sum(dim=1)
    assert info_nce(Z1, counted_twice).item() == pytest.approx(.05062045, abs=1e-6)
    assert not torch.allclose(memory.smooth(Z2, neighbours=2), counted_twice, atol=1e-3)


def test_smoothing_by_a_loop_gives_the_same():
    torch.manual_seed(0)
    memory, x = MemoryBuffer(23, 5), torch.randn(7, 5)
    memory.push(torch.randn(16, 5))
    memory.push(x)
    for i, unit in enumerate(x / x.norm(dim=1, keepdim=True)):
        ranked = sorted(memory.rows, key=lambda row: -float(row @ unit))
        group = torch.stack([unit, *ranked[1:4]])
        weight = torch.exp(group @ unit / 2)
        blend = (weight[:, None] * group).sum(dim=0) / weight.sum()
        assert torch.allclose(memory.smooth(x, neighbours=3)[i], blend, atol=1e-6)


def test_gradient_reaches_the_anchor_of_the_group_and_nothing_remembered():
    memory, z1, z2 = worked_memory(), Z1.clone().requires_grad_(), Z2.clone().requires_grad_()
    loss = info_nce(z1, memory.smooth(z2, neighbours=2))
    to_z1, to_z2 = torch.autograd.grad(loss, [z1, z2])
    expected = [[[0, .0009, .0052], [.7039, 0, -.7723]],
                [[-.2941, .3922, 0], [.1835, -.3046, .2285]]]
    for found, wanted in zip((to_z1, to_z2), expected):
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-3)
    assert not memory.rows.requires_grad and memory.rows.grad_fn is None
    assert (to_z2 * z2).sum(dim=1).abs().max() < 1e-12


def test_what_is_pushed_is_cut_from_the_graph_and_of_unit_length():
    memory = MemoryBuffer(4, 3)
    memory.push(torch.full((2, 3), 7., requires_grad=True))
    assert not memory.rows.requires_grad
    assert torch.allclose(memory.rows[2:].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("slots, batch, first", [(1024, 64, 16), (1024, 100, 11), (1024, 512, 2)])
def test_the_buffer_is_full_after_as_many_batches_as_it_takes(slots, batch, first):
    memory, pushes = MemoryBuffer(slots, 2), 0
    while not memory.full:
        memory.push(torch.ones(batch, 2))
        pushes += 1
    assert pushes == first and len(memory.rows) == slots


def test_a_smoothed_positive_is_never_longer_than_one_and_weighs_itself_most():
    torch.manual_seed(0)
    memory, x = MemoryBuffer(64, 5), torch.randn(16, 5)
    for _ in range(4):
        memory.push(x + torch.randn(16, 5))
    memory.push(x)
    smoothed = memory.smooth(x, neighbours=8)
    assert (smoothed.norm(dim=1) <= 1 + 1e-6).all()
    nearer_than_a_neighbour = cosine(x, smoothed).diagonal()
    assert (nearer_than_a_neighbour > cosine(x, memory.smooth(x, neighbours=8, temperature=1e9))
            .diagonal()).all()


def test_no_neighbours_leave_the_embedding_as_it_is():
    memory = worked_memory()
    assert torch.allclose(memory.smooth(Z2 * 3, neighbours=0), Z2)


def test_a_batch_larger_than_the_buffer_is_our_own_bug():
    with pytest.raises(AssertionError, match="larger than the buffer"):
        MemoryBuffer(3, 2).push(torch.ones(4, 2))

"""A whole corpus: equal texts, rows kept aside, nearest neighbours, clusters."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import batches
from papers.corpus import (assign, hold_out, index, kmeans, nearest_others, rows_of_run,
                           text_numbers, unit, words_of)
from papers.settings import Config


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- texts and rows -------------------------------------------------------------------------

def test_texts_are_equal_that_differ_by_case_and_white_space_only():
    assert words_of(" A  dog\tRuns ") == ["a", "dog", "runs"]
    texts = ["A dog", "a cat", " a  DOG", "a dog.", "A CAT"]
    assert text_numbers(texts).tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("steps, count", [(0, 64), (3, 24), (8, 64), (20, 64)])
def test_the_rows_of_a_run_are_those_of_its_batches(steps, count):
    config = Config(batch_size=8, steps=steps, seed=3)
    met = [row for rows in [*batches(64, 8, seed=3, epochs=1)][: steps or 8] for row in rows]
    found = rows_of_run(64, config)
    assert set(met) <= set(found) and len(set(found)) == len(found) == count


def test_the_probe_is_a_tenth_and_shares_no_text_with_the_rest():
    texts = [f"text {i % 90}" for i in range(100)]
    probe, rest = hold_out(texts, range(100))
    assert len(probe) == 10 and not {texts[i] for i in probe} & {texts[i] for i in rest}
    assert len(rest) >= 80 and (probe, rest) == hold_out(texts, range(100))
    assert len(hold_out([str(i) for i in range(9000)], range(9000))[0]) == 512


# ---- nearest neighbours ---------------------------------------------------------------------

def test_the_index_holds_the_vectors_in_order_and_half_precision_and_is_used_in_single():
    def encode(some):
        assert len(some) <= 8                                     # never a million at once
        return torch.tensor([[float(text), 1.] for text in some])

    found = index(encode, [*map(str, range(20))], chunk=8)
    assert found.dtype == torch.float16 and found[:, 0].tolist() == list(range(20))
    assert unit(found).dtype == torch.float32 and unit(found.double()).dtype == torch.float64
    assert torch.allclose(unit(found).norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("k", [1, 8, 49])
def test_the_nearest_others_are_those_of_the_full_table_whatever_the_chunk_and_length(k):
    x = some(50, 5).double()
    longer = x * torch.linspace(.1, 9, 50)[:, None]
    expected = [sorted((j for j in range(50) if j != i),
                       key=lambda j: -torch.cosine_similarity(x[i], x[j], dim=0).item())[:k]
                for i in range(50)]
    for chunk in (1, 7, 50, 64):
        assert nearest_others(longer, k, chunk=chunk).tolist() == expected


def test_nobody_is_their_own_neighbour_even_among_equals():
    for i, row in enumerate(nearest_others(torch.ones(6, 3), 5, chunk=4).tolist()):
        assert sorted([i, *row]) == [*range(6)]


# ---- clusters -------------------------------------------------------------------------------

def bunches(k=5, each=40, D=7, spread=.1, seed=0):
    """Rows around k directions at right angles, and which they are of."""
    return (torch.eye(k, D).repeat_interleave(each, 0) + spread * some(k * each, D, seed=seed),
            torch.arange(k).repeat_interleave(each))


def test_bunches_far_apart_are_found_and_assigned_alike_in_chunks():
    x, truth = bunches()
    centres = kmeans(x, 5, seed=1)
    found = assign(x, centres)
    assert len(set(zip(found[0].tolist(), truth.tolist()))) == 5
    assert all(map(torch.allclose, found, assign(x, centres, chunk=7)))


def test_a_centre_is_the_mean_direction_of_its_rows_and_every_row_is_at_its_nearest():
    """What Lloyd's algorithm ends in, on rows that are not bunched at all."""
    x = F.normalize(some(200, 3).double(), dim=1)
    centres = kmeans(x, 4, seed=0, iterations=100)
    label, similarity, _ = assign(x, centres)
    for row, k, found in zip(x, label, similarity):
        cosines = [float(row @ centre) for centre in centres]
        assert max(cosines) == pytest.approx(float(found)) == pytest.approx(cosines[k])
    for k, centre in enumerate(centres):
        mean = x[label == k].sum(dim=0)
        assert torch.allclose(centre, mean / mean.norm())


def test_clusters_are_those_of_scipy_from_the_same_start():
    """SciPy's is by distance; on the sphere, with bunches of like size, it finds the same."""
    from scipy.cluster.vq import kmeans2
    x, _ = bunches(k=4, each=50, spread=.25, seed=2)
    x = F.normalize(x.double(), dim=1)
    ours, _, _ = assign(x, kmeans(x, 4, seed=0, iterations=50))
    _, theirs = kmeans2(x.numpy(), x[[0, 50, 100, 150]].numpy(), minit="matrix", iter=50)
    same = (ours[:, None] == ours) == torch.from_numpy(theirs[:, None] == theirs)
    assert same.double().mean() > .98


@pytest.mark.parametrize("rows, copies, k", [(9, 1, 9), (9, 1, 20), (3, 5, 6)])
def test_with_clusters_enough_every_row_has_its_own_and_equal_rows_share_it(rows, copies, k):
    x = some(rows, 5).repeat(copies, 1)
    label, _, _ = assign(x, kmeans(x, k, seed=0))
    assert torch.equal(label[:rows].repeat(copies), label)
    assert sorted(label[:rows].tolist()) == list(range(rows))


def test_the_seed_decides_on_the_clusters():
    x = some(60, 4)
    assert torch.equal(kmeans(x, 5, seed=3), kmeans(x, 5, seed=3))
    assert not torch.equal(kmeans(x, 5, seed=3), kmeans(x, 5, seed=4))


@pytest.mark.parametrize("temperature, expected", [(.1, .997469), (.2, .951970)])
def test_confidence_is_the_softmax_over_the_centres_at_the_chosen_one(temperature, expected):
    angle = math.radians(20)
    point = torch.tensor([[math.cos(angle), math.sin(angle)]]).double()
    centres = torch.tensor([[1, 0], [0, 1], [-1, 0]]).double()
    label, similarity, confidence = assign(point, centres, temperature=temperature)
    assert label.item() == 0 and similarity.item() == pytest.approx(math.cos(angle))
    assert confidence.item() == pytest.approx(expected, abs=1e-6)

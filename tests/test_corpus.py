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

def test_the_index_holds_the_vectors_of_the_encoder_in_order():
    texts, asked = [f"text {i}" for i in range(20)], []

    def encode(some):
        asked.append(len(some))
        return torch.tensor([[float(text.split()[1]), 1.] for text in some])

    found = index(encode, texts, chunk=8)
    assert found.dtype == torch.float16 and found[:, 0].tolist() == list(range(20))
    assert max(asked) == 8                                        # never a million at once


def test_what_was_stored_in_half_precision_is_computed_with_in_single():
    x = some(5, 3)
    assert unit(x.half()).dtype == torch.float32 and unit(x.double()).dtype == torch.float64
    assert torch.allclose(unit(x.half()).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("k", [1, 8, 49])
def test_the_nearest_others_are_those_of_the_full_table_whatever_the_chunk(k):
    x = some(50, 5).double()
    expected = [sorted((j for j in range(50) if j != i),
                       key=lambda j: -torch.cosine_similarity(x[i], x[j], dim=0).item())[:k]
                for i in range(50)]
    for chunk in (1, 7, 50, 64):
        assert nearest_others(x, k, chunk=chunk).tolist() == expected


def test_nobody_is_their_own_neighbour_even_among_equals():
    found = nearest_others(torch.ones(6, 3), 5, chunk=4)
    assert [sorted(row) for row in found.tolist()] == [
        [j for j in range(6) if j != i] for i in range(6)]


def test_the_length_of_a_vector_does_not_matter():
    x = some(20, 4).double()
    longer = x * torch.linspace(.1, 9, 20)[:, None]
    assert torch.equal(nearest_others(x, 3), nearest_others(longer, 3))


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


def test_as_many_clusters_as_rows_or_more_leave_every_row_alone():
    x = F.normalize(some(9, 5), dim=1)
    for k in (9, 20):
        label, _, _ = assign(x, kmeans(x, k, seed=0))
        assert sorted(label.tolist()) == list(range(9))


def test_equal_rows_share_a_cluster_however_many_are_asked_for():
    x = torch.eye(3, 4).repeat(5, 1)
    label, _, _ = assign(x, kmeans(x, 6, seed=0))
    assert torch.equal(label[:3].repeat(5), label) and len(set(label.tolist())) == 3


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

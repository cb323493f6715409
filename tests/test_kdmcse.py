"""KDMCSE on text: margins and a filter by a teacher, and where a teacher's vectors come from."""

import json
import math
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mincse
from conftest import at, resolved
from data import Corpus, read_corpus
from engine.flags import check_ranges
from eval_sts import open_encoder
from losses import cosine, info_nce, pick_own
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from papers.corpus import index, open_teacher
from papers.kdmcse import KDMCSE, Config, by_chance, nearer_negatives
from papers.simcse import Encoded


ANCHORS, TARGETS, TEACHER = at(0, 40, 90), at(5, 50, 85), at(0, 60, 90)
SIMILARITY = cosine(TEACHER, TEACHER).clamp(max=1)
NONE = torch.zeros(3, 3, dtype=torch.double)


def contrast(anchor, positive, similarity, margin=.125):
    """InfoNCE with these nearer negatives, at the usual temperature."""
    moved = nearer_negatives(cosine(anchor, positive), similarity, angular_margin=margin)
    return pick_own(moved / .05)


@pytest.fixture
def random_case():
    """Seven anchors and positives of width 5, and a teacher's similarity."""
    torch.manual_seed(0)
    known = torch.randn(7, 3, dtype=torch.double)
    return *torch.randn(2, 7, 5, dtype=torch.double), cosine(known, known).clamp(max=1)


def off_diagonal(x):
    return x[~torch.eye(len(x), dtype=torch.bool)]


# ---- the margin -----------------------------------------------------------------------------

def test_the_first_anchor_on_a_sheet_of_paper():
    """At 0°, its positive at 5°, negatives at 50° and 85°; the teacher's cosines are .5 and 0."""
    nearer = [50 - math.degrees(.125 * .5), 85 - math.degrees(.125 * 1)]            # 46.42, 77.84
    own, *negatives = (math.cos(math.radians(angle)) for angle in (5, *nearer))
    found = nearer_negatives(cosine(ANCHORS, TARGETS), SIMILARITY, angular_margin=.125)
    assert found[0].tolist() == pytest.approx([own, *negatives])                    # .996 .689 .211
    loss = math.log1p(sum(math.exp((s - own) / .05) for s in negatives))            # e^-6.1 + e^-16
    assert loss == pytest.approx(.002161, abs=1e-6)               # .000851 without a margin


@pytest.mark.parametrize("margin, similarity, rows, mean", [
    (0., SIMILARITY, [.000851, .039485, .009972], .016769),
    (.125, NONE, [.005191, .143328, .043220], .063913),
    (.125, SIMILARITY, [.002161, .074250, .012326], .029579),
    (.15, NONE, None, .080614), (.15, SIMILARITY, None, .033029)])
def test_the_worked_example(margin, similarity, rows, mean):
    logits = nearer_negatives(cosine(ANCHORS, TARGETS), similarity, angular_margin=margin) / .05
    each = F.cross_entropy(logits, torch.arange(3), reduction="none")
    assert rows is None or each.tolist() == pytest.approx(rows, abs=1e-6)
    assert each.mean().item() == pytest.approx(mean, abs=1e-6)


def naive(s, similarity, m):
    """The formula as it stands in the authors' code."""
    theta = torch.arccos(s)
    chosen = (theta > m) & ~torch.eye(len(s), dtype=torch.bool)
    return torch.cos(torch.where(chosen, theta - m * (1 - similarity).abs(), theta))


@pytest.mark.parametrize("dtype, close", [(torch.double, 1e-12), (torch.float, 1e-6)])
def test_no_arccos_is_needed(random_case, dtype, close):
    a, p, similarity = (x.to(dtype) for x in random_case)
    found = nearer_negatives(cosine(a, p), similarity, angular_margin=.125)
    assert torch.allclose(found, naive(cosine(a, p), similarity, .125), atol=close, rtol=0)


def test_an_arccos_would_have_no_gradient_where_two_sentences_are_equal():
    a = torch.tensor([[1., 0.], [1., 0.], [0., 1.]], requires_grad=True)
    contrast(a, a, torch.zeros(3, 3)).backward()
    assert a.grad.isfinite().all()
    wrong = naive(cosine(a, a).clamp(max=1), torch.zeros(3, 3), .125) / .05
    assert torch.autograd.grad(pick_own(wrong), a)[0].isnan().any()
    opposite = torch.tensor([[1., 0.], [-1., 0.]], requires_grad=True)
    contrast(opposite, opposite, torch.zeros(2, 2)).backward()
    assert opposite.grad.isfinite().all()


def test_neither_a_positive_is_moved_nor_a_negative_within_the_margin(random_case):
    a, p, similarity = random_case
    s = cosine(a, p)
    for m in (.05, .125, 1.):
        found = nearer_negatives(s, similarity, angular_margin=m)
        assert torch.equal(found.diagonal(), s.diagonal())
        near = torch.arccos(s) <= m
        assert torch.equal(found[near], s[near])
        assert (off_diagonal(found) >= off_diagonal(s) - 1e-12).all()


def test_the_less_similar_the_nearer_and_the_loss_is_never_below_info_nce(random_case):
    """It is InfoNCE without a margin, and where all are similar."""
    a, p, known = random_case
    for similarity, margin in ((known, 0.), (torch.ones_like(known), .125)):
        found = contrast(a, p, similarity, margin).item()
        assert found == pytest.approx(info_nce(a, p).item(), abs=1e-9)
    before = torch.full((42,), -torch.inf)
    for value in (1., .7, .3, 0., -.5, -1.):
        similarity = torch.full((7, 7), value).double()
        assert contrast(a, p, similarity) >= info_nce(a, p) - 1e-12
        found = off_diagonal(nearer_negatives(cosine(a, p), similarity, angular_margin=.125))
        assert value < 0 or (found >= before - 1e-12).all()
        before = found


# ---- the method -----------------------------------------------------------------------------

@pytest.fixture
def kdmcse(tmp_path):
    """Builds the method on an encoder of width 2 that it never runs; three rows, unless more."""
    def build(rows=TEACHER, **settings):
        torch.manual_seed(0)
        numpy.save(tmp_path / "rows.npy", rows)
        settings = {"teacher_threshold": 1., "grounding_weight": 0.} | settings
        config = Config(method="kdmcse", teacher=str(tmp_path / "rows.npy"), **settings)
        model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 2, 1, 1, 5)), pooling="cls")
        texts = [f"number {row}" for row in range(len(rows))]
        method = KDMCSE(Corpus("texts", [texts], None, "", 0), config, model=model).double()
        method.prepare(None)
        method.teacher = rows                                     # without the rounding to half
        return method
    return build


def encoded(anchor=ANCHORS, positive=TARGETS, rows=(0, 1, 2)):
    """The pooled vectors are the columns themselves: there is no training head here."""
    hidden = [torch.cat([anchor, positive])[:, None]] * 2
    mask = torch.ones(2 * len(anchor), 1, dtype=torch.bool)
    return Encoded([anchor, positive], 1, 9, rows=torch.tensor(rows), hidden=hidden, mask=mask)


def test_the_worked_example_with_the_filter(kdmcse):
    """0.866 > 0.85: neither of 1 and 2 is the other's negative."""
    method = kdmcse(teacher_threshold=.85)
    assert method.loss(encoded()).item() == pytest.approx(.023951, abs=1e-6)
    assert method.logs()["dropped_pairs"] == pytest.approx(2 / 6)
    assert kdmcse().loss(encoded()).item() == pytest.approx(.029579, abs=1e-6)


def test_the_filter_only_takes_negatives_away(kdmcse):
    methods = [kdmcse(teacher_threshold=threshold) for threshold in (1., .85, .4, 1e-9)]
    for seed in range(5):
        torch.manual_seed(seed)
        a, p = torch.randn(2, 3, 2).double()
        losses = [method.loss(encoded(a, p)) for method in methods]
        assert losses == sorted(losses, reverse=True)


def test_a_filtered_pair_adds_no_loss_and_gets_no_gradient(kdmcse):
    method = kdmcse(torch.ones(3, 4).double(), teacher_threshold=.9)
    a, p = ANCHORS.clone().requires_grad_(), TARGETS.clone().requires_grad_()
    loss = method.loss(encoded(a, p))
    loss.backward()
    assert loss == 0 and method.logs()["dropped_pairs"] == 1
    assert not a.grad.any() and not p.grad.any()


def test_a_row_of_the_teacher_belongs_to_a_row_of_the_corpus(kdmcse):
    """Sentences may come in any order; teacher rows in another one are other teachers."""
    method, order = kdmcse(grounding_weight=.1), [2, 0, 1]
    found = method.loss(encoded()).item()
    shuffled = method.loss(encoded(ANCHORS[order], TARGETS[order], rows=tuple(order))).item()
    assert shuffled == pytest.approx(found)
    assert method.loss(encoded(rows=(1, 0, 2))).item() != pytest.approx(found, abs=1e-3)


def test_grounding_is_the_mean_contrast_of_both_views_with_the_projected_teacher(kdmcse):
    method = kdmcse(grounding_weight=.01)
    found = method.loss(encoded()).item()
    W, b = method.teacher_head[0].weight, method.teacher_head[0].bias
    V, c = method.student_head[0].weight, method.student_head[0].bias
    target = torch.tanh(TEACHER @ W.T + b)
    assert target.shape == (3, 256)
    grounding = 0
    for view in (ANCHORS, TARGETS):
        s = naive(cosine(torch.tanh(view @ V.T + c), target), SIMILARITY, .125) / .05
        grounding += F.cross_entropy(s, torch.arange(3)).item() / 2
    expected = kdmcse().loss(encoded()).item() + .01 * grounding
    assert found == pytest.approx(expected, rel=1e-6)
    assert method.logs()["grounding_loss"] == pytest.approx(grounding, rel=1e-6)


def test_only_grounding_trains_the_heads_and_nothing_trains_the_teacher_but_runs_save_its_vectors(
        kdmcse):
    for weight in (0., .01):
        method, a = kdmcse(grounding_weight=weight), ANCHORS.clone().requires_grad_()
        method.loss(encoded(a)).backward()
        assert all((p.grad is not None) == (weight > 0) for p in method.parameters())
        assert not method.teacher.requires_grad and a.grad.any()
    assert "teacher" in method.state_dict() and len(method.state_dict()) == 5


def test_the_threshold_is_what_one_random_pair_in_a_thousand_exceeds(kdmcse):
    torch.manual_seed(0)
    rows = torch.randn(400, 6)
    similarity = off_diagonal(cosine(rows, rows))
    exceeded = (similarity > by_chance(rows, seed=1)).double().mean().item()
    assert .0004 < exceeded < .002
    assert by_chance(rows, seed=1) == by_chance(rows, seed=1) != by_chance(rows, seed=2)
    assert by_chance(torch.eye(9), seed=1) == .5                  # nobody is paired with themselves
    assert kdmcse(rows, teacher_threshold=0.).threshold == by_chance(rows, seed=42)


@pytest.mark.parametrize("name, value, said", [
    ("angular_margin", 2., "0 or more and at most 1.5, below a right angle, found 2.0"),
    ("teacher_threshold", 1.5, "0 or more and at most 1, found 1.5"),
    ("grounding_weight", -1., "0 or more, found -1.0")])
def test_values_out_of_range_are_refused(name, value, said):
    with pytest.raises(ValueError, match=f"{name[-6:]}: expected {said}"):
        check_ranges(Config(**{name: value}))


@pytest.mark.parametrize("model_type, width, expected", [
    ("bert", 768, (3e-5, 64, 3)), ("roberta", 768, (1e-5, 128, 3)), ("bert", 1024, (1e-5, 64, 3)),
    ("roberta", 1024, (1e-5, 64, 3))])
def test_defaults_go_by_the_encoders_size(model_type, width, expected):
    config = resolved("kdmcse", model_type, width)
    assert (config.learning_rate, config.batch_size, config.epochs) == expected
    assert (config.angular_margin, config.grounding_weight, config.temperature) == (.125, .01, .05)


# ---- a teacher ------------------------------------------------------------------------------

@pytest.fixture
def corpus(sentences):
    return read_corpus(str(sentences))


@pytest.fixture
def opened(tmp_path, corpus):
    """opened(rows) -> the teacher that is an .npy of these rows, for 64 sentences."""
    def of(rows, corpus=corpus):
        numpy.save(tmp_path / "rows.npy", rows)
        return open_teacher(Config(teacher=str(tmp_path / "rows.npy")), corpus)
    return of


ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_file_has_a_vector_for_every_sentence_in_any_order(opened, corpus, dtype):
    ask, order = opened(ROWS.to(dtype)), torch.randperm(64).tolist()
    found = ask([corpus.columns[0][row] for row in order], max_tokens=32)
    assert found.dtype == torch.float32 and torch.equal(found, ROWS.to(dtype).float()[order])


def test_of_equal_sentences_the_first_row_counts_and_another_sentence_is_refused(opened):
    ask = opened(ROWS[:3], Corpus("three", [["one", "two", "one"]], None, "", 0))
    assert torch.equal(ask(["one", "two", "one"]), ROWS[[0, 1, 0]])
    with pytest.raises(ValueError, match="rows.npy: expected vectors of changed sentences as well"):
        ask(["one", "the dog dog"])


@pytest.mark.parametrize("change, said", [
    (lambda x: x[:63], "expected (64, D) floats, a row for each of "),
    (lambda x: x.repeat(2, 1), "found (128, 6) in float32"), (lambda x: x[0], "found (6,) in "),
    (lambda x: x.long(), "found (64, 6) in int64"),
    (lambda x: x.index_fill(0, torch.tensor([5, 9]), 0.), "row 5, counted from 0, is zero or not"),
    (lambda x: x.index_fill(0, torch.tensor(63), math.nan), "row 63, counted from 0"),
    (lambda x: x.index_fill(0, torch.tensor(0), 70_000.), "row 0, counted from 0, is zero or not "
                                                          "finite in half precision"),
])
def test_rows_that_do_not_fit_or_have_no_direction_are_refused(opened, change, said):
    with pytest.raises(ValueError) as refused:
        opened(change(ROWS))
    assert said in str(refused.value) and "rows.npy" in str(refused.value)


def test_an_encoder_makes_the_vectors_in_the_order_of_the_corpus(tiny, corpus):
    torch.manual_seed(3)
    ask, drawn = open_teacher(Config(teacher=str(tiny), precision="fp32"), corpus), torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)                                 # so heads are drawn as without
    found = index(ask, corpus.columns[0], chunk=10)               # seven pieces, the last ragged
    assert found.shape == (64, 32) and found.dtype == torch.float16
    assert torch.allclose(found.float(), encode(*open_encoder(tiny), corpus.columns[0]), atol=2e-3)


# ---- a run ----------------------------------------------------------------------------------

@pytest.fixture
def train(program, tiny):
    return partial(program, method="kdmcse", teacher=tiny)


@pytest.mark.parametrize("settings", [
    {}, {"pooling": "mean", "precision": "bf16", "grounding_weight": 0.}], ids=str)
def test_a_run_logs_its_terms_and_saves_a_plain_encoder(train, tiny, settings):
    folder = train(**settings)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["instance_loss"] > 0 and 0 <= last["dropped_pairs"] < .1
    assert ("grounding_loss" in last) == ("grounding_weight" not in settings)
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tiny / "model.safetensors").keys()
    assert f"taught by {tiny.name}" in (folder / "results.md").read_text()


def test_a_file_of_vectors_serves_as_well_as_the_encoder_that_made_it(
        train, tiny, corpus, tmp_path):
    """In float32, as the vectors of the file are."""
    numpy.save(tmp_path / "rows.npy", encode(*open_encoder(tiny), corpus.columns[0]))
    a, b = (train(out=out, teacher=teacher, precision="fp32")
            for out, teacher in (("a", tiny), ("b", tmp_path / "rows.npy")))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_dry_run_has_the_rows_of_its_part_of_the_corpus(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mincse, "DRY_ROWS", 32)
    numpy.save(tmp_path / "rows.npy", ROWS)
    train("--dry-run", teacher=tmp_path / "rows.npy")
    assert "saved and reloaded with equal vectors: yes" in capsys.readouterr().out


@pytest.mark.parametrize("known, code, said", [
    ("", 2, "--method kdmcse learns from a teacher: give --teacher an encoder's folder"),
    ("no/such", 3, "the encoder no/such"),
    ("gone.npy", 3, "gone.npy: expected a file of vectors, found nothing there")])
def test_the_program_says_so_before_the_first_step(train, capsys, tmp_path, known, code, said):
    with pytest.raises(SystemExit) as refused:
        train(teacher=known)
    assert refused.value.code == code and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

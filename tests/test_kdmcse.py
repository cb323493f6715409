"""KDMCSE on text: a margin and a filter by a teacher, and where its vectors come from."""

import gzip
import json
import math
import random
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import teacher
from config import Config, resolve, validate
from eval_sts import open_encoder
from folders import load
from losses import angular_margin_nce, cosine, info_nce, nearer_negatives
from methods import KDMCSE, Encoded
from papers import check
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from negatives import by_chance
from positives import POSITIVES
from teacher import read_teacher, write_teacher

CPU = torch.device("cpu")


def at(*degrees):
    """Unit vectors at these angles: (B, 2)."""
    turns = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1)


ANCHORS, TARGETS, TEACHER = at(0, 40, 90), at(5, 50, 85), at(0, 60, 90)
LIKENESS = cosine(TEACHER, TEACHER).clamp(max=1)


def random_case(B=7, D=5, seed=0):
    """Anchors, positives, a teacher's likeness."""
    torch.manual_seed(seed)
    known = torch.randn(B, 3, dtype=torch.double)
    return *torch.randn(2, B, D, dtype=torch.double), cosine(known, known).clamp(max=1)


def off_diagonal(x):
    return x[~torch.eye(len(x), dtype=torch.bool)]


# ---- the margin -----------------------------------------------------------------------------

@pytest.mark.parametrize("margin, likeness, rows", [
    (0., LIKENESS, [.000851, .039485, .009972]),
    (.125, torch.zeros(3, 3), [.005191, .143328, .043220]),
    (.125, LIKENESS, [.002161, .074250, .012326]),
])
def test_the_worked_example_anchor_by_anchor(margin, likeness, rows):
    logits = nearer_negatives(cosine(ANCHORS, TARGETS), likeness.double(),
                              angular_margin=margin) / .05
    found = F.cross_entropy(logits, torch.arange(3), reduction="none")
    assert found.tolist() == pytest.approx(rows, abs=1e-6)


@pytest.mark.parametrize("margin, likeness, expected", [
    (0., LIKENESS, .016769), (.125, torch.zeros(3, 3), .063913), (.15, torch.zeros(3, 3), .080614),
    (.125, LIKENESS, .029579), (.15, LIKENESS, .033029)])
def test_the_worked_example_in_the_mean(margin, likeness, expected):
    found = angular_margin_nce(ANCHORS, TARGETS, likeness.double(), angular_margin=margin)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_without_margin_or_where_the_teacher_finds_all_alike_it_is_info_nce():
    a, p, likeness = random_case()
    same = pytest.approx(info_nce(a, p).item(), abs=1e-9)
    assert angular_margin_nce(a, p, likeness, angular_margin=0.).item() == same
    assert angular_margin_nce(a, p, torch.ones_like(likeness)).item() == same


def naive(s, likeness, m):
    """The formula as it stands in the paper's code."""
    theta = torch.arccos(s)
    chosen = (theta > m) & ~torch.eye(len(s), dtype=torch.bool)
    return torch.cos(torch.where(chosen, theta - m * (1 - likeness).abs(), theta))


@pytest.mark.parametrize("dtype, close", [(torch.double, 1e-12), (torch.float, 1e-6)])
def test_no_arccos_is_needed(dtype, close):
    a, p, likeness = (x.to(dtype) for x in random_case())
    s = cosine(a, p)
    found = nearer_negatives(s, likeness, angular_margin=.125)
    assert torch.allclose(found, naive(s, likeness, .125), atol=close, rtol=0)


def test_an_arccos_would_have_no_gradient_where_two_sentences_are_equal():
    a = torch.tensor([[1., 0.], [1., 0.], [0., 1.]], requires_grad=True)
    likeness = torch.zeros(3, 3)
    angular_margin_nce(a, a, likeness).backward()
    assert a.grad.isfinite().all()
    a.grad = None
    F.cross_entropy(naive(cosine(a, a).clamp(max=1), likeness, .125) / .05,
                    torch.arange(3)).backward()
    assert a.grad.isnan().any()
    opposite = torch.tensor([[1., 0.], [-1., 0.]], requires_grad=True)
    angular_margin_nce(opposite, opposite, torch.zeros(2, 2)).backward()
    assert opposite.grad.isfinite().all()


def test_the_positive_is_never_moved_and_a_negative_within_the_margin_neither():
    a, p, likeness = random_case()
    s = cosine(a, p)
    for m in (.05, .125, 1.):
        found = nearer_negatives(s, likeness, angular_margin=m)
        assert torch.equal(found.diagonal(), s.diagonal())
        near = torch.arccos(s) <= m
        assert torch.equal(found[near], s[near])
        assert (off_diagonal(found) >= off_diagonal(s) - 1e-12).all()


def test_the_less_alike_the_nearer_and_the_loss_is_never_below_info_nce():
    a, p, _ = random_case()
    s, before = cosine(a, p), None
    for likeness in (1., .7, .3, 0., -.5, -1.):
        alike = torch.full((7, 7), likeness).double()
        assert angular_margin_nce(a, p, alike) >= info_nce(a, p) - 1e-12
        found = off_diagonal(nearer_negatives(s, alike, angular_margin=.125))
        if before is not None and likeness >= 0:
            assert (found >= before - 1e-12).all()
        before = found


# ---- the method -----------------------------------------------------------------------------

class Texts:
    def __init__(self, rows):
        self.columns, self.teacher = [["a", "b", "c"]], rows


def kdmcse(rows=TEACHER, **settings):
    """The method on an encoder of width 2 that it never runs."""
    torch.manual_seed(0)
    settings = {"teacher": "some.npy", "teacher_threshold": 1., "grounding_weight": 0.} | settings
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 2, 1, 1, 5)), pooling="cls")
    config = replace(Config(method="kdmcse", batch_size=3), **settings)
    return KDMCSE(Texts(rows), config, model=model).double()


def encoded(anchor=ANCHORS, positive=TARGETS, rows=(0, 1, 2)):
    """The pooled vectors are the columns themselves: there is no training head here."""
    hidden = [torch.cat([anchor, positive])[:, None]] * 2
    mask = torch.ones(2 * len(anchor), 1, dtype=torch.bool)
    return Encoded([anchor, positive], 1, 9, rows=torch.tensor(rows), hidden=hidden, mask=mask)


def test_the_worked_example_with_the_filter():
    """The teacher finds 1 and 2 alike (0.866 > 0.85), so neither is the other's negative."""
    method = kdmcse(teacher_threshold=.85)
    assert method.loss(encoded()).item() == pytest.approx(.023951, abs=1e-6)
    assert method.logs()["dropped_pairs"] == pytest.approx(2 / 6)
    assert kdmcse().loss(encoded()).item() == pytest.approx(.029579, abs=1e-6)


def test_the_filter_only_takes_negatives_away():
    for seed in range(5):
        torch.manual_seed(seed)
        a, p = torch.randn(2, 3, 2).double()
        losses = [kdmcse(teacher_threshold=t).loss(encoded(a, p)) for t in (1., .85, .4, 1e-9)]
        assert losses == sorted(losses, reverse=True)
    everything_alike = kdmcse(torch.ones(3, 4).double(), teacher_threshold=.9)
    assert everything_alike.loss(encoded()) == 0
    assert everything_alike.logs()["dropped_pairs"] == 1


def test_a_filtered_pair_gets_no_gradient():
    a, p = ANCHORS.clone().requires_grad_(), TARGETS.clone().requires_grad_()
    kdmcse(torch.ones(3, 4).double(), teacher_threshold=.9).loss(encoded(a, p)).backward()
    assert not a.grad.any() and not p.grad.any()


def test_a_row_of_the_teacher_belongs_to_a_row_of_the_corpus():
    """Sentences may come in any order; teacher rows in another one are other teachers."""
    method, order = kdmcse(grounding_weight=.1), [2, 0, 1]
    found = method.loss(encoded())
    shuffled = method.loss(encoded(ANCHORS[order], TARGETS[order], rows=tuple(order)))
    assert shuffled.item() == pytest.approx(found.item())
    assert method.loss(encoded(rows=(1, 0, 2))).item() != pytest.approx(found.item(), abs=1e-3)


def test_the_length_of_the_teachers_vectors_does_not_matter_to_the_student():
    assert kdmcse(10 * TEACHER).loss(encoded()).item() == pytest.approx(
        kdmcse().loss(encoded()).item())


def test_grounding_is_the_mean_contrast_of_both_views_with_the_projected_teacher():
    method = kdmcse(grounding_weight=.01)
    found = method.loss(encoded())
    W, b = method.teacher_head[0].weight, method.teacher_head[0].bias
    V, c = method.student_head[0].weight, method.student_head[0].bias
    target = torch.tanh(TEACHER @ W.T + b)
    assert target.shape == (3, 256)
    grounding = 0
    for view in (ANCHORS, TARGETS):
        s = naive(cosine(torch.tanh(view @ V.T + c), target), LIKENESS, .125) / .05
        grounding += F.cross_entropy(s, torch.arange(3)).item() / 2
    expected = kdmcse().loss(encoded()).item() + .01 * grounding
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert method.logs()["grounding_loss"] == pytest.approx(grounding, rel=1e-6)


def test_only_grounding_trains_the_heads_and_nothing_trains_the_teacher():
    for weight in (0., .01):
        method = kdmcse(grounding_weight=weight)
        a = ANCHORS.clone().requires_grad_()
        method.loss(encoded(a)).backward()
        assert all((p.grad is not None) == (weight > 0) for p in method.parameters())
        assert not method.teacher.requires_grad and a.grad.any()
    assert "teacher" not in method.state_dict() and len(method.state_dict()) == 4


def test_the_threshold_is_what_one_random_pair_in_a_thousand_exceeds():
    torch.manual_seed(0)
    rows = torch.randn(400, 6)
    likeness = off_diagonal(cosine(rows, rows))
    exceeded = (likeness > by_chance(rows, seed=1)).double().mean().item()
    assert .0004 < exceeded < .002
    assert by_chance(rows, seed=1) == by_chance(rows, seed=1) != by_chance(rows, seed=2)
    assert by_chance(torch.eye(9), seed=1) == .5                  # nobody is paired with themselves
    assert kdmcse(rows, teacher_threshold=0.).threshold == by_chance(rows, seed=42)


# ---- combinations ---------------------------------------------------------------------------

@pytest.mark.parametrize("positives", POSITIVES)
def test_every_text_view_combines(positives):
    method = kdmcse(positives=positives, grounding_weight=.01)
    check(method.config, columns=1)
    assert len(method.views([0, 1], random.Random(0))) == 2


@pytest.mark.parametrize("settings, said", [
    (dict(teacher=""), "--method kdmcse learns from a teacher: give --teacher a file of vectors"),
    (dict(loss="focal"), "--method kdmcse has its own loss"),
    (dict(method="simcse"), "--teacher some.npy: --method simcse does not learn from one"),
    (dict(method="sscl"), "--method sscl does not learn from one"),
])
def test_what_makes_no_sense_is_refused_in_a_sentence(settings, said):
    config = replace(Config(method="kdmcse", teacher="some.npy"), **settings)
    with pytest.raises(ValueError) as refused:
        check(config, columns=1)
    assert said in str(refused.value)


def test_pairs_are_refused_since_the_teacher_has_a_row_for_a_sentence():
    with pytest.raises(ValueError, match="--method kdmcse takes a corpus of 1 columns, found 2"):
        check(Config(method="kdmcse", teacher="some.npy"), columns=2)


@pytest.mark.parametrize("name, value, most", [
    ("angular_margin", 2., 1.5), ("teacher_threshold", 1.5, 1), ("teacher_threshold", -.1, 1)])
def test_values_out_of_range_are_refused(name, value, most):
    with pytest.raises(ValueError, match=f"expected from 0 to {most}, found {value}"):
        validate(Config(**{name: value}))
    with pytest.raises(ValueError, match="--grounding-weight: expected 0 or more"):
        validate(Config(grounding_weight=-1.))


@pytest.mark.parametrize("model_type, width, expected", [
    ("bert", 768, (3e-5, 64, 3)), ("roberta", 768, (1e-5, 128, 3)), ("bert", 1024, (1e-5, 64, 3)),
    ("roberta", 1024, (1e-5, 64, 3))])
def test_defaults_go_by_the_encoders_size(model_type, width, expected):
    config = resolve({"method": "kdmcse"}, model_type=model_type, width=width, columns=1)
    assert (config.learning_rate, config.batch_size, config.epochs) == expected
    assert (config.angular_margin, config.grounding_weight, config.temperature) == (.125, .01, .05)


# ---- the teacher's rows ---------------------------------------------------------------------

@pytest.fixture
def corpus(sentences):
    return data.read_corpus(str(sentences))


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return torch.randn(64, 6)


def saved(path, rows, **metadata):
    if path.suffix == ".npy":
        numpy.save(path, rows.numpy())
    else:
        save_file({"embeddings": rows}, path, metadata=metadata or None)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_is_read_as_it_is(tmp_path, corpus, rows, suffix, dtype):
    name = saved(tmp_path / f"rows{suffix}", rows.to(dtype))
    found = read_teacher(name, corpus, CPU)
    assert torch.equal(found, rows.to(dtype)) and found.dtype == dtype


@pytest.mark.parametrize("change, said", [
    (lambda x: x[:63], "expected (64, D) in float16 or float32, a row for each of the corpus, "
                       "found (63, 6) in float32"),
    (lambda x: x[0], "found (6,) in float32"),
    (lambda x: x.long(), "found (64, 6) in int64"),
    (lambda x: x.index_fill(0, torch.tensor([5, 9]), 0.), "row 5, counted from 0, is zero or not"),
    (lambda x: x.index_fill(0, torch.tensor(63), math.nan), "row 63, counted from 0"),
    (lambda x: x.index_fill(0, torch.tensor(0), math.inf), "row 0, counted from 0"),
])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_rows_that_do_not_fit_or_have_no_direction_are_refused(tmp_path, corpus, rows, change,
                                                               said, suffix):
    name = saved(tmp_path / f"rows{suffix}", change(rows).contiguous())
    with pytest.raises(ValueError) as refused:
        read_teacher(name, corpus, CPU)
    assert said in str(refused.value) and name in str(refused.value)


def test_damaged_and_missing_files_are_named(tmp_path, corpus, rows):
    for name in ("no.npy", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match="expected a file of vectors, found nothing"):
            read_teacher(str(tmp_path / name), corpus, CPU)
    for name in ("bad.npy", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not vectors at all")
        with pytest.raises(ValueError, match=name):
            read_teacher(str(tmp_path / name), corpus, CPU)
    numpy.save(tmp_path / "objects.npy", numpy.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="expected an array of numbers"):
        read_teacher(str(tmp_path / "objects.npy"), corpus, CPU)
    save_file({"vectors": rows}, tmp_path / "name.safetensors")
    with pytest.raises(ValueError, match=r"a tensor called embeddings, found \['vectors'\]"):
        read_teacher(str(tmp_path / "name.safetensors"), corpus, CPU)


def test_an_encoder_makes_the_rows_in_the_corpus_order(tiny, corpus, monkeypatch):
    monkeypatch.setattr(teacher, "AT_ONCE", 10)                   # seven pieces, the last ragged
    model, tokenizer = open_encoder(tiny)
    found = read_teacher(str(tiny), corpus, CPU)
    assert found.shape == (64, 32) and found.dtype == torch.float16
    assert torch.allclose(found.float(), encode(model, tokenizer, corpus.columns[0]), atol=2e-3)


def test_a_written_file_holds_what_the_encoder_makes_and_knows_its_sentences(
        tiny, corpus, sentences, tmp_path):
    path = str(tmp_path / "teacher.safetensors")
    write_teacher(str(tiny), str(sentences), path)
    assert torch.equal(read_teacher(path, corpus, CPU), read_teacher(str(tiny), corpus, CPU))

    other = tmp_path / "other.txt"
    other.write_text("".join(sorted(sentences.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match="whose sentences are not those of .*other.txt"):
        read_teacher(path, data.read_corpus(str(other)), CPU)

    zipped = tmp_path / "same.txt.gz"
    zipped.write_bytes(gzip.compress(sentences.read_bytes()))
    read_teacher(path, data.read_corpus(str(zipped)), CPU)
    with pytest.raises(ValueError, match="expected a name in .safetensors"):
        write_teacher(str(tiny), str(sentences), str(tmp_path / "teacher.npy"))


# ---- a run ----------------------------------------------------------------------------------

@pytest.fixture
def train(program, tiny):
    return partial(program, method="kdmcse", teacher=tiny)


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"positives": "crop"},
                                      {"precision": "bf16"}, {"grounding_weight": 0.}], ids=str)
def test_a_run_logs_its_terms_and_saves_a_plain_encoder(train, tiny, settings):
    folder = train(**settings)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["instance_loss"] > 0 and 0 <= last["dropped_pairs"] < .1
    assert ("grounding_loss" in last) == ("grounding_weight" not in settings)
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tiny / "model.safetensors").keys()
    assert f"taught by {tiny}" in (folder / "results.md").read_text()


def test_a_file_of_vectors_serves_as_well_as_the_encoder_that_made_it(
        train, tiny, sentences, tmp_path):
    path = tmp_path / "teacher.safetensors"
    write_teacher(str(tiny), str(sentences), str(path))
    a, b = load(train(out="a")), load(train(out="b", teacher=path))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["encoder", "file"])
def test_a_stopped_run_goes_on_exactly_without_the_rows_in_its_state(train, stopped, tmp_path,
                                                                     rows, kind, tiny):
    known = tiny if kind == "encoder" else saved(tmp_path / "rows.npy", rows)
    whole = load_file(train(out="whole", steps=9, teacher=known) / "model.safetensors")
    stopped(4, train, out="parts", steps=9, teacher=known)
    kept = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["parts"]
    assert "method.teacher" not in kept and "method.teacher_head.0.weight" in kept
    parts = load_file(train("--resume", out="parts", steps=9, teacher=known) / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("known, code, said", [
    ("", 2, "--method kdmcse learns from a teacher"),
    ("gone.npy", 3, "gone.npy: expected a file of vectors, found nothing there")])
def test_the_program_says_so_before_the_first_step(train, capsys, tmp_path, known, code, said):
    with pytest.raises(SystemExit) as refused:
        train(teacher=known)
    assert refused.value.code == code and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_has_a_teacher_as_well(train, capsys):
    train("--dry-run")
    assert "saved and reloaded with equal vectors: yes" in capsys.readouterr().out

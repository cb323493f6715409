"""Twins in our reading: two kinds of positives, the margin between them, and the queue."""

import random
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F

from conftest import resolved
from data import Corpus, Tokenizer, read_corpus, row_order
from engine.encoders import load
from losses import info_nce
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from papers.simcse import Encoded
from papers.twins import CHANGES, Config, Twins, innate_margin

TEXTS = [f"the quick brown fox jumps over the lazy dog today number {i} of many" for i in range(8)]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


H = double([[1, 0], [0, 1]])
IDENTICAL = double([[.96, .28], [.28, .96]])
FRATERNAL = double([[.8, .6], [.6, .8]])
QUEUE = double([[-1, 0], [.6, -.8]])
MARGIN = double([.10, .25])


def twins(*, queue=True, **settings):
    """The method on a small fixture: rows 0 and 1 at hand, rows 6 and 7 in the queue."""
    config = Config(**dict(method="twins", batch_size=2, queue_batches=1) | settings)
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 2, 1, 1, 5)), pooling="cls")
    built = Twins(Corpus("texts", [TEXTS], None, "", 0), config, model=model).double()
    built.margins[:2] = MARGIN
    if queue:
        built.queue.rows.copy_(QUEUE)
        built.queued.copy_(torch.tensor([6, 7]))
    return built


def encoded(columns=(H, IDENTICAL, FRATERNAL), *, step=501, steps=1000, rows=(0, 1)):
    return Encoded(list(columns), step, steps, torch.tensor(rows))


# ---- the loss -------------------------------------------------------------------------------

def gap_term(identical, fraternal, margin=MARGIN):
    """What λ = 1 adds to the loss of anchors at (1, 0) and positives of these cosines with them."""
    anchor = double([[1, 0]] * 2)
    columns = (torch.stack([c, (1 - c**2).sqrt()], dim=1) for c in (identical, fraternal))
    columns, losses = [anchor, *columns], []
    for weight in (1., 0.):
        built = twins(queue=False, twins_weight=weight)
        built.margins[:2] = margin
        losses.append(built.loss(encoded(columns)))
    return losses[0] - losses[1]


def test_one_fraternal_twin_is_pulled_closer_and_the_other_pushed_away():
    """With respect to the cosines: (0.06, -0.09) for the identical, the opposite for the other."""
    cosines = [double(x).requires_grad_() for x in ([.96, .96], [.8, .8])]
    to_identical, to_fraternal = torch.autograd.grad(gap_term(*cosines), cosines)
    assert torch.allclose(to_identical, double([.06, -.09]))
    assert torch.allclose(to_fraternal, double([-.06, .09]))


def test_the_loss_of_the_gap_is_zero_where_it_is_the_margin_and_moving_both_changes_nothing():
    s = double([.8, .8])
    term = partial(gap_term, s + .16, s)
    by_hand = ((.96 - .80 - .10) ** 2 + (.96 - .80 - .25) ** 2) / 2
    assert by_hand == pytest.approx(.005850) and term().item() == pytest.approx(by_hand)
    assert gap_term(s + .06, s - .1).item() == pytest.approx(.005850)
    assert term(double([.16, .16])).item() == pytest.approx(0, abs=1e-12)
    assert all(term(double(wrong)) > 1e-5 for wrong in ([.16, .17], [.15, .16]))


@pytest.mark.parametrize("queue, twin, expected", [
    (False, IDENTICAL, [.001113]), (False, FRATERNAL, [.126928]),
    (True, IDENTICAL, [.028041, .001181, .014611]), (True, FRATERNAL, [.239545, .127224, .183384])])
def test_both_contrasts_of_the_worked_example(queue, twin, expected):
    """At temperature 0.1, anchor by anchor, as sums of exponentials; the mean comes last.

    The first, with the queue: log(e^9.6 + e^2.8 + e^-10 + e^6) - 9.6 = log(1 + e^-3.6 + ...).
    """
    found = []
    for i, anchor in enumerate(H):
        each = [(F.cosine_similarity(anchor, c, dim=0) / .1).exp()
                for c in (torch.cat([twin, QUEUE]) if queue else twin)]
        found.append(-(each[i] / sum(each)).log().item())
    assert [*found, sum(found) / 2][-len(expected):] == pytest.approx(expected, abs=1e-6)
    loss = twins(queue=queue, temperature=.1, twins_weight=0.).loss(encoded([H, twin, twin]))
    assert loss.item() == pytest.approx(sum(found) / 2)


def test_the_whole_loss_of_the_worked_example_and_its_log():
    built = twins()
    assert built.loss(encoded()).item() == pytest.approx(.019569, abs=1e-6)
    log = built.logs()
    assert log["gap"] == pytest.approx(.16) and log["innate_margin"] == pytest.approx(.175)
    assert log["twins_loss"] == pytest.approx(.005850)


def test_without_weight_queue_and_changed_text_it_is_simcse():
    torch.manual_seed(0)
    a, p = torch.randn(2, 2, 2).double()
    loss = twins(queue=False, queue_batches=0, twins_weight=0.).loss(encoded([a, p, p]))
    assert loss == info_nce(a, p)


def test_the_weight_of_the_margin_grows_over_the_first_tenth_of_the_run():
    plain = twins(twins_weight=0.).loss(encoded(step=600)).item()
    for step, steps, ramp in [(600, 60_000, .1), (600, 12_000, .5), (600, 6_000, 1), (600, 900, 1)]:
        found = twins().loss(encoded(step=step, steps=steps)).item() - plain
        assert found == pytest.approx(ramp * .005850)


def test_gradient_reaches_all_three_columns_and_neither_margin_nor_queue():
    columns, built = [x.clone().requires_grad_() for x in (H, IDENTICAL, FRATERNAL)], twins()
    built.loss(encoded(columns)).backward()
    assert all(x.grad.any() for x in columns)
    for name, buffer in built.named_buffers():
        assert not buffer.requires_grad and buffer.grad_fn is None, name
    assert not list(built.parameters())




# ---- the queue ------------------------------------------------------------------------------

def test_the_queue_holds_the_identical_twins_of_the_last_batches_in_order():
    built = twins(queue=False, queue_batches=2)
    batches = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    for i, batch in enumerate(batches):
        built.loss(encoded([H, 3 * batch.requires_grad_(), FRATERNAL], rows=(2 * i, 2 * i + 1)))
    assert torch.allclose(built.queue.rows, F.normalize(batches[1:].flatten(0, 1), dim=-1))
    assert built.queued.tolist() == [2, 3, 4, 5]
    assert not built.queue.rows.requires_grad


def test_a_batch_is_queued_after_its_loss_so_no_positive_is_its_own_negative():
    built = twins(queue=False)
    assert built.loss(encoded()) == twins(queue=False, queue_batches=0).loss(encoded())
    assert torch.allclose(built.queue.rows, IDENTICAL)


def test_a_sentence_is_not_its_own_negative_when_it_comes_round_again():
    built = twins()
    built.queued.copy_(torch.tensor([1, 0]))
    built.margins.zero_()
    logits = torch.cat([H @ IDENTICAL.mT, H @ QUEUE.mT], dim=1) / .05
    logits[0, 3] = logits[1, 2] = -torch.inf                      # row 0 is slot 1, row 1 slot 0
    expected = F.cross_entropy(logits, torch.tensor([0, 1])).item()
    columns = [H, IDENTICAL, IDENTICAL]
    assert built.loss(encoded(columns)).item() == pytest.approx(expected)
    assert twins(queue=False).loss(encoded(columns)).item() != pytest.approx(expected)


def test_the_queue_waits_for_five_hundred_steps():
    for step, waits in [(1, True), (500, True), (501, False)]:
        found, plain = (twins(queue=queue).loss(encoded(step=step)) for queue in (True, False))
        assert (found == plain) == waits


@pytest.mark.parametrize("settings, short", [
    (dict(steps=500), True), (dict(steps=501), False), (dict(steps=100, queue_batches=0), False),
    (dict(epochs=125, batch_size=2), True), (dict(epochs=126, batch_size=2), False)], ids=str)
def test_a_run_too_short_for_the_queue_is_told_so(settings, short, capsys):
    """An epoch of 8 texts has 4 steps of 2."""
    Twins.check(Config(**settings), [Corpus("texts", [TEXTS], None, "", 0)], None)
    said = capsys.readouterr().err
    assert said.count("\n") == short == ("NOTICE: --queue-batches 2 has no effect" in said)
    assert not short or "only after step 500, and the run has 500" in said


# ---- texts and margins ----------------------------------------------------------------------

def test_a_fraternal_text_is_a_function_of_seed_and_row():
    first, again, other = twins(), twins(), twins(seed=7)
    texts = [[built.fraternal(row) for row in range(8)] for built in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    anchor, identical, fraternal = first.views([3, 1], random.Random(0))
    assert anchor == identical == [TEXTS[3], TEXTS[1]]
    assert fraternal == [texts[0][3], texts[0][1]]
    assert first.views([1], random.Random(99))[2] == [texts[0][1]]


def test_all_four_changes_are_drawn():
    """Row 0 of as many methods as there are seeds is changed as one of the four changes it."""
    def drawn(seed):
        rng = random.Random(f"{seed} twin 0")
        kind = rng.choice(range(4))
        assert twins(seed=seed).fraternal(0) == CHANGES[kind](TEXTS[0], rng)
        return kind
    assert {drawn(seed) for seed in range(30)} == {0, 1, 2, 3} == {*range(len(CHANGES))}


def test_a_text_view_that_is_asked_for_takes_the_place_of_the_four():
    built = twins(positives="crop", rate=.5)
    assert all(len(built.fraternal(row).split()) == len(TEXTS[0].split()) / 2 for row in range(8))


def test_an_innate_margin_is_one_minus_the_cosine_within_zero_and_a_half():
    x, y = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    for a, b, m in zip(x, y, innate_margin(x, y)):
        expected = 1 - sum(a * b) / (sum(a * a) * sum(b * b))**.5
        assert m.item() == pytest.approx(min(max(expected.item(), 0), .5), abs=1e-5)
    assert innate_margin(x, 3 * x).abs().max() < 1e-6


@pytest.fixture
def prepared(tiny, sentences):
    """Builds the method on the tiny encoder and lets it prepare."""
    def make(**settings):
        model, corpus = load(tiny, pooling="cls"), read_corpus(str(sentences))
        method = Twins(corpus, Config(encoder=str(tiny), **settings), model=model)
        method.prepare(partial(encode, model, Tokenizer.read(tiny)))
        return method
    return make


def test_the_margin_of_a_row_is_that_of_its_own_fraternal_text_in_every_run(prepared, tiny):
    method, model, tokenizer = prepared(), load(tiny, pooling="cls").eval(), Tokenizer.read(tiny)
    texts, margins = method.corpus.columns[0], method.margins
    for row in (0, 17, 63):
        x, y = (model(*tokenizer([text], max_tokens=32))[0]
                for text in (texts[row], method.fraternal(row)))
        expected = 1 - F.cosine_similarity(x, y, dim=0).item()
        assert margins[row].item() == pytest.approx(max(expected, 0), abs=1e-5)
    unchanged = [row for row in range(64) if method.fraternal(row) == texts[row]]
    assert unchanged and margins[unchanged].abs().max() < 1e-5
    assert (margins >= 0).all() and (margins <= .5).all()
    assert torch.equal(margins, prepared().margins)


def test_a_teacher_knows_the_margins_and_is_neither_trained_nor_saved(prepared, capsys):
    alone = prepared()
    assert "use --teacher with one that was" in capsys.readouterr().err
    taught = prepared(teacher="mini")
    assert not capsys.readouterr().err
    assert not torch.allclose(taught.margins, alone.margins)
    assert not list(taught.parameters())
    assert set(taught.state_dict()) == {"margins", "queued", "queue.rows"}


@pytest.mark.parametrize("steps, rows", [(0, 8), (2, 4), (4, 8), (9, 8)])
def test_margins_are_measured_of_all_rows_that_are_trained_on(steps, rows):
    built, asked = twins(steps=steps), []
    built.teacher = lambda texts, max_tokens: asked.extend(texts) or torch.ones(len(texts), 2)
    built.prepare(None)
    trained = {TEXTS[row] for batch in row_order(built.rounds(steps or 4), 2, seed=42)
               for row in batch}
    assert trained <= {*asked} and len(asked) == 2 * rows


# ---- as users see it ------------------------------------------------------------------------

def test_our_defaults():
    for *kind, batch, rate in (("bert", 768, 64, 3e-5), ("roberta", 768, 128, 1e-5),
                               ("bert", 256, 128, 1e-4)):
        config = resolved("twins", *kind)
        assert (config.batch_size, config.learning_rate) == (batch, rate)
    assert (Config().twins_weight, Config().queue_batches) == (1, 2)


@pytest.mark.parametrize("flag", [(), ("--dry-run",)])
def test_vectors_of_the_corpus_are_no_teacher_of_changed_texts(program, tmp_path, capsys, flag):
    numpy.save(tmp_path / "rows.npy", numpy.ones((64, 8), "f4"))
    with pytest.raises(SystemExit) as refused:
        program(*flag, method="twins", steps=8, teacher=tmp_path / "rows.npy")
    said = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 3 and said.startswith("mincse.py: --teacher ")
    assert "expected vectors of changed sentences as well, found those of " in said
    assert said.endswith("give an encoder's folder, a Hub id, or mini")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

"""IFTCL in our reading: two kinds of positives, the margin between them, and the queue."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import spearmanr

import data
import mincse
from config import Config, resolve
from folders import load
from losses import info_nce, innate_margin, twin_gap, twins_loss
from corpus_methods import FRATERNAL, Twins, rows_of_run
from methods import Encoded
from papers import check
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from positives import repeat_words, swap_words

SENTENCE = "the quick brown fox jumps over the lazy dog today"


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


H = double([[1, 0], [0, 1]])
IDENTICAL = double([[.96, .28], [.28, .96]])
FRATERNAL_H = double([[.8, .6], [.6, .8]])
QUEUE = double([[-1, 0], [.6, -.8]])
MARGIN = double([.10, .25])


class Texts:
    """As much of a corpus as the method looks at."""
    columns = [[f"{SENTENCE} number {i} of many" for i in range(8)]]

    def __len__(self):
        return 8


def twins(*, queue=True, **settings):
    """The method on a small fixture: rows 0 and 1 at hand, rows 6 and 7 in the queue."""
    settings = dict(batch_size=2, queue_batches=1, method="twins") | settings
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 2, 1, 1, 5)), pooling="cls")
    built = Twins(Texts(), replace(Config(), **settings), model=model).double()
    built.margins[:2] = MARGIN
    if queue:
        built.queue.rows.copy_(QUEUE)
        built.queued.copy_(torch.tensor([6, 7]))
    return built


def encoded(columns=(H, IDENTICAL, FRATERNAL_H), *, step=501, steps=1000, rows=(0, 1)):
    return Encoded(list(columns), step, steps, torch.tensor(rows))


# ---- the loss -------------------------------------------------------------------------------

def test_the_twins_loss_of_the_worked_example():
    assert twins_loss(twin_gap(H, IDENTICAL, FRATERNAL_H), MARGIN).item() == pytest.approx(.005850)


def test_one_fraternal_twin_is_pulled_closer_and_the_other_pushed_away():
    """With respect to the cosines: (0.06, -0.09) for the identical, the opposite for the other."""
    own_i, own_f = (double(x).requires_grad_() for x in ([.96, .96], [.8, .8]))

    def at(cosine):                                               # a vector that far from (1, 0)
        return torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)

    anchor = double([[1, 0], [1, 0]])
    loss = twins_loss(twin_gap(anchor, at(own_i), at(own_f)), MARGIN)
    to_identical, to_fraternal = torch.autograd.grad(loss, [own_i, own_f])
    assert torch.allclose(to_identical, double([.06, -.09]))
    assert torch.allclose(to_fraternal, double([-.06, .09]))


def test_the_twins_loss_is_zero_where_every_gap_is_its_margin_and_only_there():
    gap = double([.16, .16])
    assert twins_loss(twin_gap(H, IDENTICAL, FRATERNAL_H), gap).item() < 1e-30
    for wrong in (double([.16, .17]), double([.15, .16])):
        assert twins_loss(twin_gap(H, IDENTICAL, FRATERNAL_H), wrong) > 1e-5


def test_moving_both_twins_by_the_same_cosine_changes_nothing():
    def pair(shift):
        return [torch.stack([double([s + shift] * 2), double([(1 - (s + shift)**2)**.5] * 2)], 1)
                for s in (.8, .6)]
    anchor = double([[1, 0], [1, 0]])
    losses = [twins_loss(twin_gap(anchor, *pair(shift)), MARGIN).item()
              for shift in (0, .1)]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("queue, identical, fraternal", [
    (False, [None, None, .001113], [None, None, .126928]),
    (True, [.028041, .001181, .014611], [.239545, .127224, .183384])])
def test_both_contrasts_of_the_worked_example(queue, identical, fraternal):
    """At temperature 0.1, anchor by anchor, as sums of exponentials."""
    for twin, expected in ((IDENTICAL, identical), (FRATERNAL_H, fraternal)):
        candidates = torch.cat([twin, QUEUE]) if queue else twin
        found = []
        for i, anchor in enumerate(H):
            likeness = [(F.cosine_similarity(anchor, c, dim=0) / .1).exp() for c in candidates]
            found.append(-(likeness[i] / sum(likeness)).log().item())
        for value, wanted in zip([*found, sum(found) / 2], expected):
            assert wanted is None or value == pytest.approx(wanted, abs=1e-6)
        built = twins(queue=queue, temperature=.1, twins_weight=0.)
        loss = built.loss(encoded([H, twin, twin]))
        assert loss.item() == pytest.approx(sum(found) / 2)


def test_the_whole_loss_of_the_worked_example():
    assert twins().loss(encoded()).item() == pytest.approx(.019569, abs=1e-6)


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
    columns = [x.clone().requires_grad_() for x in (H, IDENTICAL, FRATERNAL_H)]
    built = twins()
    built.loss(encoded(columns)).backward()
    assert all(x.grad.any() for x in columns)
    for name, buffer in built.named_buffers():
        assert not buffer.requires_grad and buffer.grad_fn is None, name
    assert not list(built.parameters())


def test_the_log_tells_whether_the_gap_follows_the_margin():
    torch.manual_seed(0)
    built = twins(batch_size=8, queue=False)
    a, i, f = torch.randn(3, 8, 2).double()
    gap = [float(torch.cosine_similarity(x, y, dim=0) - torch.cosine_similarity(x, z, dim=0))
           for x, y, z in zip(a, i, f)]
    built.margins.copy_(torch.rand(8))
    built.loss(encoded([a, i, f], rows=range(8)))
    log = built.logs()
    expected = spearmanr(gap, built.margins.tolist()).statistic
    assert log["gap_margin_correlation"] == pytest.approx(expected)
    assert log["gap"] == pytest.approx(sum(gap) / 8)
    assert log["innate_margin"] == pytest.approx(built.margins.mean().item())


# ---- the queue ------------------------------------------------------------------------------

def test_the_queue_holds_the_identical_twins_of_the_last_batches_in_order():
    built = twins(queue=False, queue_batches=2)
    batches = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    for i, batch in enumerate(batches):
        built.loss(encoded([H, 3 * batch.requires_grad_(), FRATERNAL_H], rows=(2 * i, 2 * i + 1)))
    assert torch.allclose(built.queue.rows, F.normalize(batches[1:].flatten(0, 1), dim=-1))
    assert built.queued.tolist() == [2, 3, 4, 5]
    assert not built.queue.rows.requires_grad


def test_a_batch_is_queued_after_its_loss_so_no_positive_is_its_own_negative():
    built = twins(queue=False)
    assert built.loss(encoded()) == twins(queue=False, queue_batches=0).loss(encoded())
    assert torch.allclose(built.queue.rows, IDENTICAL)


def test_changing_the_queue_later_leaves_earlier_gradients_alone():
    columns = [x.clone().requires_grad_() for x in (H, IDENTICAL, FRATERNAL_H)]
    built = twins()
    loss = built.loss(encoded(columns))
    expected = torch.autograd.grad(loss, columns, retain_graph=True)
    built.loss(encoded(rows=(2, 3)))
    assert all(map(torch.equal, torch.autograd.grad(loss, columns), expected))


def test_queued_vectors_only_ever_add_to_the_loss_and_push_the_anchor():
    assert twins().loss(encoded()) > twins(queue=False).loss(encoded())
    gradients = []
    for queue in (True, False):
        anchor = H.clone().requires_grad_()
        twins(queue=queue).loss(encoded([anchor, IDENTICAL, FRATERNAL_H])).backward()
        gradients.append(anchor.grad)
    assert not torch.allclose(*gradients)


def test_a_sentence_is_not_its_own_negative_when_it_comes_round_again():
    built, without = twins(), twins(queue=False)
    built.queued.copy_(torch.tensor([0, 1]))
    logits = torch.cat([H @ IDENTICAL.mT, H @ QUEUE.mT], dim=1) / .05
    logits[0, 2] = logits[1, 3] = -torch.inf                      # row 0 is slot 0, row 1 slot 1
    expected = F.cross_entropy(logits, torch.tensor([0, 1]))
    columns = [H, IDENTICAL, IDENTICAL]
    built.margins.zero_()
    assert built.loss(encoded(columns)).item() == pytest.approx(expected.item())
    assert built.loss(encoded(columns)) != without.loss(encoded(columns))


def test_the_queue_waits_for_five_hundred_steps():
    for step, waits in [(1, True), (500, True), (501, False)]:
        found = twins().loss(encoded(step=step, steps=10))
        assert (found == twins(queue=False).loss(encoded(step=step, steps=10))) == waits


def test_the_focal_loss_serves_both_contrasts():
    assert twins(loss="focal").loss(encoded()) != twins().loss(encoded())


# ---- texts and margins ----------------------------------------------------------------------

def test_repetition_says_up_to_a_share_of_the_words_twice_in_place():
    counts = set()
    for seed in range(200):
        words, i = repeat_words(SENTENCE, random.Random(seed), rate=.32).split(), 0
        counts.add(len(words) - 10)
        for word in SENTENCE.split():
            assert words[i] == word
            i += 2 if words[i + 1 : i + 2] == [word] else 1
        assert i == len(words)
    assert counts == {0, 1, 2, 3}
    assert repeat_words("word", random.Random(0)) in ("word", "word word")


def test_swapping_moves_words_by_one_place_at_most():
    words, moved = [f"w{i}" for i in range(100)], 0
    for seed in range(50):
        found = swap_words(" ".join(words), random.Random(seed), rate=.1).split()
        assert sorted(found) == sorted(words)
        assert all(abs(found.index(word) - i) <= 1 for i, word in enumerate(words))
        moved += sum(a != b for a, b in zip(found, words))
    assert moved / 5000 == pytest.approx(2 * .1 / 1.1, abs=.02)   # a swapped pair skips one draw


def test_a_fraternal_text_is_a_function_of_seed_and_row():
    first, again, other = twins(), twins(), twins(seed=7)
    texts = [[built.fraternal(row) for row in range(8)] for built in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    anchor, identical, fraternal = first.views([3, 1], random.Random(0))
    assert anchor == identical == [Texts.columns[0][3], Texts.columns[0][1]]
    assert fraternal == [texts[0][3], texts[0][1]]
    assert first.views([1], random.Random(99))[2] == [texts[0][1]]


def test_all_four_changes_are_drawn():
    built = twins()
    kinds = {random.Random(f"{built.config.seed} twin {row}").choice(range(len(FRATERNAL)))
             for row in range(50)}
    assert kinds == {0, 1, 2, 3}


def test_a_text_view_that_is_asked_for_takes_the_place_of_the_four():
    built = twins(positives="crop", rate=.5)
    words = Texts.columns[0][0].split()
    assert all(len(built.fraternal(row).split()) == len(words) / 2 for row in range(8))


def test_an_innate_margin_is_one_minus_the_cosine_within_zero_and_a_half():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    for a, b, m in zip(x, y, innate_margin(x, y)):
        expected = 1 - sum(a * b) / (sum(a * a) * sum(b * b))**.5
        assert m.item() == pytest.approx(min(max(expected.item(), 0), .5), abs=1e-5)
    assert innate_margin(x, 3 * x).abs().max() < 1e-6


@pytest.fixture
def prepared(tiny, sentences):
    """Builds the method on the tiny encoder and lets it prepare."""
    def make(**settings):
        config = Config(method="twins", encoder=str(tiny), batch_size=8, **settings)
        model = load(tiny, pooling="cls")
        method = Twins(data.read_corpus(str(sentences)), config, model=model)
        method.prepare(partial(encode, model, data.Tokenizer.read(tiny)), config.seed)
        return method
    return make


def test_the_margin_of_a_row_is_that_of_its_own_fraternal_text(prepared, tiny):
    method, model, tokenizer = prepared(), load(tiny, pooling="cls"), data.Tokenizer.read(tiny)
    model.eval()
    for row in (0, 17, 63):
        texts = [method.corpus.columns[0][row], method.fraternal(row)]
        x, y = (model(*tokenizer([text], max_tokens=32))[0] for text in texts)
        expected = 1 - F.cosine_similarity(x, y, dim=0).item()
        assert method.margins[row].item() == pytest.approx(max(expected, 0), abs=1e-5)


def test_margins_are_the_same_in_two_runs_and_zero_where_the_text_did_not_change(prepared):
    first, second = prepared(), prepared()
    assert torch.equal(first.margins, second.margins)
    unchanged = [row for row in range(64)
                 if first.fraternal(row) == first.corpus.columns[0][row]]
    assert unchanged and first.margins[unchanged].abs().max() < 1e-5
    assert (first.margins >= 0).all() and (first.margins <= .5).all() and first.margins.any()


def test_a_teacher_knows_the_margins_and_is_neither_trained_nor_saved(prepared, tiny, capsys):
    alone = prepared()
    assert "use --teacher with one that was" in capsys.readouterr().err
    taught = prepared(teacher="mini")
    assert not capsys.readouterr().err
    assert not torch.allclose(taught.margins, alone.margins)
    assert not list(taught.parameters())
    assert set(taught.state_dict()) == {"margins", "queued", "queue.rows"}


@pytest.mark.parametrize("steps", [0, 3, 8, 20])
def test_margins_are_known_for_all_rows_that_are_trained_on(prepared, tiny, steps):
    method = prepared(steps=steps)
    batches = mincse.make_batches(method, data.Tokenizer.read(tiny), method.config,
                                  steps=steps or 8, first=1)
    met = {row for batch in batches for row in batch.rows.tolist()}
    asked = rows_of_run(64, method.config)
    assert met <= set(asked) and len(asked) == (24 if steps == 3 else 64)


# ---- as users see it ------------------------------------------------------------------------

def test_our_defaults():
    found = {kind: resolve({"method": "twins"}, model_type=kind[0], width=kind[1], columns=1)
             for kind in (("bert", 768), ("roberta", 768), ("bert", 256))}
    assert [(config.batch_size, config.learning_rate) for config in found.values()] == [
        (64, 3e-5), (128, 1e-5), (128, 1e-5)]
    assert (Config().twins_weight, Config().queue_batches) == (1, 2)


def test_pairs_are_refused_since_the_method_makes_its_own():
    with pytest.raises(ValueError, match="--method twins takes a corpus of 1 columns, found 2"):
        check(Config(method="twins", corpus="pairs.tsv"), 2)


@pytest.fixture
def train(program, monkeypatch):
    monkeypatch.setattr(Twins, "queue_starts", 3)
    return partial(program, method="twins", steps=13)


def test_a_stopped_run_goes_on_exactly_where_it_was(train, stopped):
    whole = train(out="whole")
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"twins_loss", "contrastive_loss", "gap", "innate_margin",
            "gap_margin_correlation"} <= set(line)
    stopped(6, train, out="parts")
    parts = train("--resume", out="parts")
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_teacher_that_is_not_there_is_refused_before_the_first_step(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        train(teacher="no/such")
    assert refused.value.code == 3 and "the encoder no/such" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

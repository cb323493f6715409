"""DiffCSE: edits, their labels, the conditioned discriminator, and what is trained by it."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
from config import Config, resolve
from folders import load
from losses import detection_loss, info_nce
from methods import DiffCSE, Encoded
from papers import METHODS, check
from model import Head, Projector, encode

IDS = torch.tensor([[101, 5, 6, 7, 102, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()


@pytest.fixture
def diffcse(lm, sentences):
    """Builds model and method, without dropout unless asked for."""
    def build(dropout=0., **settings):
        config = Config(method="diffcse", encoder=str(lm), batch_size=4, **settings)
        torch.manual_seed(0)
        model = load(lm, pooling="cls", dropout=dropout)
        method = DiffCSE(data.read_corpus(str(sentences)), config, model=model)
        model.head = method.head(model.config.width)
        return model, method
    return build


def step_of(model, method, *, width=None, step=1):
    """What the training loop hands to the loss: two views of four sentences."""
    texts = method.corpus.columns[0][:4]
    ids, mask = method.tokenizer(texts * 2, max_tokens=32)
    if width:
        ids, mask = (F.pad(x, (0, width - x.shape[1])) for x in (ids, mask))
    hidden = model.layers(ids, mask)
    vectors = model.embed(hidden, mask)
    return Encoded(list(vectors.chunk(2)), step, 100, torch.arange(4), ids, mask, hidden)


# ---- the detection loss ---------------------------------------------------------------------

LOGITS = torch.tensor([[[2, 0], [1, 1], [0, 1], [.5, -.5]], [[3, 0], [0, 2], [1, 0], [0, 0]]],
                      dtype=torch.float64)
REPLACED = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()


def test_the_worked_example_of_detection():
    each = [[.126928, .693147, .313262, .313262], [.048587, .126928, .313262, .693147]]
    for i in range(2):
        for t in range(4):
            only = torch.zeros(2, 4).bool()
            only[i, t] = True
            assert detection_loss(LOGITS, REPLACED, only).item() == pytest.approx(
                each[i][t], abs=1e-6)
    found = detection_loss(LOGITS, REPLACED, REAL).item()
    assert found == pytest.approx(.276482, abs=1e-6)
    assert found * 7 == pytest.approx(1.935376, abs=1e-6)
    assert .1 + .005 * found == pytest.approx(.101382, abs=1e-6)


def test_padding_has_no_vote_where_the_official_code_gives_it_one():
    official = detection_loss(LOGITS, REPLACED, torch.ones(2, 4).bool()).item()
    assert official == pytest.approx(.328565, abs=1e-6)
    assert .1 + .005 * official == pytest.approx(.101643, abs=1e-6)


# ---- edits and labels -----------------------------------------------------------------------

class Words:
    """Of a tokenizer, what an edit asks for: BERT's numbers."""
    mask_id, special_ids, vocab_size = 103, [0, 101, 102, 103], 1000


def test_the_worked_example_of_labels_with_special_tokens_restored(diffcse):
    _, method = diffcse()
    method.tokenizer = Words
    method.guess = lambda ids, mask: torch.tensor([[999, 5, 8, 7, 12, 3]])
    edited = method.edit(IDS, MASK, step=1)
    assert edited.tolist() == [[101, 5, 8, 7, 102, 0]]
    assert ((edited != IDS) & MASK).int().tolist() == [[0, 0, 1, 0, 0, 0]]


def test_a_generator_that_restores_all_replaces_nothing_and_one_that_is_off_by_one_all(diffcse):
    model, method = diffcse()
    out = step_of(model, method)
    plain = out.mask & ~torch.isin(out.ids, torch.tensor(method.tokenizer.special_ids))
    for guess, replaced in [(out.ids, torch.zeros_like(plain)), (out.ids + 1, plain)]:
        method.guess = lambda ids, mask: guess
        assert torch.equal(method.edit(out.ids, out.mask, 1) != out.ids, replaced)
    assert (plain.sum(dim=1) == out.mask.sum(dim=1) - 2).all()    # all but [CLS] and [SEP]


def test_masks_have_their_rates_and_differ_between_the_views(diffcse):
    _, method = diffcse()
    seen = []
    method.tokenizer = Words
    method.guess = lambda ids, mask: seen.append(ids) or ids
    ids = torch.full((2000, 52), 7)
    ids[:, 0], ids[:, -1] = 101, 0
    mask = ids != 0
    method.edit(ids, mask, step=1)
    masked = seen[0][:, 1:-1]
    assert (seen[0][:, 0] == 101).all() and (seen[0][:, -1] == 0).all()
    share = {name: x.float().mean().item() for name, x in
             {"mask": masked == 103, "kept": masked == 7}.items()}
    assert share["mask"] == pytest.approx(.24, abs=.01)
    assert share["kept"] == pytest.approx(.73, abs=.01)
    assert 1 - sum(share.values()) == pytest.approx(.03, abs=.01)
    assert not torch.equal(masked[:1000], masked[1000:])


def test_the_masks_of_a_step_depend_on_seed_and_step_alone(diffcse):
    seen = []
    for seed, step in [(42, 3), (42, 3), (42, 4), (7, 3)]:
        _, method = diffcse(seed=seed)
        method.guess = lambda ids, mask: seen.append(ids) or ids
        torch.manual_seed(len(seen))
        method.edit(torch.full((50, 20), 2000), torch.ones(50, 20).bool(), step)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])


def test_the_guess_is_the_likeliest_word_of_the_masked_lm_at_every_real_token(diffcse, lm):
    from folders import load_masked_lm
    model, method = diffcse(dropout=.1)
    out = step_of(model, method)
    reader = load(lm).eval()
    scores = load_masked_lm(lm, reader)(reader.encoder(out.ids, out.mask)[-1])     # (2B, T, V)
    expected = torch.where(out.mask, scores.argmax(dim=-1), out.ids)
    model.train(), method.train()
    for _ in range(2):                                            # no dropout in the generator
        assert torch.equal(method.guess(out.ids, out.mask), expected)


def test_a_big_batch_is_guessed_in_pieces(diffcse):
    _, method = diffcse()
    ids = torch.randint(1000, 2000, (90, 20), generator=torch.Generator().manual_seed(0))
    whole = method.guess(ids, torch.ones_like(ids).bool())        # 1,800 tokens: two pieces
    parts = [method.guess(row[None], torch.ones(1, 20).bool()) for row in ids]
    assert torch.equal(whole, torch.cat(parts))


# ---- the discriminator ----------------------------------------------------------------------

def test_the_sentence_vector_stands_where_cls_was_and_nothing_of_cls_is_left(diffcse):
    model, method = diffcse()
    out = step_of(model, method)
    h = torch.cat(out.columns).detach()
    method.eval()
    before = method.detect(out.ids, out.mask, h)
    assert not torch.allclose(method.detect(out.ids, out.mask, h + 1), before, atol=1e-4)
    other = out.ids.clone()
    other[:, 0] = 2000
    with torch.no_grad():
        method.discriminator.positions.weight[0] += 1
    assert torch.equal(method.detect(other, out.mask, h), before)


def test_conditioning_is_that_of_the_authors_code_by_hand(diffcse):
    """Embeddings and their LayerNorm first; then row 0 is overwritten; then the layers."""
    model, method = diffcse()
    method.eval()
    out = step_of(model, method)
    ids, h, D = out.ids[:1, : out.mask[0].sum()], out.anchor[:1].detach(), method.discriminator
    x = D.words(ids) + D.positions.weight[: ids.shape[1]] + D.types.weight[0]
    x = torch.cat([h[:, None], D.norm(x)[:, 1:]], dim=1)          # (1, T, D)
    hidden = D.through(replace(D.embed(ids, ids > 0), rows=x[0]))
    expected = hidden[-1] @ method.detector.weight.mT + method.detector.bias
    found = method.detect(out.ids, out.mask, torch.cat(out.columns))
    assert torch.allclose(found[:1, : ids.shape[1]], expected, atol=1e-5)


def gradients(model, method, loss):
    model.zero_grad(), method.zero_grad()
    loss.backward()
    return {name: p.grad for part, module in (("f", model), ("D", method))
            for name, p in ((f"{part}.{n}", p) for n, p in module.named_parameters())}


def test_detection_trains_encoder_projector_discriminator_and_detector(diffcse):
    model, method = diffcse(rtd_weight=1.)
    out = step_of(model, method)
    method.loss_of = lambda *_, **__: torch.zeros(())
    found = gradients(model, method, method.loss(out))
    for part in ("f.encoder.layers.0", "f.head.0", "f.head.3", "D.discriminator.layers.1",
                 "D.detector"):
        assert all(g.abs().max() > 1e-9 for name, g in found.items()
                   if name.startswith(part) and name.endswith("weight")), part


def test_no_gradient_reaches_the_encoder_but_through_the_sentence_vector(diffcse):
    model, method = diffcse(rtd_weight=1.)
    out = step_of(model, method)
    method.loss_of = lambda *_, **__: torch.zeros(())
    cut = replace(out, columns=[x.detach() for x in out.columns])
    found = gradients(model, method, method.loss(cut))
    assert all(g is None for name, g in found.items() if name.startswith("f."))


def test_the_generator_is_neither_trained_nor_saved_with_the_state(diffcse):
    model, method = diffcse()
    start = [p.detach().clone() for part in method.guess.args for p in part.parameters()]
    method.loss(step_of(model, method)).backward()
    reader, head = method.guess.args
    now = [p for part in (reader, head) for p in part.parameters()]
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(now, start, strict=True))
    trained = {id(p) for p in [*model.parameters(), *method.parameters()]}
    assert not trained & {id(p) for p in now}
    assert {name.split(".")[0] for name in method.state_dict()} == {"discriminator", "detector"}
    assert not reader.training


def test_weight_zero_is_simcse_with_the_projector_and_computes_nothing_else(diffcse):
    model, method = diffcse(rtd_weight=0.)
    method.guess = None
    out = step_of(model, method)
    loss = method.loss(out)
    assert loss == info_nce(out.anchor, out.positive)
    assert all(g is None for name, g in gradients(model, method, loss).items() if name[0] == "D")
    assert set(method.logs()) == {"contrastive_loss"}


def test_the_loss_is_the_sum_of_its_terms_and_the_log_tells_them(diffcse):
    model, method = diffcse(rtd_weight=.25)
    out = step_of(model, method)
    loss, log = method.loss(out), method.logs()
    edited = method.edit(out.ids, out.mask, out.step)
    scores = method.detect(edited, out.mask, torch.cat(out.columns)).log_softmax(dim=-1)
    wrong, hits, count = [], {0: 0, 1: 0}, {0: 0, 1: 0}
    for i, t in out.mask.nonzero().tolist():
        label = int(edited[i, t] != out.ids[i, t])
        wrong.append(-scores[i, t, label].item())
        hits[label] += scores[i, t, label].item() > scores[i, t, 1 - label].item()
        count[label] += 1
    rtd = sum(wrong) / len(wrong)
    assert log["rtd_loss"] == pytest.approx(rtd, rel=1e-5)
    assert loss.item() == pytest.approx(info_nce(*out.columns).item() + .25 * rtd, rel=1e-5)
    assert log["replaced"] == pytest.approx(count[1] / len(wrong))
    assert log["found"] == pytest.approx(hits[1] / count[1])
    assert log["left_alone"] == pytest.approx(hits[0] / count[0])


def test_loss_and_gradients_do_not_depend_on_the_padded_width(diffcse):
    """In float64, without dropout, the same edits: width 8 or 16."""
    found = []
    for width in (8, 16):
        model, method = diffcse(rtd_weight=1.)
        model.double(), method.double()
        method.guess = lambda ids, mask: 1000 + torch.arange(ids.shape[1]).expand_as(ids)
        loss = method.loss(step_of(model, method, width=width))
        found.append((loss, gradients(model, method, loss)))
    (a, to_a), (b, to_b) = found
    assert a.item() == pytest.approx(b.item(), abs=1e-9)
    for name in to_a:
        assert (to_a[name] is None) == (to_b[name] is None)
        assert to_a[name] is None or torch.allclose(to_a[name], to_b[name], atol=1e-9), name


def test_the_official_mean_depends_on_the_padded_width():
    wide, label = F.pad(LOGITS, (0, 0, 0, 4)), F.pad(REPLACED, (0, 4))
    everywhere = [detection_loss(x, y, torch.ones_like(y)) for x, y in
                  ((LOGITS, REPLACED), (wide, label))]
    assert abs(everywhere[0] - everywhere[1]) > .01


# ---- the projector --------------------------------------------------------------------------

def test_the_projector_standardizes_over_both_views_together():
    torch.manual_seed(0)
    projector, x = Projector(16), torch.randn(200, 16)
    h = projector(x)
    inner = projector[3](projector[2](projector[1](projector[0](x))))
    v = inner.var(dim=0, unbiased=False)
    assert h.mean(dim=0).abs().max() < 1e-5
    assert torch.allclose(h.var(dim=0, unbiased=False), v / (v + 1e-5), atol=1e-4)
    assert h.square().sum(dim=1).mean().item() == pytest.approx(16, rel=1e-3)
    first_alone = projector(x[:100])
    assert not torch.allclose(first_alone, h[:100], atol=1e-3)


@pytest.mark.parametrize("width, count", [(768, 2_362_368), (1024, 4_198_400)])
def test_the_projector_has_the_size_of_the_paper_and_no_biases(width, count):
    projector = Projector(width)
    assert sum(p.numel() for p in projector.parameters()) == count
    assert projector[0].bias is None and projector[3].bias is None
    assert projector[4].weight is None and projector[4].bias is None


def test_evaluation_knows_nothing_of_projector_and_discriminator(diffcse):
    model, method = diffcse(dropout=.1)
    texts = method.corpus.columns[0][:5]
    before = encode(model, method.tokenizer, texts)
    model.head(torch.randn(8, model.config.width))                # moves its running statistics
    with torch.no_grad():
        for p in [*model.head.parameters(), *method.parameters()]:
            p.fill_(1.)
    assert torch.equal(encode(model, method.tokenizer, texts), before)


def test_other_methods_have_the_head_that_they_had():
    assert all((METHODS[name].head is Head) == (name != "diffcse") for name in METHODS)


# ---- as users see it ------------------------------------------------------------------------

def test_the_recipes_of_the_paper():
    encoders = [("bert", 768), ("roberta", 768), ("bert", 1024), ("roberta", 1024)]
    found = [resolve({"method": "diffcse"}, model_type=kind, width=width, columns=1)
             for kind, width in encoders]
    assert [(c.learning_rate, c.rtd_rate, c.rtd_weight, c.batch_size, c.epochs) for c in found] == [
        (7e-6, .3, .005, 64, 2), (1e-5, .2, .005, 64, 2), (5e-6, .3, .005, 64, 2),
        (5e-6, .3, .005, 64, 2)]


@pytest.mark.parametrize("settings, columns, said", [
    (dict(head="keep"), 1, "--head keep: the head of --method diffcse serves training only"),
    (dict(corpus="nli.csv"), 3, "--method diffcse takes a corpus of 1 columns, found 3")])
def test_what_makes_no_sense_is_refused(settings, columns, said):
    with pytest.raises(ValueError, match=said):
        check(Config(method="diffcse", **settings), columns)


def test_a_generator_of_other_words_is_refused(diffcse, lm, tmp_path):
    shutil.copytree(lm, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary |= {a: j, b: i}
    path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="--generator .*other: expected the vocabulary of"):
        diffcse(generator=str(tmp_path / "other"))


@pytest.fixture
def train(program, lm):
    return partial(program, method="diffcse", encoder=lm, steps=13)


def test_an_encoder_without_masked_lm_needs_a_generator(train, tiny, lm, capsys):
    with pytest.raises(SystemExit) as refused:
        train(encoder=tiny)
    said = capsys.readouterr().err
    assert refused.value.code == 3 and "expected a masked-LM head" in said and "found none" in said
    assert train(generator=lm, steps=2, encoder=tiny)


def test_a_stopped_run_goes_on_exactly_where_it_was(train, stopped, tmp_path):
    whole = train(out="whole")
    stopped(6, train, out="parts")
    saved = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["parts"]
    assert any(name.startswith("method.discriminator") for name in saved)
    assert any("running_mean" in name for name in saved)
    parts = train("--resume", out="parts")
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load(whole).head is None and not any("discriminator" in name for name in a)


def test_losses_text_views_poolings_and_the_masked_lm_term_combine_with_it(train):
    folder = train(loss="focal", positives="crop", pooling="mean", head="train", mlm_weight=.1)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] > line["contrastive_loss"] > 0


def test_in_bfloat16_the_discriminator_computes_like_the_encoder(train):
    line = json.loads((train(precision="bf16") / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["rtd_loss"] < 2 and 0 <= line["found"] <= 1

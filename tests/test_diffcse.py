"""DiffCSE: edits, their labels, the conditioned discriminator, and what is trained by it."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import resolved
from data import Corpus, read_corpus
from engine.encoders import load, load_masked_lm
from losses import info_nce
from model import EncoderConfig
from papers import check
from papers.diffcse import Config, DiffCSE, Projector, detection_loss
from papers.simcse import Encoded


@pytest.fixture
def diffcse(lm, sentences):
    """Builds model and method, without dropout, and encodes two views of four sentences."""
    def build(dropout=0., dtype=torch.float32, width=0, **settings):
        torch.manual_seed(0)
        model = load(lm, pooling="cls", dropout=dropout)
        corpus = read_corpus(str(sentences))
        method = DiffCSE(corpus, Config(encoder=str(lm), **settings), model=model)
        model.head = method.head(model.config.width)
        model.to(dtype), method.to(dtype)
        ids, mask = method.tokenizer(corpus.columns[0][:4] * 2, max_tokens=32)
        ids, mask = (F.pad(x, (0, max(0, width - x.shape[1]))) for x in (ids, mask))
        columns = list(model(ids, mask).chunk(2))
        return model, method, Encoded(columns, 1, 100, torch.arange(4), ids, mask)
    return build


# ---- the detection loss ---------------------------------------------------------------------

LOGITS = torch.tensor([[[2, 0], [1, 1], [0, 1], [.5, -.5]], [[3, 0], [0, 2], [1, 0], [0, 0]]],
                      dtype=torch.float64)
REPLACED = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()


def test_the_worked_example_of_detection():
    """A token costs log(1 + e^-d), d being how far the right answer's score is ahead."""
    ahead = [[2, 0, 1, 1], [3, 2, 1, 0]]                          # 2 - 0, 1 - 1, 1 - 0, .5 + .5 ...
    each = [[math.log1p(math.exp(-d)) for d in row] for row in ahead]
    assert each[0] == pytest.approx([.126928, .693147, .313262, .313262], abs=1e-6)
    for i, t in torch.cartesian_prod(torch.arange(2), torch.arange(4)):
        only = torch.zeros(2, 4, dtype=torch.bool)
        only[i, t] = True
        found = detection_loss(LOGITS[only], REPLACED[only]).item()
        assert found == pytest.approx(each[i][t], abs=1e-6)
    found = detection_loss(LOGITS[REAL], REPLACED[REAL]).item()
    assert found == pytest.approx((sum(each[0]) + sum(each[1][:3])) / 7)   # padding has no vote
    assert found == pytest.approx(.276482, abs=1e-6)
    assert .1 + .005 * found == pytest.approx(.101382, abs=1e-6)


def test_padding_has_no_vote_where_the_official_mean_changes_with_the_padded_width():
    wide = F.pad(LOGITS, (0, 0, 0, 4)), F.pad(REPLACED, (0, 4))
    official, wider = (detection_loss(x.flatten(0, 1), y.flatten()).item()
                       for x, y in ((LOGITS, REPLACED), wide))
    assert official == pytest.approx(.328565, abs=1e-6) and abs(official - wider) > .01
    assert .1 + .005 * official == pytest.approx(.101643, abs=1e-6)
    found, same = (detection_loss(*(x[F.pad(REAL, (0, extra))] for x in both))
                   for both, extra in (((LOGITS, REPLACED), 0), (wide, 4)))
    assert found == same


# ---- edits and labels -----------------------------------------------------------------------

def test_the_worked_example_of_labels_with_special_tokens_restored(diffcse):
    _, method, _ = diffcse()
    (cls, sep), pad = method.tokenizer.whole.encode("").ids, method.tokenizer.pad_id
    ids, mask = torch.tensor([[cls, 105, 106, 107, sep, pad]]), torch.tensor([[True] * 5 + [False]])
    method.guess = lambda ids, mask, places: torch.tensor([[999, 105, 108, 107, 112, 103]])
    edited = method.edit(ids, mask, step=1)
    assert edited.tolist() == [[cls, 105, 108, 107, sep, pad]]
    assert ((edited != ids) & mask).int().tolist() == [[0, 0, 1, 0, 0, 0]]


def test_a_generator_that_restores_all_replaces_nothing_and_one_that_is_off_by_one_all(diffcse):
    _, method, out = diffcse()
    plain = ~method.tokenizer.special(out.ids)
    for guess, replaced in [(out.ids, torch.zeros_like(plain)), (out.ids + 1, plain)]:
        method.guess = lambda ids, mask, places: guess
        assert torch.equal(method.edit(out.ids, out.mask, 1) != out.ids, replaced)
    assert (plain.sum(dim=1) == out.mask.sum(dim=1) - 2).all()    # all but [CLS] and [SEP]


def read_by_generator(method, ids, step=1):
    seen = []
    method.guess = lambda ids, mask, places: seen.append(ids) or ids
    method.edit(ids, ids != method.tokenizer.pad_id, step)
    return seen[0]


def test_masks_have_their_rate_and_differ_between_the_views(diffcse):
    _, method, _ = diffcse()
    ids = torch.full((2000, 52), 2000)
    ids[:, 0], ids[:, -1] = method.tokenizer.whole.encode("").ids[0], method.tokenizer.pad_id
    seen = read_by_generator(method, ids)
    assert torch.equal(seen[:, [0, -1]], ids[:, [0, -1]])
    changed = (seen[:, 1:-1] != 2000).float()                     # a tenth of .3 stays
    assert changed.mean().item() == pytest.approx(.27, abs=.01)
    assert not torch.equal(seen[:1000], seen[1000:])


def test_the_masks_of_a_step_depend_on_seed_and_step_alone(diffcse):
    ids = torch.full((50, 20), 2000)
    (_, method, _), (_, other, _) = diffcse(), diffcse(seed=7)
    first = read_by_generator(method, ids, step=3)
    torch.rand(3)
    assert torch.equal(read_by_generator(method, ids, step=3), first)
    assert not torch.equal(read_by_generator(method, ids, step=4), first)
    assert not torch.equal(read_by_generator(other, ids, step=3), first)


def test_the_guess_is_the_likeliest_word_of_the_masked_lm_at_every_real_token(diffcse, lm):
    """Of 1,140 tokens, which are scored in two pieces."""
    model, method, _ = diffcse(dropout=.1)
    ids = torch.randint(1000, 2000, (60, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    mask[:, 19] = False
    reader = load(lm).eval()
    scores = load_masked_lm(lm, reader)(reader.encoder(ids, mask)[-1])              # (60, 20, V)
    model.train(), method.train()
    for _ in range(2):                                            # no dropout in the generator
        assert torch.equal(method.guess(ids, mask), scores.argmax(dim=-1).where(mask, ids))


# ---- the discriminator ----------------------------------------------------------------------

def test_the_sentence_vector_stands_where_cls_was_and_nothing_of_cls_is_left(diffcse):
    model, method, out = diffcse()
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
    model, method, out = diffcse()
    method.eval()
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
    return {f"{owner}.{name}": p.grad for owner, module in (("f", model), ("D", method))
            for name, p in module.named_parameters()}


def test_detection_trains_all_networks_and_the_encoder_through_the_sentence_vector_alone(diffcse):
    model, method, out = diffcse(rtd_weight=1.)
    method.loss_of = lambda *_, **__: torch.zeros(())
    cut = replace(out, columns=[x.detach() for x in out.columns])
    found = gradients(model, method, method.loss(cut))
    assert all(g is None for name, g in found.items() if name.startswith("f."))
    found = gradients(model, method, method.loss(out))
    for network in ("f.encoder.layers.0", "f.head.0", "f.head.3", "D.discriminator.layers.1",
                    "D.detector"):
        assert all(g.abs().max() > 1e-9 for name, g in found.items()
                   if name.startswith(network) and name.endswith("weight")), network


def test_the_generator_is_neither_trained_nor_saved_with_the_state(diffcse):
    model, method, out = diffcse()
    before = method.guess(out.ids, out.mask)
    assert {name.split(".")[0] for name in method.state_dict()} == {"discriminator", "detector"}
    with torch.no_grad():
        for p in [*model.parameters(), *method.parameters()]:     # all that an optimizer gets
            p.fill_(1.)
    assert torch.equal(method.guess(out.ids, out.mask), before)


def test_weight_zero_is_simcse_with_the_projector_and_computes_nothing_else(diffcse):
    model, method, out = diffcse(rtd_weight=0.)
    method.guess = None
    loss = method.loss(out)
    assert loss == info_nce(out.anchor, out.positive)
    assert all(g is None for name, g in gradients(model, method, loss).items() if name[0] == "D")
    assert set(method.logs()) == {"contrastive_loss"}


def test_the_loss_is_the_sum_of_its_terms_and_the_log_tells_them(diffcse):
    model, method, out = diffcse(rtd_weight=.25)
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
        model, method, out = diffcse(rtd_weight=1., dtype=torch.float64, width=width)
        method.guess = lambda ids, mask, places: 1000 + torch.arange(ids.shape[1]).expand_as(ids)
        loss = method.loss(out)
        found.append({"loss": loss.detach(), **gradients(model, method, loss)})
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_in_bfloat16_the_discriminator_computes_like_the_encoder(diffcse):
    _, method, out = diffcse(rtd_weight=1.)
    method.guess, seen = lambda ids, mask, places: ids + 1, []
    method.detector.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    exact, rough = method.loss(out), method.loss(replace(out, bf16=True))
    assert seen == [torch.float32, torch.bfloat16]
    assert method.terms["rtd_loss"].dtype == torch.float32        # as all losses are computed
    assert rough.item() == pytest.approx(exact.item(), rel=.02)


# ---- the projector --------------------------------------------------------------------------

def test_the_projector_standardizes_over_both_views_together():
    torch.manual_seed(0)
    projector, x = Projector(16), torch.randn(200, 16)
    h = projector(x)
    v = projector[3](projector[2](projector[1](projector[0](x)))).var(dim=0, unbiased=False)
    assert h.mean(dim=0).abs().max() < 1e-5
    assert torch.allclose(h.var(dim=0, unbiased=False), v / (v + 1e-5), atol=1e-4)
    assert h.square().sum(dim=1).mean().item() == pytest.approx(16, rel=1e-3)
    assert not torch.allclose(projector(x[:100]), h[:100], atol=1e-3)


@pytest.mark.parametrize("width, count", [(768, 2_362_368), (1024, 4_198_400)])
def test_the_projector_has_the_size_of_the_paper_and_no_biases(width, count):
    projector = Projector(width)
    assert sum(p.numel() for p in projector.parameters()) == count
    assert projector[0].bias is None and projector[3].bias is None
    assert projector[4].weight is None and projector[4].bias is None


# ---- as users see it ------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, rate, masked", [
    ("bert", 768, 7e-6, .3), ("roberta", 768, 1e-5, .2), ("bert", 1024, 5e-6, .3),
    ("roberta", 1024, 5e-6, .3)])
def test_the_recipes_of_the_paper(model_type, width, rate, masked):
    c = resolved("diffcse", model_type, width)
    assert (c.learning_rate, c.rtd_rate, c.rtd_weight, c.batch_size, c.epochs) == (
        rate, masked, .005, 64, 2)


def test_a_head_that_serves_training_only_cannot_be_kept():
    config, corpus = Config(method="diffcse", head="keep", batch_size=2), Corpus(
        "docs", [["a", "b"]], None, "", 0)
    with pytest.raises(ValueError, match="--head keep: the head of --method diffcse serves train"):
        check(config, [corpus], EncoderConfig("bert", 7, 4, 1, 1, 5))


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


def test_an_encoder_without_masked_lm_needs_a_generator(program, tiny, capsys):
    with pytest.raises(SystemExit) as refused:
        program(method="diffcse", encoder=tiny)
    said = capsys.readouterr().err
    assert refused.value.code == 3 and "expected a masked-LM head" in said and "found none" in said


def test_with_a_generator_it_trains_any_encoder_and_saves_that_alone(program, tiny, lm):
    folder = program(method="diffcse", encoder=tiny, generator=lm, pooling="mean", head="train",
                     steps=1)
    line = json.loads((folder / "metrics.jsonl").read_text())
    assert line["loss"] > line["contrastive_loss"] > 0
    assert load(folder).head is None
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tiny / "model.safetensors").keys()

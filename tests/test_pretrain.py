"""Pre-training: from text to tokens, from counts to vectors, and runs as their users see them."""

import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
from engine import encoders, run_folder
from engine.flags import dashed
from tools import pretrain

SMALL = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 400, "max_tokens": 16,
         "batch_size": 8, "steps": 12, "dev_every": 5, "learning_rate": 5e-3, "threads": 1,
         "device": "cpu", "precision": "fp32"}


def typed(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (dashed(name), str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few kilobytes in 60 documents: who, does, what, where, at random."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    phrases = [["the dog", "a cat", "my owl", "one bee", "her cow"],
               ["finds", "eats", "hides", "brings", "paints"],
               ["some bread", "an apple", "nine books", "old shoes"],
               ["at home", "in Paris", "by night", "under water"]]
    lines = [" ".join(map(rng.choice, phrases)).capitalize() + "." for _ in range(300)]
    path.write_text("".join(line + "\n" + "\n" * (i % 5 == 4) for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    """An encoder of 400 steps."""
    folder = tmp_path_factory.mktemp("trained") / "encoder"
    pretrain.main(typed(SMALL | {"corpus": text, "out": folder, "steps": 400, "dev_every": 400}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(trained) -> data.Tokenizer:
    return data.Tokenizer.read(trained)


@pytest.fixture
def lm(trained) -> pretrain.MaskedLM:
    model = encoders.load(trained)
    return pretrain.MaskedLM(model, encoders.load_masked_lm(trained, model)).eval()


@pytest.fixture
def program(text, tmp_path, monkeypatch):
    """Runs tools.pretrain in this process on the text: program(steps=3, ...) -> its folder."""
    def run(*flags, out="run", **settings) -> Path:
        argv = [*typed(SMALL | {"corpus": text, "out": tmp_path / out} | settings), *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
        pretrain.main(argv)
        return tmp_path / out
    return run


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---- from text to tokens --------------------------------------------------------------------

def test_the_tokenizer_keeps_frequent_words_whole_and_is_the_same_in_transformers(
        trained, tokenizer):
    assert tokenizer.whole.encode("The DOG eats books").tokens == [
        "[CLS]", "the", "dog", "eats", "books", "[SEP]"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    for sentence in ["The DOG finds an apple.", "café ünder Paris!", "", "zebra-crossing 42"]:
        ids, _ = tokenizer([sentence], max_tokens=512)
        assert theirs(sentence)["input_ids"] == ids[0].tolist()
    assert theirs.mask_token_id == tokenizer.mask_id and theirs.model_max_length == 512


def test_documents_are_separated_and_one_in_so_many_is_held_out(text, tokenizer):
    """60 documents: each sixth is held out, and nothing is lost or moved."""
    corpus = data.read_corpus(str(text))
    train, held_out = pretrain.streams(corpus, tokenizer)
    expected = {False: [], True: []}
    for number in range(60):
        for sentence in corpus.columns[0][5 * number : 5 * number + 5]:
            expected[number % 6 == 5] += tokenizer.whole.encode(sentence).ids[1:-1]
        expected[number % 6 == 5] += [tokenizer.whole.token_to_id("[SEP]")]
    assert train.tolist() == expected[False] and held_out.tolist() == expected[True]


def test_sequences_cover_the_stream_with_cls_and_sep_around_each_and_hide_neither(tokenizer):
    """A stream 100, 101, ..., in which every token tells its place."""
    sequences = pretrain.Sequences(np.arange(100, 300, dtype=np.uint16), tokenizer, 12)
    assert len(sequences) == 20
    whole = sequences([0, 3])
    assert whole.tolist() == [[2, *range(100, 110), 3], [2, *range(130, 140), 3]]
    ids, labels = sequences.masked([0, 3], rate=.999999, seed=1)
    assert (labels[:, [0, -1]] == -100).all() and torch.equal(labels[:, 1:-1], whole[:, 1:-1])
    assert (ids[:, 1:-1] == tokenizer.mask_id).sum() > 10         # 80 % of 20: see test_data.py


# ---- from counts to vectors -----------------------------------------------------------------

def test_positive_pmi_by_hand_of_neighbours_up_to_its_window_and_no_further():
    """0 1 0 1 2 3 2 3, window 1: 0-1 meet three times, 1-2 once, 2-3 three times.

    Both ways that is 14 meetings, of which 3, 4, 4, 3 belong to the words.
    """
    found = pretrain.positive_pmi(np.array([0, 1, 0, 1, 2, 3, 2, 3], np.uint16), 4, window=1)
    strong = math.log(3 * 14 / (3 * 4))                           # 1 and 2 meet less than by chance
    expected = [[0, strong, 0, 0], [strong, 0, 0, 0], [0, 0, 0, strong], [0, 0, strong, 0]]
    assert found.toarray() == pytest.approx(np.array(expected), abs=1e-6)
    met = pretrain.positive_pmi(np.arange(8, dtype=np.uint16), 8, window=5).toarray() > 0
    near = [[0 < abs(i - j) <= 5 for j in range(8)] for i in range(8)]
    assert not (met & ~np.array(near)).any() and met[0, 5] and met[5, 0]


def test_word_vectors_are_the_truncated_svd_centred_and_of_one_length():
    rng = np.random.default_rng(0)
    counts = rng.random((13, 13)) * (rng.random((13, 13)) < .5)
    pmi = np.triu(counts, 1) + np.triu(counts, 1).T
    pmi[:, 7] = pmi[7] = 0                                        # this word met nobody
    found = pretrain.svd_embeddings(pretrain.sparse.csr_matrix(pmi), 5)

    u, sizes, _ = np.linalg.svd(pmi)
    slow = u[:, :5] * np.sqrt(sizes[:5])
    met = [i for i in range(13) if i != 7]
    slow[met] -= slow[met].mean(axis=0)
    slow[met] *= .6 / np.linalg.norm(slow[met], axis=1, keepdims=True)
    slow[7] = 0
    assert found @ found.T == pytest.approx(slow @ slow.T, abs=1e-2)          # signs are free
    assert np.linalg.norm(found, axis=1)[met] == pytest.approx([.6] * 12)


def test_words_of_the_same_use_begin_near_each_other(text, tokenizer):
    stream, _ = pretrain.streams(data.read_corpus(str(text)), tokenizer)
    x = pretrain.svd_embeddings(pretrain.positive_pmi(stream, tokenizer.vocab_size, window=2), 16)
    dog, cat, paris = (x[tokenizer.whole.token_to_id(word)] for word in ("dog", "cat", "paris"))
    assert dog @ cat > dog @ paris


# ---- the model ------------------------------------------------------------------------------

def test_guessing_equals_the_whole_model_asked_at_every_place(lm):
    torch.manual_seed(0)
    ids, labels = torch.randint(5, 60, (3, 7)), torch.full((3, 7), -100)
    labels[0, 2], labels[2, 5], labels[2, 6] = 11, 12, 13
    logits, answers = lm.guess(ids, labels)
    hidden = lm.model.encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    whole = lm.head(hidden[-1])                                                   # (B, T, V)
    assert answers.tolist() == [11, 12, 13]
    assert torch.allclose(logits, torch.stack([whole[0, 2], whole[2, 5], whole[2, 6]]), atol=1e-5)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_batch_in_which_no_word_was_masked_has_a_loss_and_a_gradient_of_zero(lm, asked):
    ids, labels = torch.full((2, 7), 9), torch.full((2, 7), -100)
    labels[0, 3 : 3 + asked] = 11
    logits, answers = lm.guess(ids, labels)
    torch.nn.functional.cross_entropy(logits, answers, reduction="sum").backward()
    assert len(logits) == asked
    assert all((p.grad.abs().sum() > 0) == asked for p in lm.head.dense.parameters())


def test_decay_spares_biases_and_layer_norms_and_no_weight_is_left_out(lm):
    matrices, rest = pretrain.make_optimizer(lm, pretrain.Config(weight_decay=.3)).param_groups
    assert (matrices["weight_decay"], rest["weight_decay"]) == (.3, 0)
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert set(matrices["params"] + rest["params"]) == set(lm.parameters())


def test_the_learning_rate_rises_for_a_moment_and_ends_at_zero():
    assert [pretrain.schedule(done) for done in (0, .015, .03, .515, 1, 1.1)] == pytest.approx(
        [0, .5, 1, .5, 0, 0])


# ---- a run and its folder -------------------------------------------------------------------

def test_seconds_of_training_teach_it_more_than_how_frequent_words_are(trained, text, tokenizer):
    """A model that knew only the frequencies would score their entropy."""
    results = results_of(trained)
    counts = np.bincount(pretrain.streams(data.read_corpus(str(text)), tokenizer)[0]).astype(float)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert results["test"]["held_out_loss"] < entropy - .5
    assert results["tokens"] == 400 * 8 * 16


def test_the_folder_gives_the_same_logits_in_transformers_with_one_table_of_words(
        trained, lm, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(trained, dtype=torch.float32).eval()
    ids, mask = tokenizer(["the dog [MASK] bread.", "a cat"], max_tokens=16)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        found = lm.head(lm.model.encoder(ids, mask)[-1])[mask]
    assert torch.allclose(found, expected, atol=1e-5)
    saved = load_file(trained / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}
    assert lm.head.words is lm.model.encoder.words.weight and not any("decoder" in n for n in saved)


def test_the_folder_has_a_card_the_dropout_of_simcse_and_a_mean_for_later_positions(trained):
    card, loss = (trained / "README.md").read_text(), results_of(trained)["test"]["held_out_loss"]
    assert f"**{loss:.3f}**" in card and "15% of the tokens" in card
    assert "in 400 steps" in card and "Limits:" in card and not (trained / "state.pt").exists()
    assert json.loads((trained / "config.json").read_text())["hidden_dropout_prob"] == .1
    table = load_file(trained / "model.safetensors")["bert.embeddings.position_embeddings.weight"]
    assert len(table) == 512
    assert torch.allclose(table[16:].float(), table[8:16].float().mean(dim=0), atol=1e-3)


def test_simcse_trains_from_the_folder(trained, sentences, pairs, tmp_path):
    import mincse
    mincse.main(["--encoder", str(trained), "--corpus", str(sentences), "--test", str(pairs),
                 "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "run")])
    assert encoders.load(tmp_path / "run").pooling == "cls"


def test_an_encoder_that_the_last_update_broke_is_not_saved(program, tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 1: try a lower"):
        program(steps=1, learning_rate=1e30)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def stops(program, stopped):
    """stops(at, ...): runs it, and a SIGINT comes when that step of the session is taken."""
    return lambda at, *flags, **settings: stopped(at, program, *flags, **settings)


@pytest.mark.parametrize("settings", [{}, {"dropout": .1, "init": "random"}])
def test_a_run_stopped_twice_and_resumed_ends_with_the_same_bits(
        program, stops, trained, monkeypatch, capsys, settings):
    same = (trained / "tokenizer.json").read_text()               # two trainings number otherwise
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda texts, size: same)
    whole = program(out="whole", **settings)
    assert stops(4, **settings) == 130
    said = capsys.readouterr().err
    assert "stopped at step 4 of 12" in said and said.rstrip().endswith("--resume")
    assert stops(3, "--resume", **settings) == 130
    monkeypatch.delattr(pretrain, "train_tokenizer")              # it keeps what it began with
    rest = program("--resume", **settings)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (rest / name).read_bytes() == (whole / name).read_bytes()
    assert [line["step"] for line in run_folder.lines(rest)] == [5, 10, 12]
    assert results_of(rest) == results_of(whole)
    monkeypatch.setattr(pretrain, "train", None)                  # a finished run is not trained
    program("--resume", **settings)


def test_another_text_under_the_same_name_is_refused_on_resume(program, stops, text, tmp_path,
                                                               capsys):
    corpus = shutil.copy(text, tmp_path / "own.txt")
    stops(2, corpus=corpus)
    with Path(corpus).open("a") as file:
        file.write("One more line.\n")
    with pytest.raises(SystemExit) as refused:
        program("--resume", corpus=corpus)
    assert refused.value.code == 2
    assert "another --corpus of the same name" in capsys.readouterr().err


def test_a_stopped_run_with_the_optimizers_of_an_older_version_is_refused(
        program, stops, tmp_path, capsys):
    stops(2)
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"optimizer": [state["optimizer"], {"state": {}, "param_groups": []}]}, path)
    with pytest.raises(SystemExit) as refused:
        program("--resume")
    assert refused.value.code == 3
    assert "state.pt: expected the state of this run, found" in capsys.readouterr().err


def test_going_on_from_an_encoder_keeps_its_words_and_starts_where_it_was(trained, program):
    folder = program(from_=trained, steps=2)
    before, now = results_of(trained)["test"], results_of(folder)["before"]
    assert now["held_out_loss"] == pytest.approx(before["held_out_loss"], abs=.01)       # fp16
    assert (folder / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_roberta_goes_on_under_its_own_names(trained, tokenizer, program, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=len(tokenizer.whole.get_vocab()), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, type_vocab_size=1,
        max_position_embeddings=40, pad_token_id=0)).save_pretrained(tmp_path / "roberta")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, tmp_path / "roberta")
    theirs, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        program(from_=tmp_path / "roberta", steps=2), output_loading_info=True)
    assert type(theirs).__name__ == "RobertaForMaskedLM" and not loading["missing_keys"]


# ---- wrong uses -----------------------------------------------------------------------------

@pytest.mark.parametrize("settings, code, said", [
    ({"corpus": "missing.txt"}, 3, "missing.txt: expected a file or one of docs"),
    ({"batch_size": 5000}, 3, "expected text for 5000 sequences of 16 tokens"),
    ({"width": 512, "heads": 4}, 3, "--init svd: expected more than --width 512 word pieces"),
    ({"width": 33}, 2, "--width: expected a multiple of --heads, 2, found 33"),
    ({"steps": 0}, 2, "--steps: expected 1 or more, found 0"),
    ({"learning_rate": math.inf}, 2, "--learning-rate: expected above 0, found inf"),
    ({"mask_rate": 1.0}, 2, "--mask-rate: expected above 0 and below 1, found 1.0"),
    ({"max_tokens": 1000}, 2, "--max-tokens: expected 8 or more and at most 512, found 1000"),
    ({"mask_rat": .2}, 2, "unrecognized arguments: --mask-rat 0.2"),
    ({"from_": "missing"}, 3, "the encoder missing")])
def test_a_wrong_use_is_refused_with_one_sentence(program, capsys, settings, code, said):
    with pytest.raises(SystemExit) as refused:
        program(**settings)
    assert refused.value.code == code and said in capsys.readouterr().err

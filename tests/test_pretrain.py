"""Pre-training: from text to tokens, from counts to vectors, and runs as their users see them."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import folders
import pretrain
import words

ROOT = Path(__file__).parent.parent
SMALL = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 400, "max_tokens": 16,
         "batch_size": 8, "steps": 12, "dev_every": 5, "learning_rate": 5e-3, "threads": 1}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A few kilobytes in 60 documents: who, does, what, where, at random."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    parts = [["the dog", "a cat", "my owl", "one bee", "her cow"],
             ["finds", "eats", "hides", "brings", "paints"],
             ["some bread", "an apple", "nine books", "old shoes"],
             ["at home", "in Paris", "by night", "under water"]]
    lines = [" ".join(map(rng.choice, parts)).capitalize() + "." for _ in range(300)]
    path.write_text("".join(line + "\n" + "\n" * (i % 5 == 4) for i, line in enumerate(lines)))
    return path


@pytest.fixture
def program(text, tmp_path, monkeypatch):
    """Runs pretrain.py in this process on the small text: program(steps=3, ...) -> its folder."""
    def run(*flags, out="run", **settings) -> Path:
        settings = SMALL | {"corpus": text, "out": tmp_path / out} | settings
        argv = [part for name, value in settings.items() if value is not None
                for part in (pretrain.dashed(name), str(value))]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv, *flags])
        pretrain.main([*argv, *flags])
        return tmp_path / out
    return run


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory) -> Path:
    """An encoder of 400 steps."""
    folder = tmp_path_factory.mktemp("trained") / "encoder"
    settings = SMALL | {"corpus": text, "out": folder, "steps": 400}
    pretrain.main([part for name, value in settings.items()
                   for part in (pretrain.dashed(name), str(value))])
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- from text to tokens --------------------------------------------------------------------

def test_transformers_reads_the_tokenizer_and_gives_the_same_ids(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    ours = data.Tokenizer.read(trained)
    for sentence in ["The DOG finds an apple.", "café ünder Paris!", "", "zebra-crossing 42"]:
        assert theirs(sentence)["input_ids"] == ours([sentence], max_tokens=512)[0][0].tolist()
    assert theirs.mask_token_id == ours.mask_id and theirs.model_max_length == 512


def test_frequent_words_are_whole_and_case_does_not_count(trained):
    tokenizer = data.Tokenizer.read(trained).whole
    assert tokenizer.encode("The DOG eats books").tokens == [
        "[CLS]", "the", "dog", "eats", "books", "[SEP]"]


def test_documents_are_separated_and_one_in_so_many_is_held_out(text):
    """60 documents: each sixth is held out, and nothing is lost or moved."""
    corpus = data.read_corpus(str(text))
    tokenizer = data.Tokenizer(words.train_tokenizer(corpus.columns[0], 400))
    train, held_out = words.streams(corpus, tokenizer)
    expected = {False: [], True: []}
    for number in range(60):
        for sentence in corpus.columns[0][5 * number : 5 * number + 5]:
            expected[number % 6 == 5] += tokenizer.whole.encode(sentence).ids[1:-1]
        expected[number % 6 == 5] += [tokenizer.whole.token_to_id("[SEP]")]
    assert train.tolist() == expected[False] and held_out.tolist() == expected[True]


@pytest.fixture
def numbered(trained):
    """A stream 100, 101, ... so that every token tells its place."""
    return words.Sequences(np.arange(100, 300, dtype=np.uint16),
                              data.Tokenizer.read(trained), 12)


def test_sequences_cover_the_stream_with_cls_and_sep_around_each(numbered):
    assert len(numbered) == 20
    assert numbered([0, 3]).tolist() == [[2, *range(100, 110), 3], [2, *range(130, 140), 3]]


def test_of_the_tokens_to_be_guessed_80_percent_are_masked_10_changed_and_10_kept(trained):
    tokenizer = data.Tokenizer.read(trained)
    rng = np.random.default_rng(0)
    stream = rng.integers(5, tokenizer.vocab_size, 62_000).astype(np.uint16)
    sequences = words.Sequences(stream, tokenizer, 64)
    rows = list(range(1000))
    whole, (ids, labels) = sequences(rows), sequences.masked(rows, rate=.2, seed=1)
    asked = labels != -100
    assert asked.sum().item() / 62_000 == pytest.approx(.2, abs=.01)
    assert not asked[:, [0, -1]].any()                            # nobody guesses [CLS] and [SEP]
    assert torch.equal(whole[asked], labels[asked]) and torch.equal(whole[~asked], ids[~asked])
    fate = ids[asked]
    masked, kept = (fate == tokenizer.mask_id), (fate == labels[asked])
    for share, expected in [(masked, .8), (kept, .1), (~masked & ~kept, .1)]:
        assert share.float().mean().item() == pytest.approx(expected, abs=.015)


# ---- from counts to vectors -----------------------------------------------------------------

def test_positive_pmi_of_a_corpus_of_four_words_worked_out_by_hand():
    """0 1 0 1 2 3 2 3, window 1: 0-1 meet three times, 1-2 once, 2-3 three times.

    Both ways that is 14 meetings, of which 3, 4, 4, 3 belong to the words.
    """
    found = words.positive_pmi(np.array([0, 1, 0, 1, 2, 3, 2, 3], np.uint16), 4, window=1)
    strong = math.log(3 * 14 / (3 * 4))                           # 1 and 2 meet less than by chance
    expected = [[0, strong, 0, 0], [strong, 0, 0, 0], [0, 0, 0, strong], [0, 0, strong, 0]]
    assert found.toarray() == pytest.approx(np.array(expected), abs=1e-6)


def test_the_window_counts_neighbours_up_to_its_width_and_no_further():
    stream = np.arange(8, dtype=np.uint16)
    met = words.positive_pmi(stream, 8, window=5).toarray() > 0
    slow = [[0 < abs(i - j) <= 5 for j in range(8)] for i in range(8)]
    assert not (met & ~np.array(slow)).any() and met[0, 5] and met[5, 0]


def test_word_vectors_are_the_truncated_svd_centred_and_of_one_length():
    rng = np.random.default_rng(0)
    counts = rng.random((13, 13)) * (rng.random((13, 13)) < .5)
    pmi = np.triu(counts, 1) + np.triu(counts, 1).T
    pmi[:, 7] = pmi[7] = 0                                        # this word met nobody
    found = words.svd_embeddings(words.sparse.csr_matrix(pmi), 5)

    u, sizes, _ = np.linalg.svd(pmi)
    slow = u[:, :5] * np.sqrt(sizes[:5])
    met = [i for i in range(13) if i != 7]
    slow[met] -= slow[met].mean(axis=0)
    slow[met] *= .6 / np.linalg.norm(slow[met], axis=1, keepdims=True)
    slow[7] = 0
    assert found @ found.T == pytest.approx(slow @ slow.T, abs=1e-2)          # signs are free
    assert np.linalg.norm(found, axis=1)[met] == pytest.approx([.6] * 12)


def test_words_of_the_same_use_start_out_alike(text):
    corpus = data.read_corpus(str(text))
    tokenizer = data.Tokenizer(words.train_tokenizer(corpus.columns[0], 400))
    stream, _ = words.streams(corpus, tokenizer)
    x = words.svd_embeddings(words.positive_pmi(stream, tokenizer.vocab_size, window=2), 16)
    dog, cat, paris = (x[tokenizer.whole.token_to_id(word)] for word in ("dog", "cat", "paris"))
    assert dog @ cat > dog @ paris


# ---- the model ------------------------------------------------------------------------------

def test_guessing_equals_the_whole_model_asked_at_every_place(trained):
    model = folders.load(trained).eval()
    lm = pretrain.MaskedLM(model, folders.load_masked_lm(trained, model)).eval()
    torch.manual_seed(0)
    ids, labels = torch.randint(5, 60, (3, 7)), torch.full((3, 7), -100)
    labels[0, 2], labels[2, 5], labels[2, 6] = 11, 12, 13
    logits, answers, summary = lm.guess(ids, labels)
    whole = lm.head(model.encoder(ids, torch.ones_like(ids, dtype=torch.bool))[-1])   # (B, T, V)
    assert answers.tolist() == [11, 12, 13]
    assert torch.allclose(logits, torch.stack([whole[0, 2], whole[2, 5], whole[2, 6]]), atol=1e-5)
    assert torch.allclose(summary, whole[:, 0], atol=1e-5)        # [CLS] of every sequence


def test_the_bag_loss_asks_cls_for_every_word_as_it_was_before_masking():
    """Two sequences [CLS] a b [SEP]; in the first, b (4) is hidden behind a 0."""
    summary = torch.tensor([[0., 1, 2, 3, 4, 5], [1., 0, 0, 0, 0, 2]])
    ids = torch.tensor([[1, 3, 0, 2], [1, 5, 5, 2]])
    labels = torch.tensor([[-100, -100, 4, -100], [-100, 5, -100, -100]])
    surprises = [math.log(sum(math.exp(x) for x in row)) - row[word]
                 for row, words_said in zip(summary.tolist(), [(3, 4), (5, 5)])
                 for word in words_said]
    assert pretrain.bag_loss(summary, ids, labels).item() == pytest.approx(sum(surprises) / 4)


def test_the_head_shares_its_word_vectors_with_the_encoder(trained):
    model = folders.load(trained)
    lm = pretrain.MaskedLM(model, folders.load_masked_lm(trained, model))
    assert lm.head.words is model.encoder.words.weight
    assert not any("decoder" in name for name in load_file(trained / "model.safetensors"))


def test_the_learning_rate_rises_for_a_moment_and_ends_at_zero():
    assert [pretrain.schedule(done) for done in (0, .015, .03, .515, 1, 1.1)] == pytest.approx(
        [0, .5, 1, .5, 0, 0])


# ---- a run and its folder -------------------------------------------------------------------

def test_seconds_of_training_teach_it_more_than_how_frequent_words_are(trained, text):
    """A model that knew only the frequencies would score their entropy."""
    results = json.loads((trained / "results.json").read_text())
    corpus, tokenizer = data.read_corpus(str(text)), data.Tokenizer.read(trained)
    counts = np.bincount(words.streams(corpus, tokenizer)[0]).astype(float)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert results["test"]["held_out_loss"] < entropy - .5
    assert results["test"]["held_out_bag_loss"] < entropy - .3    # [CLS] has read the others
    assert results["tokens"] == 400 * 8 * 16


def test_the_folder_gives_the_same_logits_in_transformers_and_here(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(trained, dtype=torch.float32).eval()
    ours = folders.load(trained).eval()
    head = folders.load_masked_lm(trained, ours)
    ids, mask = data.Tokenizer.read(trained)(["the dog [MASK] bread.", "a cat"], max_tokens=16)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        found = head(ours.encoder(ids, mask)[-1])[mask]
    assert torch.allclose(found, expected, atol=1e-5)
    assert {t.dtype for t in load_file(trained / "model.safetensors").values()} == {torch.float16}


def test_the_card_states_command_loss_and_limits(trained):
    card = (trained / "README.md").read_text()
    results = json.loads((trained / "results.json").read_text())
    assert f"**{results['test']['held_out_loss']:.3f}**" in card and "15% of the tokens" in card
    assert "in 400 steps" in card and "Limits:" in card and not (trained / "state.pt").exists()


def test_the_saved_encoder_keeps_the_dropout_that_simcse_needs(trained):
    assert json.loads((trained / "config.json").read_text())["hidden_dropout_prob"] == .1


def test_positions_never_trained_are_the_mean_of_the_later_trained_ones(trained):
    table = load_file(trained / "model.safetensors")["bert.embeddings.position_embeddings.weight"]
    assert len(table) == 512
    assert torch.allclose(table[16:].float(), table[8:16].float().mean(dim=0), atol=1e-3)


def test_simcse_trains_from_the_folder(trained, sentences, pairs, tmp_path):
    import mincse
    mincse.main(["--encoder", str(trained), "--corpus", str(sentences), "--test", str(pairs),
                 "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "run")])
    assert folders.load(tmp_path / "run").pooling == "cls"


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
    assert "stopped at step 4" in said and said.rstrip().endswith("--resume")
    assert stops(3, "--resume", **settings) == 130
    rest = program("--resume", **settings)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (rest / name).read_bytes() == (whole / name).read_bytes()
    assert [line["step"] for line in metrics(rest)] == [5, 10, 12]
    assert metrics(rest)[-1]["held_out_loss"] == metrics(whole)[-1]["held_out_loss"]


def test_a_resumed_run_keeps_the_tokenizer_it_began_with(program, stops, tmp_path, monkeypatch):
    stops(2)
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    monkeypatch.delattr(pretrain, "train_tokenizer")
    assert (program("--resume") / "tokenizer.json").read_bytes() == before


def test_a_finished_run_is_not_trained_again(program, monkeypatch):
    program(steps=2)
    monkeypatch.setattr(pretrain, "train", None)
    program("--resume", steps=2)


def test_a_budget_in_minutes_counts_all_sessions_and_ends_at_a_rate_near_zero(
        program, stops, tmp_path):
    """A clock that ticks a second with every look at it: 0.1 minutes are 6 steps."""
    class Clock:
        now = 0.

        def perf_counter(self):
            self.now += 1
            return self.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.time, "perf_counter", Clock().perf_counter)
        assert stops(2, steps=None, minutes=.1) == 130
        folder = program("--resume", steps=None, minutes=.1)
    first, last = json.loads((folder / "results.json").read_text()), metrics(folder)[-1]
    assert 6 <= first["seconds"] < 20 and first["steps"] <= 6
    assert last["learning_rate"] < .5 * SMALL["learning_rate"]


def test_another_text_under_the_same_name_is_refused_on_resume(program, stops, text, tmp_path,
                                                               capsys):
    corpus = shutil.copy(text, tmp_path / "own.txt")
    stops(2, corpus=corpus)
    with Path(corpus).open("a") as file:
        file.write("One more line.\n")
    with pytest.raises(SystemExit) as refused:
        program("--resume", corpus=corpus)
    assert refused.value.code == 3 and "has changed" in capsys.readouterr().err


def test_going_on_from_an_encoder_keeps_its_words_and_starts_where_it_was(trained, program):
    folder = program(from_=trained, steps=2)
    results = json.loads((folder / "results.json").read_text())
    before = json.loads((trained / "results.json").read_text())["test"]["held_out_loss"]
    assert results["before"]["held_out_loss"] == pytest.approx(before, abs=.01)           # fp16
    assert (folder / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_roberta_goes_on_under_its_own_names(trained, program, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "roberta"
    settings = transformers.RobertaConfig(
        vocab_size=len(data.Tokenizer.read(trained).whole.get_vocab()), hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, type_vocab_size=1,
        max_position_embeddings=40, pad_token_id=0)
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(settings).save_pretrained(source)
    shutil.copy(trained / "tokenizer.json", source)
    folder = program(from_=source, steps=2)
    theirs, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, output_loading_info=True)
    assert type(theirs).__name__ == "RobertaForMaskedLM" and not loading["missing_keys"]


# ---- wrong uses -----------------------------------------------------------------------------

@pytest.mark.parametrize("settings, code, said", [
    ({"corpus": "missing.txt"}, 3, "missing.txt: expected a file or one of docs"),
    ({"batch_size": 5000}, 3, "expected text for 5000 sequences of 16 tokens"),
    ({"width": 512, "heads": 4}, 3, "--init svd: expected more than --width 512 word pieces"),
    ({"width": 33}, 2, "--width: expected a multiple of --heads, 2, found 33"),
    ({"steps": 0}, 2, "--steps: expected above 0, found 0"),
    ({"learning_rate": math.inf}, 2, "--learning-rate: expected a finite number, found inf"),
    ({"mask_rate": 1.0}, 2, "--mask-rate: expected below 1, found 1.0"),
    ({"max_tokens": 1000}, 2, "--max-tokens: expected 8 to 512, found 1000"),
    ({"minutes": 1}, 2, "--steps and --minutes both say how long the run is"),
    ({"from_": "missing"}, 3, "the encoder missing"),
])
def test_a_wrong_use_is_refused_with_one_sentence(program, capsys, settings, code, said):
    with pytest.raises(SystemExit) as refused:
        program(**settings)
    assert refused.value.code == code and said in capsys.readouterr().err


def test_as_typed_an_unknown_flag_is_a_usage_error():
    typed = subprocess.run([sys.executable, ROOT / "pretrain.py", "--mask-rat", ".2"], text=True,
                           capture_output=True)
    assert typed.returncode == 2 and "unrecognized arguments: --mask-rat" in typed.stderr

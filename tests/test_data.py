"""Files of every kind and every kind of damage; tokens and batches."""

import csv
import gzip
import hashlib
import io
import random
import threading
import time
import tracemalloc
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies
from tokenizers import models, pre_tokenizers, processors

import data
from data import Corpus, Tokenizer, ahead, batches, read_corpus, shuffled
from engine.doctor import doctor, doctor_text
from engine.hub import data_file, encoder_folder, senteval_folder
from engine.texts import Lines

ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path):
    """Write bytes or text under a name, gzipped if the name says so; returns the path."""
    def write(name, content):
        content = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path
    return write


# ---- text: one sentence a line --------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_sentence_a_line_gzipped_or_not(file, name):
    path = file(name, "One owl.\n  Two owls. \nDrei Käuze.")
    corpus = read_corpus(str(path))
    assert corpus.columns == [["One owl.", "Two owls.", "Drei Käuze."]]
    assert (len(corpus), corpus.documents, corpus.blank) == (3, None, 0)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["\ufeffone\ntwo\n", "one\r\ntwo\r\n", " one\t\n\u00a0two"])
def test_line_ends_a_byte_order_mark_and_outer_space_are_no_part_of_a_sentence(file, content):
    assert read_corpus(str(file("a.txt", content))).columns == [["one", "two"]]


def test_only_a_newline_ends_a_line_of_any_length(file):
    lines = ["a\u2028b", "c\u0085d", "e\u000bf\u000cg", "h\ri", "x" * 10_000_000]
    assert read_corpus(str(file("a.txt", "\n".join(lines)))).columns == [lines]


def test_a_blank_line_begins_a_new_document_between_sentences_only(file):
    corpus = read_corpus(str(file("a.txt", "\n\na\nb\n\n \nc\n\nd\ne\n\n")))
    assert corpus.columns == [["a", "b", "c", "d", "e"]]
    assert list(corpus.documents) == [0, 0, 1, 2, 2]
    assert corpus.blank == 6
    corpus = read_corpus(str(file("a.txt", "\n\na\nb\n\n")))
    assert corpus.documents is None and corpus.blank == 3


def test_texts_read_back_by_row_by_slice_and_from_the_end():
    texts = ["a", "", "é", "東京", "e"]
    lines = Lines(texts)
    assert len(lines) == 5 and [lines[i] for i in range(-5, 5)] == texts + texts
    assert lines[1:4] == texts[1:4] and lines[::-2] == texts[::-2]
    with pytest.raises(IndexError):
        lines[5]


def test_a_sentence_takes_the_bytes_of_its_text_and_some_ten_more_in_memory(file):
    path = file("a.txt", "".join(f"{number} is a number\n" for number in range(10_000, 60_000)))
    tracemalloc.start()
    corpus = read_corpus(str(path))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.columns[0][49_999] == "59999 is a number"
    assert held < 1.2 * (17 + 8 + 4) * 50_000                  # and a place to grow into


LETTERS = strategies.characters(exclude_characters="\0\n\ufeff", exclude_categories=["Cs"])


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.text(LETTERS).filter(str.strip), min_size=2))
def test_whatever_the_sentences_they_come_back_stripped_and_in_order(tmp_path_factory, sentences):
    sentences = [f"{text} owl {text}" for text in sentences]      # numbers alone are refused
    path = tmp_path_factory.mktemp("any") / "any.txt"
    path.write_bytes("\n".join(sentences).encode())
    assert read_corpus(str(path)).columns == [[sentence.strip() for sentence in sentences]]


# ---- columns: csv and tsv -------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("header, width", [("sent0,sent1\n", 2), ("sent0,sent1,hard_neg\n", 3),
                                           ("", 3)])
def test_a_csv_has_two_or_three_columns_and_perhaps_simcses_header(file, name, header, width):
    rows = [["a, b", 'c "d"', "e"], ["f", "g\nh", "i"]]
    body = io.StringIO()
    csv.writer(body).writerows(row[:width] for row in rows)
    corpus = read_corpus(str(file(name, header + body.getvalue())))
    assert corpus.columns == [list(column) for column in zip(*rows)][:width]
    assert corpus.documents is None


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_a_tsv_has_tabs_and_its_quotes_are_letters(file, name):
    corpus = read_corpus(str(file(name, 'a "b\tc, d\r\n"e"\tf\n')))
    assert corpus.columns == [['a "b', '"e"'], ["c, d", "f"]]


def test_any_other_first_line_is_data_and_a_row_that_lacks_a_text_is_left_out_and_counted(file):
    corpus = read_corpus(str(file("a.csv", "one owl,two owls\na,b\nsent0,sent1\n")))
    assert corpus.columns == [["one owl", "a", "sent0"], ["two owls", "b", "sent1"]]
    corpus = read_corpus(str(file("a.csv", "\na,b\n\nc, \n,\nd,e\n")))
    assert corpus.columns == [["a", "d"], ["b", "e"]] and corpus.blank == 4


# ---- refusals ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "\n \n", r"a.txt: expected two rows or more, .* found 0"),
    ("a.txt", "alone\n", r"a.txt: expected two rows or more, .* found 1"),
    ("a.csv", "sent0,sent1\n", r"a.csv: expected two rows or more, .* found 0"),
    ("a.txt", b"fine\ncaf\xe9\n", r"a.txt:2: expected UTF-8, found the byte 0xe9"),
    ("a.csv", b"a,b\nc,d\ncaf\xe9,e\n", r"a.csv:3: expected UTF-8, found the byte 0xe9"),
    ("a.txt", "one\ntwo\nth\0ree\n", r"a.txt:3: expected UTF-8 text, found a NUL"),
    ("a.csv", "a,b\nc,d\ne\n", r"a.csv:3: expected 2 columns, found 1"),
    ("a.tsv", "a\tb\tc\n\nd\te\n", r"a.tsv:3: expected 3 columns, found 2"),
    ("a.csv", "a\nb\n", r"a.csv:1: expected 2 or 3 columns, found 1"),
    ("a.tsv", "a\tb\tc\td\n", r"a.tsv:1: expected 2 or 3 columns, found 4"),
    ("a.csv", 'a,b\n"c,d\n', r"a.csv:2: damaged csv \(unexpected end of data\)"),
])
def test_a_damaged_corpus_is_refused_with_its_place(file, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(str(file(name, content)))


# ---- the local data folder ------------------------------------------------------------------

def test_the_data_folder_comes_before_the_environment_and_both_before_the_hub(
        tmp_path, monkeypatch):
    for folder, word in (("mine", "own"), ("theirs", "other")):
        (tmp_path / folder / "nli").mkdir(parents=True)
        (tmp_path / folder / "wiki1m.txt").write_text(f"{word}\n{word}\n")
        (tmp_path / folder / "nli" / "all.csv").write_text(f"{word},a,b\n{word},c,d\n")
    monkeypatch.setenv("MINCSE_DATA", str(tmp_path / "theirs"))
    assert read_corpus("wiki1m", tmp_path / "mine").columns == [["own", "own"]]
    assert read_corpus("wiki1m").columns == [["other", "other"]]
    assert read_corpus("nli").columns == [["other", "other"], ["a", "c"], ["b", "d"]]
    assert read_corpus("nli").name == "nli"


def test_a_corpus_or_data_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="wiki2m: expected a file or one of docs, wiki1m"):
        read_corpus("wiki2m")
    with pytest.raises(FileNotFoundError, match="found a folder there"):
        read_corpus(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere: --data names this folder"):
        read_corpus("wiki1m", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="reviews.txt: not on the Hub, and not in"):
        read_corpus("reviews", tmp_path)
    monkeypatch.setenv("MINCSE_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone: MINCSE_DATA names this folder"):
        read_corpus("wiki1m")


def test_a_local_folder_needs_no_hub_and_two_files_are_not_guessed_between(tmp_path):
    (tmp_path / "nli").mkdir()
    for name in ("snli.csv", "mnli.csv"):
        (tmp_path / "nli" / name).write_text("a,b\nc,d\n")
    with pytest.raises(ValueError, match="expected one file, found 2: .*--corpus"):
        data_file(data.CORPORA["nli"], tmp_path)
    assert (encoder_folder("mini"), encoder_folder(str(tmp_path))) == (ROOT / "mini", tmp_path)


@pytest.mark.parametrize("name, rows, columns, documents", [
    ("wiki1m", 1_000_000, 1, None),
    ("nli", 32_849, 3, None),
    ("wiki_articles", 500_003, 1, 28_556),
    ("reviews", 100_000, 1, None),
])
def test_the_real_corpora_are_whole(real_data, name, rows, columns, documents):
    corpus = read_corpus(name, real_data)
    assert (len(corpus), len(corpus.columns), corpus.blank) == (rows, columns, documents or 0)
    assert (corpus.documents and corpus.documents[-1] + 1) == documents


def test_the_real_test_sets_are_found(real_data):
    assert {"STS", "SICK"} <= {path.name for path in senteval_folder(real_data).iterdir()}


# ---- tokens ---------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "owl", "sees", "an", "elk"]


@pytest.fixture
def words(tmp_path) -> Tokenizer:
    """Ten words, ids as in WORDS; its file asks for padding to 8 and cutting at 4 on its own."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.read(tmp_path)


def test_texts_become_ids_padded_to_the_longest_and_a_mask_of_the_real_ones(words):
    ids, mask = words(["the owl sees an elk", "owl", ""], max_tokens=32)
    assert ids.tolist() == [[2, 5, 6, 7, 8, 9, 3], [2, 6, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * n + [False] * (7 - n) for n in (7, 3, 2)]
    ids, _ = words(["the owl sees an elk"], max_tokens=4)
    assert [WORDS[i] for i in ids[0]] == ["[CLS]", "the", "owl", "[SEP]"]   # a limit counts them


def test_of_equal_texts_one_is_tokenized_and_all_get_its_row(words):
    seen, library = [], words.copy(32)

    class Listening:
        def encode_batch_fast(self, texts):
            seen.extend(texts)
            return library.encode_batch_fast(texts)

    words.limited[32] = Listening()
    ids, mask = words(["owl", "the elk", "owl"], max_tokens=32)
    assert seen == ["owl", "the elk"]
    assert ids.tolist() == [[2, 6, 3, 0], [2, 5, 9, 3], [2, 6, 3, 0]]
    assert mask.tolist() == [[True] * 3 + [False], [True] * 4, [True] * 3 + [False]]


def test_a_tokenizer_knows_its_special_tokens_and_counts_in_full(words):
    assert (words.pad_id, words.mask_id, words.vocab_size) == (0, 4, 10)
    assert words.special(torch.arange(10)).tolist() == [True] * 5 + [False] * 5
    assert words.lengths(["the owl sees an elk", "owl"]) == [7, 3]


def test_two_threads_may_cut_at_different_limits_at_the_same_time(words):
    texts, wrong = ["the owl sees an elk"] * 50, []

    def work(limit):
        for _ in range(100):
            ids, _ = words(texts, max_tokens=limit)
            if ids.shape != (50, limit):
                wrong.append(ids.shape)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (3, 4, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_folder_without_a_tokenizer_or_a_tokenizer_without_padding_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the encoder's tokenizer .* found none"):
        Tokenizer.read(tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"owl": 0}, "owl")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"it has no token \[PAD\] or <pad>"):
        Tokenizer.read(tmp_path)


# ---- masked-LM inputs -----------------------------------------------------------------------

@pytest.fixture
def masked(words):
    words.vocab_size = 1000
    return partial(words.mask, rate=0.15, seed=0)


def test_of_the_chosen_tokens_eight_in_ten_are_masked_one_is_random_and_one_stays(masked):
    ids = torch.randint(5, 1000, (1000, 200), generator=torch.Generator().manual_seed(1))
    out, labels = masked(ids)
    chosen = labels != -100
    n = chosen.sum().item()
    assert n / ids.numel() == pytest.approx(0.15, abs=0.005)                   # 6 deviations
    assert (out[chosen] == 4).sum() / n == pytest.approx(0.8, abs=0.015)
    assert (out[chosen] == ids[chosen]).sum() / n == pytest.approx(0.1, abs=0.015)
    others = out[chosen & (out != 4) & (out != ids)]
    assert len(others) / n == pytest.approx(0.1, abs=0.015)
    assert len(others.unique()) > 900                          # from the whole vocabulary


def test_labels_are_the_true_tokens_and_all_else_stays_as_it_was(masked):
    ids = torch.randint(5, 1000, (50, 40), generator=torch.Generator().manual_seed(1))
    before = ids.clone()
    out, labels = masked(ids)
    chosen = labels != -100
    assert torch.equal(ids, before)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(out[~chosen], ids[~chosen])


def test_special_tokens_are_never_chosen_and_the_seed_decides(masked):
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 4, 9, 9, 9, 3]])
    _, labels = masked(ids, rate=1.0)
    assert labels.tolist() == [[-100, 7, 8, -100, -100, -100], [-100, -100, 9, 9, 9, -100]]
    ids = torch.arange(5, 905).view(30, 30)
    assert all(torch.equal(a, b) for a, b in zip(masked(ids), masked(ids)))
    assert not torch.equal(masked(ids)[1], masked(ids, seed=1)[1])


# ---- the doctor -----------------------------------------------------------------------------

def test_the_doctor_counts_what_a_reader_can_count(words):
    sentences = ["owl", "owl", "the owl", "an elk sees the owl", "elk"]     # 3 3 4 7 3 tokens
    corpus = Corpus("mine", [sentences], [0, 0, 1, 1, 2], "ab12", blank=2)
    report = doctor(corpus, words, max_tokens=4)
    assert report == {"corpus": "mine", "rows": 5, "columns": 1, "documents": 3, "blank lines": 2,
                      "exact duplicates": 1, "rows sampled": 5, "max tokens": 4,
                      "share truncated": 0.2, "mean tokens": 4.0, "sha256": "ab12",
                      "first row": ["owl"]}
    screen = doctor_text(report)
    for phrase in ("mine: 5 rows", "3 documents", "2 blank", "1 exact duplicate", "20.0% of rows",
                   "cut at 4", "4.0 tokens", "sha256 ab12"):
        assert phrase in screen
    assert "evenly spaced" not in screen


def test_with_several_columns_a_duplicate_is_a_whole_row_and_a_row_is_cut_if_any_text_is(words):
    corpus = Corpus("pairs", [["owl", "owl", "owl"], ["elk", "elk", "the owl sees"]], None, "", 0)
    report = doctor(corpus, words, max_tokens=4)
    assert report["exact duplicates"] == 1 and report["documents"] is None
    assert report["share truncated"] == pytest.approx(1 / 3)
    assert report["mean tokens"] == pytest.approx((5 * 3 + 5) / 6)


def test_of_a_large_corpus_the_doctor_samples_evenly_and_says_so(words):
    sentences = ["owl"] * 15_000 + ["the owl sees an elk"] * 15_000
    report = doctor(Corpus("big", [sentences], None, "", 0), words, max_tokens=4)
    assert report["rows sampled"] == 10_000 and report["share truncated"] == 0.5
    assert "10,000 evenly spaced rows" in doctor_text(report)


# ---- batches --------------------------------------------------------------------------------

def test_an_epoch_visits_each_row_once_and_drops_the_ragged_batch():
    epochs = list(batches(23, 5, seed=0, epochs=2))
    assert [len(rows) for rows in epochs] == [5] * 8
    for epoch in (epochs[:4], epochs[4:]):
        visits = Counter(row for rows in epoch for row in rows)
        assert len(visits) == 20 and set(visits) <= set(range(23)) and set(visits.values()) == {1}


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    first, second = (list(batches(20, 4, seed=7, epochs=epochs)) for epochs in (2, 3))
    assert first == second[:10]
    assert first[:5] != first[5:]
    assert first != list(batches(20, 4, seed=8, epochs=2))


def test_the_order_is_a_fair_shuffle():
    """Each of the 6 orders of 3 rows comes up in a sixth of the seeds."""
    counts = Counter(tuple(shuffled(3, random.Random(seed))) for seed in range(6000))
    assert len(counts) == 6 and all(abs(count - 1000) < 120 for count in counts.values())


def test_ahead_gives_the_same_items_in_the_same_order():
    assert list(ahead(iter(range(100)), depth=3)) == list(range(100))
    assert list(ahead([])) == []
    assert list(ahead([None, False])) == [None, False]


def test_ahead_works_in_another_thread_and_only_so_far_ahead():
    made = []

    def source():
        for i in range(100):
            made.append(threading.current_thread())
            yield i

    items = ahead(source(), depth=3)
    assert next(items) == 0
    time.sleep(0.05)                                            # time enough to go too far
    items.close()
    assert 1 <= len(made) <= 4
    assert threading.current_thread() not in made


def test_an_exception_arrives_after_the_items_before_it():
    def source():
        yield from range(5)
        raise ValueError("row 5 is damaged")

    seen = []
    with pytest.raises(ValueError, match="row 5"):
        for item in ahead(source(), depth=2):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop", [3, None], ids=["consumer stops", "items end"])
def test_the_thread_ends(stop):
    def source():
        for i in range(20):
            time.sleep(0.01)                                    # so some are still to be made
            yield i

    before = threading.active_count()
    items = ahead(source(), depth=8)
    assert list(islice(items, stop)) == list(range(stop or 20))
    items.close()
    assert threading.active_count() == before

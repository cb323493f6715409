"""A model in use: vectors of a file, the nearest sentences, and a card that others can follow."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import results
from engine.encoders import load, save
from eval_sts import open_encoder
from model import encode
from tools import encode as encoder_tool
from tools import search

TEXTS = ["A man plays a guitar.", "the dog runs", "", "an owl sees us", "the dog runs home"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f" {text}\r\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def vectors(tiny):
    """vectors(texts): what the tiny encoder makes of them."""
    return lambda texts: encode(*open_encoder(tiny), texts)


def refused(main, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


# ---- vectors of a file ----------------------------------------------------------------------

@pytest.mark.parametrize("name, read", [
    ("v.npy", np.load), ("v.npz", lambda path: np.load(path)["vectors"]),
    ("v.safetensors", lambda path: load_file(path)["vectors"].numpy())])
def test_row_i_is_the_vector_of_line_i_blank_lines_too(tiny, corpus, vectors, name, read, tmp_path):
    encoder_tool.main([str(tiny), str(corpus), str(tmp_path / name)])
    found = read(tmp_path / name)
    assert found.dtype == np.float32 and np.allclose(found, vectors(TEXTS), atol=1e-6)


def test_many_texts_are_encoded_piece_by_piece():
    sizes = []
    found = encoder_tool.encode_all(lambda texts: sizes.append(len(texts)) or torch.tensor(
        [[float(text)] for text in texts]), [*map(str, range(7))], chunk=3)
    assert sizes == [3, 3, 1] and found[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("texts, out, code, said", [
    ("pairs.TSV", "v.npy", 3, "one sentence a line, found a table"),
    ("blank.txt", "v.npy", 3, "found no text"), ("none.txt", "v.npy", 3, "found no file"),
    ("corpus.txt", "v.csv", 2, "expected a name in .npy, .npz, .safetensors"),
    ("corpus.txt", "none/v.npy", 2, "in an existing folder")])
def test_what_cannot_be_encoded_or_written_is_said_before_the_work(
        tiny, corpus, texts, out, code, said, tmp_path, capsys):
    (tmp_path / "pairs.TSV").write_text("a\tb\t1\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    assert refused(encoder_tool.main, tiny, tmp_path / texts, tmp_path / out) == code
    assert said in capsys.readouterr().err and not (tmp_path / "v.npy").exists()


def test_a_bare_string_is_no_list_of_sentences(tiny):
    with pytest.raises(ValueError, match="a list of sentences, found one string, 'the dog runs'"):
        encode(*open_encoder(tiny), "the dog runs")


# ---- search ---------------------------------------------------------------------------------

@pytest.fixture
def found(tiny, corpus, capsys):
    """found(query, ...): the lines that the search prints."""
    def run(*arguments):
        search.main([str(tiny), str(corpus), *map(str, arguments)])
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return run


def test_the_nearest_sentences_come_with_cosine_and_line(found, vectors):
    query = "a dog runs"
    (x,), rows = vectors([query]).tolist(), vectors(TEXTS).tolist()
    cosines = [sum(map(math.prod, zip(x, row))) / math.hypot(*x) / math.hypot(*row) for row in rows]
    order = sorted((place for place in range(5) if TEXTS[place]), key=lambda i: -cosines[i])
    expected = [[f"{cosines[i]:.4f}", str(i + 1), TEXTS[i]] for i in order]
    assert found(query, "--top", 9) == [[query], *expected]
    assert found(query, "--top", 2) == [[query], *expected[:2]]


def test_several_queries_are_typed_or_read_from_a_file(found, tmp_path):
    (tmp_path / "queries.txt").write_text("the owl\n\nthe bee\n")
    both = found("the owl", "--top", 1) + found("the bee", "--top", 1)
    assert found("the owl", "the bee", "--top", 1) == both
    assert found("--queries", tmp_path / "queries.txt", "--top", 1) == both


def test_the_corpus_is_encoded_again_only_where_it_or_the_model_changed_or_its_vectors_are_damaged(
        tiny, corpus, found, tmp_path, monkeypatch):
    encoded, encode_all = [], search.encode_all
    monkeypatch.setattr(search, "encode_all", lambda *given: (
        encoded.append(1), encode_all(*given))[1])
    kept = tmp_path / "corpus.txt.vectors.npz"
    first = found("the dog")
    assert found("the dog") == first and len(encoded) == 1
    kept.write_bytes(kept.read_bytes()[:-200])
    assert found("the dog") == first and len(encoded) == 2
    corpus.write_text("an owl\nthe dog\n")
    assert found("the dog", "--top", 1) == [["the dog"], ["1.0000", "2", "the dog"]]
    assert len(encoded) == 3
    other = load(shutil.copytree(tiny, tmp_path / "other"))
    other.encoder.words.weight.data.mul_(2)
    save(other, tmp_path / "other")
    search.main([str(tmp_path / "other"), str(corpus), "the dog"])
    assert len(encoded) == 4 and kept.is_file()


def test_where_nothing_can_be_kept_the_search_still_answers(found, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("no space left")
    before = found("the dog")
    monkeypatch.setattr(search, "write_vectors", full)
    monkeypatch.setattr(search, "encoder_sha256", lambda folder: "another")
    assert found("the dog") == before


def test_the_similarity_of_two_sentences_is_their_cosine(tiny, vectors, capsys):
    search.main([str(tiny), "--similarity", "the dog", "an owl"])
    x, y = vectors(["the dog", "an owl"]).double()
    assert capsys.readouterr().out == f"{(x @ y / x.norm() / y.norm()).item():.4f}\n"


@pytest.mark.parametrize("arguments, code, said", [
    ([], 2, "expected a corpus and a query"), (["none.txt"], 2, "expected a corpus and a query"),
    (["none.txt", "--similarity", "a", "b", "--queries", "c"], 2, "expected a corpus and a query"),
    (["none.txt", " "], 2, "expected a sentence in UTF-8, found ' '"),
    (["none.txt", "caf\udce9"], 2, r"expected a sentence in UTF-8, found 'caf\udce9'"),
    (["none.txt", "a"], 3, "none.txt: expected a text file with one sentence a line, found no")])
def test_a_search_for_nothing_or_in_nothing_is_refused(tiny, arguments, code, said, capsys):
    assert refused(search.main, tiny, *arguments) == code and said in capsys.readouterr().err


# ---- the card -------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["cls", "mean", "keep", "normalize"])
def test_the_lines_of_the_card_give_our_vectors_without_mincse(
        how, tiny, corpora, program, tmp_path, monkeypatch):
    for library in ("transformers", "sentence_transformers"):
        pytest.importorskip(library)
    model = load(tiny)
    model.normalize, model.pooling = how == "normalize", "mean" if how != "cls" else "cls"
    save(model, tmp_path / "start")
    settings = {"keep": dict(corpus=corpora[3], pooling="cls"), "cls": dict(pooling="cls")}
    folder = program(encoder=tmp_path / "start", steps=1, **settings.get(how, {}))
    expected = encode(*open_encoder(folder), ["A man plays a guitar."])
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for code in blocks:
        exec(code, names := {})
        assert torch.allclose(torch.as_tensor(names["vectors"]), expected, atol=1e-6), code
    assert len(blocks) == 2


def test_the_card_tells_the_hub_what_is_known_and_the_scores_but_no_path(program, tmp_path):
    card = pytest.importorskip("huggingface_hub").ModelCard.load(program() / "README.md")
    assert card.data.to_dict() == {
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction"]}
    assert "before" in card.text and "after" in card.text and "from tiny on" in card.text
    assert str(tmp_path) not in card.text and str(tmp_path.parent) not in card.text


@pytest.mark.parametrize("encoder, corpus, known", [
    ("bert-base-uncased", "wiki1m", {"language": "en", "base_model": "bert-base-uncased"}),
    ("a/b", "my.txt", {"base_model": "a/b"}), ("mini", "docs", {"language": "en"})])
def test_language_and_base_model_are_said_where_they_are_sure(encoder, corpus, known, tiny,
                                                              tmp_path):
    card = pytest.importorskip("huggingface_hub").ModelCard
    config = type("Config", (), {"encoder": encoder, "corpus": corpus})
    said = card(results.model_card(tmp_path, load(tiny), config, "")).data.to_dict()
    assert {key: said[key] for key in ("language", "base_model") if key in said} == known

"""Bad input: one sentence that says where, what was expected and what was found; never a traceback.

Each case is typed as a user would type it. In these tests any other exception than the program's
own end is a failure, and so is a file outside the output folder.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as packed

import data
import eval_sts
from data import Tokenizer, read_corpus
from engine import hub, run_folder
from engine.encoders import load, read_config
from engine.hub import unpack
from eval_sts import read_test
from papers.corpus import read_vectors
from papers.views import POSITIVES

# Every machine draws the same examples, and none is too slow for the others.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fixed")

NOISE = random.Random(0).randbytes(3000)
CPU = torch.device("cpu")


class Hostile:
    """What a pickle can do to whoever opens it."""

    def __reduce__(self):
        return os.system, ("touch hostile",)


PICKLE = pickle.dumps(Hostile())


def torch_pickle(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    numpy.save(file, array, **options)
    return file.getvalue()


@pytest.fixture
def refused(program, tmp_path, monkeypatch, capsys):
    """refused(flag=file, ...) -> what mincse.py says, after it has left nothing behind."""
    def run(*flags, code=3, **own) -> str:
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            program(*flags, **own)
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == code, said
        assert said.startswith("mincse.py: ") and len(said) < 500
        assert "hostile" not in os.listdir() and sorted(tmp_path.rglob("*")) == before
        return said
    return run


@pytest.fixture
def written(tmp_path):
    """written(name, content) -> the path of such a file."""
    def write(name, content) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name
    return write


# ---- corpus and test ------------------------------------------------------------------------

FINE = "".join(f"word {i}, another {i}\n" for i in range(40)).encode()


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", b"", "expected two rows or more"),
    ("a.txt", NOISE, "a.txt:1: expected UTF-8"),
    ("a.txt", FINE.decode().encode("utf-16"), "a.txt:1: expected UTF-8 text, found a NUL"),
    ("a.txt", FINE + b"caf\xe9\n", "a.txt:41: expected UTF-8, found the byte 0xe9"),
    ("a.txt", b"\xed\xa0\x80\n" * 9, "a.txt:1: expected UTF-8, found the byte 0xed"),
    ("a.txt", PICKLE, "expected UTF-8"),
    ("a.txt", FINE.replace(b"\n", b"\r"), "expected two rows or more"),
    ("a.txt.gz", gzip.compress(FINE, mtime=0)[:-12], "damaged gzip"),
    ("a.txt.gz", gzip.compress(FINE, mtime=0)[:9], "damaged gzip"),
    ("a.csv.gz", gzip.compress(FINE, mtime=0)[:-8] + bytes(8), "damaged gzip"),
    ("a.txt.gz", FINE, "damaged gzip"),
    ("a.csv", FINE + b"one\n", "a.csv:41: expected 2 columns, found 1"),
    ("a.csv", FINE + b'"open, never closed\n', "damaged csv"),
    ("a.csv", b"a,b\n" + b"x" * 10_000_000, "a.csv:2: damaged csv"),
    ("a.tsv", FINE, "a.tsv:1: expected 2 or 3 columns, found 1"),
    ("a.tsv", b"x" * 10_000_000 + b"\na\tb\n", "a.tsv:1: expected 2 or 3 columns, found 1"),
    ("a.zip", FINE, "expected a name in .txt, .csv, .tsv or .jsonl"),
])
def test_a_damaged_corpus(name, content, said, refused, written):
    assert said in refused(corpus=written(name, content))


@pytest.mark.parametrize("content, said", [
    (b"", "expected pairs whose scores differ, as their ranks are compared, found 0"),
    (b"a\tb\t1\n", "found 1 pairs"),
    (b"a\tb\t3\nc\td\t3\n", "found 2 pairs"),
    (NOISE, ":1: expected UTF-8"),
    ("a\tb\t1\n".encode("utf-16"), ":1: expected UTF-8"),
    (b"a\0b\tc\t1\n", ":1: expected UTF-8 text, found a NUL"),
    (b"a\tb\t1\nc\td\tnan\n", ":2: expected two sentences and a score"),
    (b"a\tb\t1\nc\td\tinf\n", ":2: expected two sentences and a score"),
    (b"a\tb\t1\nc\t \t2\n", ":2: expected two sentences and a score"),
    (b"a\tb\t1\nc\td\t3,5\n", ":2: expected two sentences and a score"),
    (b"a\tb\t1\nc\t", ":2: expected at least 3 columns"),
    (b"a\tb\t1\na\tb\n", ":2: expected at least 3 columns"),
    (b"x" * 10_000_000, ":1: expected at least 3 columns"),
])
@pytest.mark.parametrize("flag", ["test", "dev"])
def test_a_damaged_file_of_pairs(flag, content, said, refused, written):
    assert said in refused(**{flag: written("pairs.tsv", content)})


def test_where_there_is_no_file_or_a_folder_that_is_said(refused, tmp_path):
    (tmp_path / "folder.tsv").mkdir()
    assert "expected a file of scored pairs, found nothing" in refused(test=tmp_path / "no.tsv")
    assert "pairs, found a folder" in refused(test=tmp_path / "folder.tsv")
    assert "found a folder there" in refused(corpus=tmp_path / "folder.tsv")
    assert "the encoder a\0b" in refused(encoder="a\0b")


@pytest.mark.parametrize("name, said", [("sts-dev.csv", "expected 1500 scored pairs, found 1"),
                                        ("sts-test.csv", "found nothing there")])
def test_a_damaged_copy_of_senteval(name, said, refused, tmp_path):
    folder = tmp_path / "data" / "senteval" / "downstream" / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    (folder / "sts-dev.csv").write_text("g\tf\ty\ti\t2.5\tone\tother\n")
    split = {"dev": "stsb"} if "dev" in name else {"test": "stsb"}
    assert name in refused(data=tmp_path / "data", **split)
    assert said in refused(data=tmp_path / "data", **split)


def test_the_other_program_says_the_same(written, tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_sts.main([str(tiny), "--test", str(written("pairs.tsv", b"a\tb\tnan\n"))])
    assert ended.value.code == 3
    assert ":1: expected two sentences and a score" in capsys.readouterr().err


# ---- an encoder -----------------------------------------------------------------------------

def edited(**new):
    """The same settings but for these."""
    return lambda content: json.dumps(json.loads(content) | new).encode()


def tensor(change):
    """The same tensors but for the first layer norm's bias; without it where that is None."""
    def make(content):
        from safetensors.torch import load as unpacked
        tensors = unpacked(content)
        tensors["embeddings.LayerNorm.bias"] = change(tensors["embeddings.LayerNorm.bias"])
        return packed({name: x for name, x in tensors.items() if x is not None})
    return make


def modules(*wrong):
    return lambda content: json.dumps(wrong).encode()


def vocabulary(change):
    def make(content):
        tokenizer = json.loads(content)
        words = tokenizer["model"]["vocab"]
        tokenizer["model"] |= change(words)
        return json.dumps(tokenizer).encode()
    return make


def half(content):
    return content[: len(content) // 2]


def always(content):
    return lambda _: content


TRANSFORMER = {"type": "Transformer", "path": ""}


@pytest.mark.parametrize("name, change, said", [
    *[(name, change, said) for name, said in [
        ("config.json", "config.json is damaged"),
        ("modules.json", "modules.json is damaged"),
        ("1_Pooling/config.json", "config.json is damaged"),
        ("tokenizer.json", "tokenizer.json is damaged"),
        ("model.safetensors", "model.safetensors is damaged"),
    ] for change in (half, always(b""), always(NOISE), always(PICKLE), always(b"[" * 100_000))],
    ("config.json", always(b"[1]"), "expected settings of an encoder, found [1]"),
    ("config.json", edited(hidden_size=-32), "hidden_size to be 1 or more, found -32"),
    ("config.json", edited(num_attention_heads=-4), "num_attention_heads to be 1 or more"),
    ("config.json", edited(hidden_size=10**12), "as config.json implies"),
    ("config.json", edited(vocab_size=10**30), "as config.json implies"),
    ("config.json", edited(num_hidden_layers=10**9), "as config.json implies"),
    ("config.json", edited(max_position_embeddings=10**12), "as config.json implies"),
    ("config.json", edited(hidden_size="32"), "expected hidden_size (int), found 32"),
    ("config.json", edited(pad_token_id=10**6), "pad_token_id to be a number below vocab_size"),
    ("config.json", edited(hidden_dropout_prob=2.), "hidden_dropout_prob to be from 0 to 1"),
    ("config.json", edited(layer_norm_eps=float("nan")), "layer_norm_eps to be above 0"),
    ("config.json", edited(hidden_act="os.system"), "hidden_act to be gelu"),
    ("config.json", edited(model_type="gpt2"), "model_type to be bert or roberta"),
    ("model.safetensors", always(torch_pickle({"a": Hostile()})), "is damaged"),
    ("model.safetensors", tensor(lambda x: x[1:].clone()), "of shape [32], found [31]"),
    ("model.safetensors", tensor(lambda x: x / 0), "expected finite numbers"),
    ("model.safetensors", tensor(lambda x: x.int()), "expected floating-point numbers"),
    ("model.safetensors", tensor(lambda x: None), "['embeddings.LayerNorm.bias'] missing"),
    ("tokenizer.json", always(b"{}"), "expected a normalizer of type BertNormalizer"),
    ("tokenizer.json", vocabulary(lambda words: {"vocab": {w: -i for w, i in words.items()}}),
     "expected a tokenizer of Hugging Face's"),
    ("tokenizer.json", vocabulary(lambda words: {"vocab": {w: i + 99 for w, i in words.items()}}),
     "expected ids below the encoder's 16384, found 16482"),
    ("tokenizer.json", vocabulary(lambda _: {"unk_token": "nowhere"}),
     "expected a tokenizer of Hugging Face's"),
    ("modules.json", modules(1, 2), "expected modules with a type and a path, found 1"),
    ("modules.json", modules(TRANSFORMER, {"type": "Pooling"}), "a type and a path"),
    ("modules.json", modules(TRANSFORMER, {"type": "os.system", "path": "x"}), "expected one of"),
    ("sentence_bert_config.json", edited(max_seq_length=-5), "max_seq_length to be 3 or more"),
    ("sentence_bert_config.json", edited(max_seq_length="x"), "max_seq_length to be 3 or more"),
    ("1_Pooling/config.json", always(b'{"pooling_mode": {"a": 1}}'), "expected cls or mean"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_encoder(name, change, said, refused, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "broken")
    (folder / name).write_bytes(change((tiny / name).read_bytes()))
    assert said in refused(encoder=folder)


# ---- a teacher ------------------------------------------------------------------------------

ROWS = numpy.random.default_rng(0).standard_normal((64, 8)).astype("f4")


@pytest.mark.parametrize("name, content, said", [
    ("t.npy", b"", "expected an array of numbers"),
    ("t.npy", NOISE, "expected an array of numbers"),
    ("t.npy", npy(ROWS)[:-9], "expected an array of numbers"),
    ("t.npy", npy(ROWS).replace(b"(64, 8)", b"(64, 8."), "expected an array of numbers"),
    ("t.npy", PICKLE, "expected an array of numbers"),
    ("t.npy", npy(numpy.array([Hostile()] * 64), allow_pickle=True), "expected an array"),
    ("t.npy", npy(numpy.array(["a"] * 64)), "expected an array of numbers"),
    ("t.npy", npy(ROWS.astype(">f4")), "expected an array of numbers"),
    ("t.npy", npy(ROWS[1:]), "expected (64, D) floats"),
    ("t.npy", npy(ROWS[:, 0].copy()), "expected (64, D) floats"),
    ("t.npy", npy(ROWS.astype("i4")), "found (64, 8) in int32"),
    ("t.npy", npy(ROWS * (numpy.arange(64) != 7)[:, None]), "row 7, counted from 0, is zero"),
    ("t.npy", npy(ROWS * numpy.nan), "row 0, counted from 0, is zero or not finite"),
])
def test_a_damaged_teacher(name, content, said, refused, written):
    assert said in refused(method="kdmcse", teacher=written(name, content))


# ---- the folder of a run --------------------------------------------------------------------

@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """Keeps what the first test made, for all that follow."""
    return tmp_path_factory.mktemp("half") / "run"


@pytest.fixture
def resumable(half_done, program, stopped, tmp_path, sentences, pairs):
    """A run of four steps, stopped after two, and the command line's `out`."""
    if not half_done.exists():
        stopped(2, program)
        shutil.copytree(tmp_path / "run", half_done)
        shutil.rmtree(tmp_path / "run")
    return shutil.copytree(half_done, tmp_path / "run")


def state(**new):
    """The same state but for these parts; a function makes one of what it was."""
    def make(path):
        saved = torch.load(path, weights_only=True)
        return torch_pickle(saved | {name: value(saved[name]) if callable(value) else value
                                     for name, value in new.items()})
    return make


def cut_moments(optimizer):
    return optimizer | {"state": {number: {name: x[:1] if x.ndim else x for name, x in own.items()}
                                  for number, own in optimizer["state"].items()}}


def one_bit_off(content):
    """In the middle, so within a tensor: torch would take it."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("name, change", [
    *[(name, lambda path, content=content: content) for name in ("state.pt", "args.json")
      for content in (b"", NOISE, PICKLE, b"[" * 100_000)],
    *[(name, lambda path: path.read_bytes()[:-50]) for name in ("state.pt", "args.json")],
    ("args.json", lambda path: b'{"config": [], "sources": {}, "command": "x"}'),
    ("results.json", lambda path: b""),
    ("results.json", lambda path: b"[]"),
    ("state.pt", lambda path: torch_pickle({"state": Hostile()})),
    ("state.pt", lambda path: torch_pickle([1])),
    ("state.pt", lambda path: one_bit_off(path.read_bytes())),
    ("state.pt", state(networks={})),
    ("state.pt", state(networks=lambda own: {name: x[:1] for name, x in own.items()})),
    ("state.pt", state(state=lambda own: own | {"step": "2"})),
    ("state.pt", state(state=lambda own: own | {"step": -2})),
    ("state.pt", state(state=lambda own: own | {"before": {}})),
    ("state.pt", state(optimizer={})),
    ("state.pt", state(optimizer=cut_moments)),
])
def test_a_damaged_run_does_not_go_on(name, change, resumable, refused):
    (resumable / name).write_bytes(change(resumable / name))
    said = refused("--resume")
    assert f"{name}: expected" in said and said.endswith("start again with --overwrite")


@pytest.mark.parametrize("content", [b"", NOISE, b"[]\n", b"{}\n", b'x}\n{"step": "1"}\n', b'{"st'])
def test_a_damaged_log_loses_its_damaged_lines_only(content, resumable, program):
    kept = json.dumps({"step": 1, "loss": .5}) + "\n"
    (resumable / "metrics.jsonl").write_bytes(kept.encode() + content)
    lines = (program("--resume") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_a_run_folder_that_is_a_file_is_refused(refused, written, tmp_path):
    assert "expected a folder, found a file" in refused(code=2, out=written("run", b"a file"))


# ---- an archive -----------------------------------------------------------------------------

def archive(*members) -> bytes:
    """A tar of (name, kind)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 2000 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(bytes(2000)))
    return file.getvalue()


GOOD = archive(("d/STS/a.txt", tarfile.REGTYPE), ("d/SICK/b.txt", tarfile.REGTYPE))


@pytest.mark.parametrize("content, said", [
    *[(content, "damaged") for content in (
        b"", NOISE, PICKLE, GOOD[:1000], b"x" * 512 + GOOD, gzip.compress(GOOD, mtime=0)[:-30],
        bz2.compress(GOOD)[:60] + bytes(40), lzma.compress(GOOD)[:80] + bytes(40),
        archive(("d", tarfile.REGTYPE), ("d/x", tarfile.REGTYPE)),
        archive(("d/x", tarfile.REGTYPE), ("d", tarfile.REGTYPE)))],
    *[(archive(("d/STS/a.txt", tarfile.REGTYPE), member), "expected plain files") for member in (
        ("../evil", tarfile.REGTYPE), ("d/../../evil", tarfile.REGTYPE),
        ("/tmp/evil", tarfile.REGTYPE), ("d/link", tarfile.SYMTYPE), ("d/link", tarfile.LNKTYPE),
        ("d/pipe", tarfile.FIFOTYPE), ("d/disk", tarfile.BLKTYPE))],
    (bytes(10240), "expected folders STS and SICK side by side, found none"),
    (archive(("readme", tarfile.REGTYPE)), "expected folders STS and SICK side by side"),
    (GOOD, "sts-test.csv: expected a file of scored pairs, found nothing there"),
])
def test_a_damaged_archive_of_tests(content, said, written, tmp_path, monkeypatch, tiny, capsys):
    (tmp_path / "cache").mkdir()
    tar = written("cache/senteval.tar", content)
    monkeypatch.setattr(hub, "from_hub", lambda name, tried="": tar)
    monkeypatch.delenv("MINCSE_DATA", raising=False)
    with pytest.raises(SystemExit) as ended:
        eval_sts.main([str(tiny), "--test", "stsb"])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 3 and len(lines) == 1 and said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# ---- whatever comes in ----------------------------------------------------------------------

DOCUMENTED = (ValueError, FileNotFoundError)                      # what the programs end with
LINE = st.text(st.characters(exclude_characters="\n\0\ufeff", exclude_categories=["Cs"]))
WORDS = LINE.map(str.strip).filter(bool)


def read_or_refuse(read, path: Path, content: bytes, *others):
    """What the reader makes of it, or None where it says in one sentence what is wrong."""
    path.write_bytes(content)
    try:
        return read(path if read in (unpack, read_vectors) else str(path), *others)
    except DOCUMENTED as error:
        assert path.name in str(error) and "\n" not in str(error)
        return None


@given(st.binary(max_size=300))
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.txt.gz", "a.csv.gz"])
def test_any_bytes_are_a_corpus_of_two_rows_or_more_or_refused(name, tmp_path_factory, content):
    found = read_or_refuse(read_corpus, tmp_path_factory.getbasetemp() / name, content)
    if found is not None:
        assert len(found) >= 2 and all(text.strip() == text != "" for column in found.columns
                                       for text in column)


@given(st.lists(st.one_of(WORDS, st.just("")), max_size=20))
def test_sentences_and_documents_come_back_as_they_were_written(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "round.txt"
    found = read_or_refuse(read_corpus, path, "\n".join(lines).encode())
    kept = [line for line in lines if line]
    assert (found.columns == [kept]) if found else len(kept) < 2
    if found:
        numbers, seen = [], 0
        for before, line in zip(["x", *lines], lines):
            seen += bool(line and not before and numbers)
            numbers += [seen] if line else []
        assert list(found.documents or []) == (numbers if numbers[-1] else [])


@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=9))
def test_pairs_written_by_the_csv_module_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    assert list(zip(*read_corpus(str(path)).columns)) == rows


@given(st.one_of(st.binary(max_size=200),
                 st.lists(st.tuples(LINE, LINE, st.one_of(st.floats().map(str), LINE)), max_size=5)
                 .map(lambda rows: "\n".join(map("\t".join, rows)).encode())))
def test_any_bytes_are_a_test_of_finite_scores_or_refused(tmp_path_factory, content):
    found = read_or_refuse(read_test, tmp_path_factory.getbasetemp() / "any.tsv", content)
    if found is not None:
        pairs = found.tasks["any"]["any"]
        assert all(left and right and abs(score) < float("inf") for left, right, score in pairs)


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("name", ["config.json", "modules.json", "sentence_bert_config.json",
                                  "1_Pooling/config.json", "model.safetensors", "tokenizer.json"])
def test_an_encoder_with_some_bytes_changed_loads_or_is_refused(name, tiny, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny, folder)
    content = bytearray((tiny / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(
            st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        assert load(folder).pooling in ("cls", "mean") and Tokenizer.read(folder).vocab_size
    except DOCUMENTED as error:
        assert str(folder) in str(error)


SETTING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                    st.lists(st.integers(), max_size=2))


@given(st.dictionaries(st.sampled_from(["hidden_size", "num_attention_heads", "vocab_size",
                                        "pad_token_id", "hidden_dropout_prob", "layer_norm_eps",
                                        "hidden_act", "model_type", "type_vocab_size"]), SETTING,
                       min_size=1))
def test_settings_of_any_kind_make_an_encoder_or_are_refused(tiny, tmp_path_factory, own):
    folder = tmp_path_factory.getbasetemp() / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(edited(**own)((tiny / "config.json").read_bytes()))
    try:
        config = read_config(folder)
    except DOCUMENTED as error:
        assert "config.json" in str(error)
    else:
        assert config.width % config.heads == 0 <= config.pad_id < config.vocab_size


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_the_vectors_of_a_teacher_or_refused(tmp_path_factory, tail, header):
    path = tmp_path_factory.getbasetemp() / "t.npy"
    corpus = data.Corpus("two", [["one", "two"]], None, "", 0)
    content = npy(ROWS)[:80] * header + tail
    found = read_or_refuse(read_vectors, path, content, corpus)
    assert found is None or found.shape[0] == 2


@given(st.binary(max_size=600), st.integers(0, len(GOOD)))
def test_any_bytes_are_an_archive_or_refused_and_stay_inside(tmp_path_factory, noise, at):
    box = tmp_path_factory.mktemp("box")
    content = GOOD[:at] + noise + GOOD[at + len(noise):]
    read_or_refuse(unpack, box / "a.tar", content, box / "in")
    assert {path.name for path in box.iterdir()} <= {"a.tar", "in"}


@given(st.text(max_size=40), st.floats(allow_nan=True))
def test_a_line_of_the_log_has_a_step_or_none(text, number):
    for line in (text, json.dumps({"step": text}) + "\n", json.dumps({"step": number}) + "\n"):
        assert run_folder.step_of(line) == float("inf")
    assert run_folder.step_of('{"step": 3}\n') == 3


# ---- text views -----------------------------------------------------------------------------

@given(WORDS, st.integers(0, 9), st.sampled_from([0., .1, .5, .99]))
@pytest.mark.parametrize("view", POSITIVES)
def test_any_text_stays_a_text_of_its_own_words(view, text, seed, rate):
    change = POSITIVES[view]
    options = {} if view == "dropout" else {"rate": rate}
    found = change(text, random.Random(seed), **options)
    assert found.strip() and found == change(text, random.Random(seed), **options)
    known = {word.casefold() for word in text.split()}
    assert all(word.casefold() in known or view.startswith("switch") for word in found.split())


@given(WORDS, st.integers(0, 9))
def test_switching_case_changes_first_letters_and_a_rate_of_zero_only_white_space(text, seed):
    found = POSITIVES["switch-case"](text, random.Random(seed), rate=.5)
    assert [word[1:] for word in found.split()] == [word[1:] for word in text.split()]
    for view in ("crop", "delete-words", "swap-words"):
        assert POSITIVES[view](text, random.Random(0), rate=0.) == " ".join(text.split())
    assert POSITIVES["switch-case"](text, random.Random(0), rate=0.) == text


@given(st.lists(WORDS, min_size=1, max_size=9), st.integers(3, 12))
def test_any_text_has_tokens_between_the_special_ones(tiny_tokenizer, texts, most):
    ids, mask = tiny_tokenizer(texts, max_tokens=most)
    assert ids.shape == mask.shape and 2 <= ids.shape[1] <= most
    assert (ids[~mask] == tiny_tokenizer.pad_id).all() and mask[:, 0].all()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny):
    return Tokenizer.read(tiny)

"""Tests import the flat modules beside this folder and never reach the network."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")       # toys are slower on two; read as torch starts

import pytest                                                     # noqa: E402
import torch                                                      # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
READING_ORDER = """
    losses model data views eval_sts simcse focal is_cse sscl cards kdmcse diffcse twins ifnd
    core_tuning debcse infocse pnr fedrcl sparsecse corpus settings papers claims tour exercises
    mincse program search changes pieces resume damage gpu hub docs mini pretrain report
    bench speed_exactness house""".split()


def pytest_addoption(parser):
    parser.addoption("--other-precision", action="store_true",
                     help="make `auto` choose the precision that it does not choose here")


def pytest_configure(config):
    if config.getoption("--other-precision"):
        from engine.flags import wants_bf16
        found = not wants_bf16("auto", torch.device("cpu"))
        torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: found


def pytest_collection_modifyitems(items):
    """`pytest -v tests` is a table of contents; files that the reading order lacks come last."""
    place = {f"test_{name}.py": number for number, name in enumerate(READING_ORDER)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def make_tiny(folder: Path, **more) -> Path:
    from engine.encoders import read_config, save
    from model import Encoder, SentenceEncoder
    shutil.copytree(ROOT / "mini", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, **more}
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    files = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    save(SentenceEncoder(Encoder(read_config(folder)), pooling="cls", files=files), folder)
    return folder


def ready(flags: dict, **changed):
    """A job before its first step, and the loop that takes its steps."""
    import mincse
    inputs = mincse.read_inputs(flags)
    job = mincse.build(inputs, replace(inputs.config, **changed))
    job.method.prepare(job.encode_corpus)
    if job.method.in_turn:
        job.method.remember(job.model)                            # as in its second task
    return job, mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1)


def at(*degrees):
    """Unit vectors at these angles: (B, 2)."""
    turns = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1)


def resolved(method="simcse", model_type="bert", width=768, columns=1, **given):
    """The settings that a paper trains an encoder of this kind with."""
    from model import EncoderConfig
    from papers import METHODS
    from papers.settings import resolve
    shape = EncoderConfig(model_type, 100, width, 12, 12, 4 * width)
    return resolve(METHODS[method], given | {"method": method}, shape, columns=columns)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A BERT of 2 layers x 32, random weights, the tokenizer of `mini`: trains in moments."""
    return make_tiny(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="session")
def lm(tiny, tmp_path_factory):
    """The tiny encoder with a masked-LM head beside it: what a pre-trained folder looks like."""
    from engine.encoders import MASKED_LM, load, read, translate
    from engine.files import write
    from model import MaskedLMHead
    folder = tmp_path_factory.mktemp("encoders") / "lm"
    shutil.copytree(tiny, folder)
    torch.manual_seed(0)
    model = load(tiny)
    head = MaskedLMHead(model.config, model.encoder.words.weight).state_dict()
    del head["words"]
    path = folder / "model.safetensors"
    write(path, read(path) | translate(head, MASKED_LM["bert"]))
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny, tmp_path_factory):
    """The tiny encoder with a masked-LM head, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoders") / "tiny-lm"
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(tiny))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with Wikipedia and the STS sets, where this machine has one."""
    if not (folder := os.environ.get("MINCSE_DATA")):
        pytest.skip("MINCSE_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A corpus of 64 sentences that differ."""
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    who = ["the dog", "a cat", "my owl", "an elk", "one bee", "her cow", "no ant", "that fox"]
    does = ["runs home", "sees us", "eats bread", "reads books", "sings well", "sleeps", "digs",
            "waits here"]
    path.write_text("".join(f"{a} {b}.\n" for a in who for b in does))
    return path


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict:
    """48 rows of 1, 2 and 3 columns, the sentences in documents of six; and 48 sentences more."""
    folder = tmp_path_factory.mktemp("corpora")
    who, does = ["dog", "cat", "owl", "elk", "bee", "cow", "ant", "fox"], [
        "runs home by night", "sees us and him", "eats bread with milk", "reads two books here",
        "sings well for me", "digs all day long"]
    columns = [[f"{word} {a} {b}." for a in who for b in does] for word in ("the", "an old", "no")]
    documents = [columns[0][row : row + 6] for row in range(0, 48, 6)]
    (folder / "1.txt").write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n")
    for width in (2, 3):
        (folder / f"{width}.tsv").write_text("".join(map("{}\n".format, map(
            "\t".join, zip(*columns[:width])))))
    (folder / "later.txt").write_text("".join(f"later {text}\n" for text in columns[0]))
    return {1: folder / "1.txt", 2: folder / "2.tsv", 3: folder / "3.tsv",
            "later": folder / "later.txt"}


@pytest.fixture(scope="session")
def given(lm, tiny, corpora, pairs):
    """given(method, ...) -> settings with which a paper runs on toys, as its page says."""
    from papers import METHODS

    def settings(method="simcse", *, columns=0, **more) -> dict:
        page = METHODS[method]
        corpus = str(corpora[columns or page.columns_taken[0]])
        found = {"method": method, "encoder": str(lm), "test": str(pairs), "batch_size": 8,
                 "steps": 4, "corpus": [corpus, str(corpora["later"])] if page.in_turn else corpus}
        teacher = {"teacher": str(tiny)} if "teacher" in page.toy else {}
        return found | page.toy | teacher | more
    return settings


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A test of four scored pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("the dog runs\ta dog runs home\t4.8\nmy owl sees us\tan owl looks at us\t4.2\n"
                    "one bee digs\ther cow waits\t1.5\nno ant sleeps\ta fox reads books\t0.3\n")
    return path


@pytest.fixture
def program(tiny, sentences, pairs, tmp_path, monkeypatch):
    """Runs mincse.py in this process on the tiny things: program(steps=3, ...) -> its folder."""
    import mincse

    def run(*flags, out="run", **settings) -> Path:
        settings = {"encoder": tiny, "corpus": sentences, "test": pairs, "batch_size": 8,
                    "steps": 4, "out": tmp_path / out} | settings
        argv = [text for name, value in settings.items()
                if value is not None for text in ("--" + name.replace("_", "-"), str(value))]
        monkeypatch.setattr(sys, "argv", ["mincse.py", *argv, *flags])
        mincse.main([*argv, *flags])
        return tmp_path / out
    return run


@pytest.fixture
def stopped(monkeypatch):
    """stopped(step, run, ...): runs it, and a SIGINT comes when that step has been taken."""
    from engine import run_folder

    def stop(step, run, *flags, **settings) -> int:
        add, taken = run_folder.Log.add, []

        def add_and_stop(log, loss, **facts):
            taken.append(loss)
            if len(taken) == step:
                signal.raise_signal(signal.SIGINT)
            add(log, loss, **facts)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(run_folder.Log, "add", add_and_stop)
            run(*flags, **settings)
        return ended.value.code
    return stop


@pytest.fixture
def stopped_in_turn(monkeypatch):
    """The same for a paper with a loop of its own around `train`: the steps of all turns count."""
    import mincse

    def stop(step, run, *flags, **settings) -> int:
        train, taken = mincse.train, []

        def train_and_stop(*arguments, **more):
            for found in train(*arguments, **more):
                taken.append(found)
                if len(taken) == step:
                    signal.raise_signal(signal.SIGINT)
                yield found
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(mincse, "train", train_and_stop)
            run(*flags, **settings)
        return ended.value.code
    return stop

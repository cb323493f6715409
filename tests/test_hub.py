"""The Hub: what it has, what it has not, and what could not be asked; by its real client."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from conftest import ROOT
from engine.hub import HUB_DATASET, encoder_folder

DATASET = f"/datasets/{HUB_DATASET}/resolve/main"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does, from a dict of files; everything else is not found.

    A number in place of a file is the status with which this Hub fails to answer.
    """
    files: dict[str, bytes | int] = {}

    def do_GET(self):
        body = self.files.get(self.path, 404)
        status, body = (200, body) if isinstance(body, bytes) else (body, None)
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0de")
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Ask data.py, in a fresh process whose Hub holds these files, what an expression is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(expression, files, **environment):
        FakeHub.files = files
        script = ("import time; slept = []; time.sleep = slept.append\n"   # retries without pauses
                  "import json, data\nfrom engine.hub import *\n"
                  "from huggingface_hub import hf_hub_download\n"
                  "def said(name):\n    try: return str(encoder_folder(name))\n"
                  "    except (ValueError, FileNotFoundError) as error: return str(error)\n"
                  f"try: print(json.dumps({expression}, default=str))\n"
                  "except (ValueError, FileNotFoundError) as error: print(json.dumps(str(error)))")
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(tmp_path / "hf"), "MINCSE_DATA": "", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                              text=True, env={**os.environ, **address, **environment})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield ask
    server.shutdown()
    server.server_close()


def test_a_corpus_comes_from_the_hub_once_and_then_from_its_cache(hub):
    files = {f"{DATASET}/wiki1m_for_simcse.txt": b"one\ntwo\n"}
    assert hub("list(data.read_corpus('wiki1m').columns[0])", files) == ["one", "two"]
    assert hub("list(data.read_corpus('wiki1m').columns[0])", {}, HF_HUB_OFFLINE="1") == [
        "one", "two"]


PLAIN = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b""}


def modules(*paths) -> bytes:
    """A modules.json whose modules lie in these folders."""
    kinds = ["Transformer", "Pooling", "Dense"]
    return json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": path}
                       for kind, path in zip(kinds, paths)]).encode()


def repositories(**files) -> dict:
    """What the Hub holds where it has these encoders: owl/NAME -> its files."""
    return {f"/owl/{name}/resolve/main/{file}": content
            for name, its_own in files.items() for file, content in its_own.items()}


LAYOUTS = {
    "plain": PLAIN,
    "modules": PLAIN | {
        "modules.json": modules("", "1_Pooling", "2_Dense"), "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}", "2_Dense/model.safetensors": b""},
    "early": {"config.json": b"{}", "modules.json": modules("0_BERT", "1_Pooling"),
              "1_Pooling/config.json": b"{}", **{f"0_BERT/{name}": x for name, x in PLAIN.items()}},
    "words": {"config.json": b"{}", "vocab.txt": b"", "model.safetensors": b"",
              "tokenizer_config.json": b""},
    "merges": {"config.json": b"{}", "vocab.json": b"", "merges.txt": b"",
               "model.safetensors": b""},
    "shards": {"config.json": b"{}", "tokenizer.json": b"", "a.safetensors": b"",
               "b.safetensors": b"", "model.safetensors.index.json":
               b'{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}'},
    "adapter": {"adapter_config.json": b"{}"},
}


def test_an_encoder_comes_from_the_hub_with_all_that_it_has(hub):
    found = hub(f"[encoder_folder('owl/' + name) for name in {[*LAYOUTS]}]",
                repositories(**LAYOUTS))
    for folder, files in zip(map(Path, found), LAYOUTS.values()):
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")
                if path.is_file()} == files.keys()


def test_an_encoder_in_the_cache_waits_for_an_unreachable_hub_at_most_once(hub):
    there = hub("encoder_folder('owl/plain')", repositories(plain=PLAIN))
    again, slept = hub("(encoder_folder('owl/plain'), slept)", {},
                       HF_ENDPOINT="http://127.0.0.1:9")
    assert again == there and sum(slept) < 40                   # seconds it would have slept


def test_the_file_that_a_repository_lacks_is_named_and_a_pickle_comes_with_the_way_on(hub):
    lacks = {name.split(".")[0]: PLAIN | {name: 404} for name in PLAIN}
    files = repositories(**lacks, pickled=PLAIN | {"model.safetensors": 404,
                                                   "pytorch_model.bin": b""})
    *errors, pickled = hub(f"[said('owl/' + name) for name in {[*lacks, 'pickled']}]", files)
    for name, error in zip(PLAIN, errors):
        assert f"its repository on the Hub has no {name}; choose another" in error
        assert "--encoder FOLDER" in error and "HF_TOKEN" not in error
    assert "no model.safetensors, but pytorch_model.bin, a pickle" in pickled
    assert "snapshot_download as s; s('owl/pickled', local_dir='FOLDER')" in pickled


def test_a_file_that_the_hub_could_not_be_asked_about_is_not_taken_for_none(hub):
    """A missing modules.json means that no pooling is stated; a Hub that is down means nothing."""
    whole = PLAIN | {"modules.json": modules("", "1_Pooling")}
    down = ["modules.json", "tokenizer_config.json", "1_Pooling/config.json"]
    files = repositories(**{f"e{i}": whole | {file: 500} for i, file in enumerate(down)})
    errors = hub("[said(f'owl/e{i}') for i in range(3)]", files)
    for i, file in enumerate(down):
        assert f"whether the encoder owl/e{i} has a {file}: not " in errors[i]
        assert "500" in errors[i]


def test_offline_the_cache_of_another_library_may_lack_what_says_how_to_pool(hub):
    """AutoModel and AutoTokenizer never ask for modules.json; ours, which asks, can go offline."""
    fetch = "[hf_hub_download('owl/theirs', file) for file in {}] + [encoder_folder('owl/ours')]"
    theirs, *_, ours = hub(fetch.format([*PLAIN]), repositories(theirs=PLAIN, ours=PLAIN))
    error, again = hub("[said('owl/theirs'), said('owl/ours')]", {}, HF_HUB_OFFLINE="1")
    assert "whether the encoder owl/theirs has a tokenizer_config.json: not" in error
    assert f"--encoder {Path(theirs).parent} to do" in error      # the way on: as it lies there
    assert again == ours


@pytest.mark.parametrize("name", ["./mine/", "../mine", "/mine/it", "mine/", "~/mine", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name):
    with pytest.raises(FileNotFoundError) as refused:
        encoder_folder(name)
    assert str(refused.value) == (f"the encoder {name}: expected a folder, mini, or a Hub id such "
                                  "as bert-base-uncased, found no such folder")


def test_a_client_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="expected huggingface_hub 0.25 or newer"):
        encoder_folder("owl/bert")


@pytest.mark.parametrize("environment, reason", [
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
    ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ({}, "404"),
], ids=["unreachable", "offline", "not found"])
def test_without_the_hub_one_sentence_names_the_file_the_variables_and_the_way_out(
        hub, environment, reason):
    error = hub("data.read_corpus('nli')", {}, **environment)
    for word in ("nli_for_simcse.csv", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN",
                 "--data FOLDER", "MINCSE_DATA", reason):
        assert word in error
    assert "\n" not in error


def test_the_test_sets_come_from_the_hub_as_a_tar(hub, tmp_path):
    """That no other file than these is unpacked is in test_damage.py."""
    with tarfile.open(tmp_path / "senteval.tar", "w") as tar:
        for name in ("downstream/STS/a.txt", "downstream/SICK/b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"sts"))
    files = {f"{DATASET}/senteval.tar": (tmp_path / "senteval.tar").read_bytes()}
    folder = hub("senteval_folder(None)", files)
    assert (Path(folder) / "STS" / "a.txt").read_bytes() == b"sts"
    assert (Path(folder) / "SICK" / "b.txt").is_file()

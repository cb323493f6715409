"""
On a GPU: the processor's numbers, as far as rounding lets them, and no step that waits.

Skipped without CUDA. A simulated GPU, which computes on the processor and counts what a real one
would be asked for, may stand in: what only a real one has, such as memory, is then skipped.
"""

import re
import sys
from collections import Counter
from functools import partial
from itertools import islice
from statistics import median

import pytest
import torch
import torch.nn.functional as F

import mincse
from conftest import make_tiny, ready
from data import Tokenizer
from engine.encoders import load, save_masked_lm
from model import MaskedLMHead
from papers.corpus import kmeans, nearest_others
from test_papers import KINDS, apart, gradients
from tools import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SIMULATED = sys.modules.get("pretend_gpu")
real = pytest.mark.skipif(SIMULATED is not None, reason="for a real GPU")
simulated = pytest.mark.skipif(SIMULATED is None, reason="for a simulated GPU, which counts")
every_kind = pytest.mark.parametrize("flags", KINDS, ids=str)
PLAIN = {"dropout": 0., "precision": "fp32", "pooling": "mean"}   # random [CLS] vectors are equal
ROUNDING = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    if SIMULATED:                                                 # its memory is all the same
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)


# ---- the numbers of a processor -------------------------------------------------------------

@pytest.fixture
def same_masks(monkeypatch):
    """From the same seed a GPU would mask other tokens."""
    mask = Tokenizer.mask
    monkeypatch.setattr(Tokenizer, "mask", lambda self, ids, **how: tuple(
        x.to(ids.device) for x in mask(self, ids.cpu(), **how)))


def losses(flags):
    return [loss.item() for _, loss, _ in ready(flags)[1]]


@every_kind
def test_without_dropout_the_losses_are_the_processors(flags, given, same_masks):
    """Over four steps, with what a method finds before the first one and in between."""
    cpu, gpu = (losses(given(**flags, **PLAIN, device=device)) for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-4)


@real
def test_compiled_it_has_the_same_losses_without_dropout(given):
    plain, compiled = (losses(given(**PLAIN, compile=asked, device="cuda"))
                       for asked in ("no", "yes"))
    assert compiled == pytest.approx(plain, rel=1e-4)


@every_kind
def test_bfloat16_is_close(flags, given):
    exact, rough = (losses(given(**flags, **PLAIN | {"precision": precision}, device="cuda"))
                    for precision in ("fp32", "bf16"))
    assert rough != exact and rough == pytest.approx(exact, rel=.1)


@every_kind
def test_pieces_have_the_gradient_of_the_whole_batch(flags, given):
    usual = given(**flags, **PLAIN, device="cuda")
    found, expected = (gradients(each)[0] for each in (usual | {"micro_batch": 3}, usual))
    assert apart(found, expected) < ROUNDING


def test_vectors_neighbours_and_clusters_are_the_processors(given):
    cpu, gpu = (ready(given(**PLAIN, device=device))[0] for device in ("cpu", "cuda"))
    texts = cpu.inputs.corpus.columns[0]
    torch.testing.assert_close(gpu.encode(texts), cpu.encode(texts), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    x = F.normalize(torch.randn(500, 16), dim=-1)
    for find in (partial(nearest_others, x, 5, chunk=128), partial(kmeans, x, 7, seed=1)):
        found = [find(device=torch.device(device)).cpu() for device in ("cpu", "cuda", "cuda")]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1], found[2])                    # a search again finds the same


@pytest.mark.parametrize("method", ["simcse", "is-cse", "ifnd", "diffcse"])
def test_a_run_goes_on_from_the_very_numbers_that_it_had(
        method, given, program, stopped, monkeypatch, tmp_path):
    """What is promised on a GPU: the next step starts with the same bits. On it goes nearly so."""
    flags = given(method, steps=10, device="cuda", precision="fp32", learning_rate=1e-3)
    whole = program(out="whole", **flags)
    stopped(5, program, **flags)
    saved = torch.load(tmp_path / "run" / "state.pt", map_location="cpu")
    loaded, load_state = [], mincse.run_folder.load_state

    def load_and_look(folder, networks, optimizer):
        state = load_state(folder, networks, optimizer)
        loaded.append({name: x.cpu().clone() for name, x in networks.state_dict().items()})
        return state
    monkeypatch.setattr(mincse.run_folder, "load_state", load_and_look)
    parts = program("--resume", **flags)
    torch.testing.assert_close(loaded[0], saved["networks"], rtol=0, atol=0)
    for name, expected in load(whole).state_dict().items():
        torch.testing.assert_close(load(parts).state_dict()[name], expected, rtol=0, atol=1e-4)


# ---- what a step asks of a GPU --------------------------------------------------------------

@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """As many layers as BERT-base, but narrow, and a masked-LM head."""
    folder = make_tiny(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=12)
    model = load(folder)
    save_masked_lm(model, MaskedLMHead(model.config, model.encoder.words.weight), folder)
    return str(folder)


def asked(flags: dict) -> tuple[float, float, float]:
    """Median syncs and launches of a step, and all syncs of the thread that makes batches."""
    (_, loop), main, worker = ready(flags), [], 0
    for counter in (SIMULATED.SYNCS, SIMULATED.LAUNCHES):
        counter.clear()
    for _ in loop:
        found = Counter()
        for kind in ("SYNCS", "LAUNCHES"):
            counter = getattr(SIMULATED, kind)
            for (thread, *_), times in counter.items():
                found[kind, thread] += times
            counter.clear()
        main.append((found["SYNCS", "main"], found["LAUNCHES", "main"]))
        worker += found["SYNCS", "worker"]
    return *map(median, zip(*main)), worker


@simulated
@every_kind
def test_a_step_waits_at_most_twice_and_simcse_never_in_950_launches_of_twelve_layers(
        flags, given, deep):
    """The goal is 900. The simulation counts 24 conversions of the mask, of whatever kind it is."""
    syncs, launches, of_thread = asked(given(**flags, encoder=deep, precision="bf16", steps=5,
                                             device="cuda"))
    assert of_thread == 0 and syncs <= 2
    if flags == {"method": "simcse"}:
        assert syncs == 0 and launches <= 950


@real
def test_a_real_gpu_agrees_that_no_step_of_simcse_waits(given):
    _, loop = ready(given(device="cuda"))
    next(loop)                                                    # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(loop)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


@real
def test_the_peak_memory_of_a_dry_run_is_that_of_the_run(program, tmp_path, capsys):
    """BERT-base's shape, in GiB: a toy's peak would be rounding."""
    lines = list(islice(bench.doc_sentences(), 4096))
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    flags = {"encoder": bench.make_encoder("bert-base", tmp_path), "batch_size": 64, "steps": 30,
             "corpus": tmp_path / "corpus.txt", "device": "cuda"}
    torch.cuda.reset_peak_memory_stats()
    program("--dry-run", **flags)
    planned = float(re.search(r"peak memory: ([\d.]+) GiB", capsys.readouterr().out)[1])
    torch.cuda.reset_peak_memory_stats()
    program(**flags)
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, rel=.1)

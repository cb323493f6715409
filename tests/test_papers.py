"""What holds for every paper of the menu: it learns or refuses, in pieces too, and goes on."""

import json
import re
import sys
import types
from dataclasses import fields

import pytest
import torch

import mincse
from conftest import ROOT, ready
from engine import pieces
from engine.flags import dashed
from papers import METHODS, every_page, explain, listing, own_settings, parse
from papers.focal import LOSSES
from papers.settings import Config

KINDS = [{"method": method} for method in METHODS] + [
    {"loss": loss} for loss in list(LOSSES)[1:]] + [{"mlm_weight": .1}]


# ---- what goes together ---------------------------------------------------------------------

def makes_sense(method, loss, positives, columns) -> bool:
    """By the page, and by what is so for all: focal has no labels, pairs bring their positives."""
    page = METHODS[method]
    return (columns in page.columns_taken and loss in page.losses_taken
            and positives in page.positives_taken and not (columns == 3 and loss == "focal")
            and not (columns > 1 and positives != "dropout"))


def first_step(flags):
    """Loss of the first step, and the size of the gradient that reached the encoder."""
    job, loop = ready(flags)
    _, loss, _ = next(loop)
    return loss.item(), next(job.model.encoder.parameters()).grad.abs().sum().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("columns", (1, 2, 3))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_with_every_loss_and_corpus_it_learns_or_is_refused_in_a_sentence(
        method, loss, columns, given, capsys):
    for positives in ("dropout", "crop"):
        rate = {"rate": .3} if positives == "crop" else {}
        flags = given(method, columns=columns, loss=loss, positives=positives, **rate)
        if makes_sense(method, loss, positives, columns):
            value, gradient = first_step(flags)
            assert 0 < value < 100 and gradient > 0, positives
        else:
            with pytest.raises(SystemExit) as refused:
                first_step(flags)
            said = capsys.readouterr().err
            assert refused.value.code == 2 and "--" in said and "use " in said, positives


def test_several_corpora_are_for_those_papers_that_learn_in_turn(given, corpora, capsys):
    for method, page in METHODS.items():
        own = str(corpora[page.columns_taken[0]])
        flags = given(method) | {"corpus": own if page.in_turn else [own, str(corpora["later"])]}
        with pytest.raises(SystemExit) as refused:
            mincse.read_inputs(flags)
        said = capsys.readouterr().err
        assert refused.value.code == 2 and "are for pnr: " in said, method


def test_a_weight_on_hard_negatives_is_refused_where_there_are_none(given, capsys):
    with pytest.raises(SystemExit):
        mincse.read_inputs(given(hard_negative_weight=2.))
    assert "has no hard negatives (3 columns)" in capsys.readouterr().err
    assert mincse.read_inputs(given(columns=3, hard_negative_weight=2.))
    assert mincse.read_inputs(given("cards", hard_negative_weight=2.))


# ---- flags ----------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, needs", [
    ({"hardness": .1}, {"loss": "focal"}), ({"rate": .2}, {"positives": "crop"}),
    ({"mlm_rate": .2}, {"mlm_weight": .1}),
    ({"method": "fedrcl", "rounds": 2}, {"clients": 2, "batch_size": 8}),
    ({"method": "cards", "retrieved": 0, "retrieve_from": 3}, {"retrieved": 1})], ids=str)
def test_a_setting_of_what_is_off_is_refused_and_taken_where_it_is_on(typed, needs, given, capsys):
    with pytest.raises(SystemExit) as refused:
        mincse.read_inputs(given(**typed))
    said = capsys.readouterr().err
    assert refused.value.code == 2 and dashed([*typed][-1]) + " belongs to " in said
    assert mincse.read_inputs(given(**typed | needs))


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_of_another_paper_is_refused_by_the_name_of_its_owner(method, capsys):
    own = {f.name for f in own_settings(method)}
    for other in METHODS:
        for f in own_settings(other):
            if f.name in own:
                continue
            for typed in ([dashed(f.name), "1"], [f"{dashed(f.name)}=1"]):
                with pytest.raises(SystemExit) as refused:
                    parse(["--method", method, *typed])
                said = capsys.readouterr().err
                assert refused.value.code == 2
                assert f"{dashed(f.name)} belongs to --method " in said and other in said
                assert f"found --method {method}: leave it out" in said


def test_help_shows_the_shared_flags_and_those_of_the_paper_that_was_named(capsys):
    def shown(*argv):
        with pytest.raises(SystemExit):
            parse([*argv, "--help"])
        return capsys.readouterr().out
    alone = shown()
    assert all(dashed(f.name) + " " in alone for f in fields(Config))
    assert not any(dashed(f.name) + " " in alone for name in METHODS for f in own_settings(name))
    assert "--method NAME --help" in alone and "130 interrupted" in alone
    for name in METHODS:
        text = shown("--method", name)
        assert all(dashed(f.name) + " " in text for f in own_settings(name)), name


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_paper_is_a_flag_and_only_what_is_typed_is_given(method):
    for f in fields(METHODS[method].Config):
        value = "1" if f.name != "method" else method
        for choice in f.metadata["choices"] or ():
            value = str(choice)
        found = vars(parse(["--method", method, dashed(f.name), value]))
        assert found.pop(f.name) == f.type(value) and found.pop("method", method) == method
        assert not any(found.values())


@pytest.mark.parametrize("name", every_page())
def test_a_page_is_explained_by_its_header_settings_and_files_that_exist(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--explain", name])
    module, said = sys.modules[every_page()[name].__module__], capsys.readouterr().out
    assert not ended.value.code and said.startswith(module.__doc__.strip())
    assert all(f"    {dashed(f.name)} {f.default!r}: " in said
               for f in (own_settings(name) if name in METHODS else ()))
    assert all((ROOT / path).is_file() for path in re.findall(r"[\w/]+\.py", said))
    assert listing([name]) in said and f"read {module.__name__.replace('.', '/')}.py" in said


def test_a_formula_is_explained_and_so_is_what_was_run_for_the_study():
    assert "loss = mean_i  -log  exp(l_ii / τ)" in explain("focal")
    assert re.search(r"python mincse.py .*--method cards", explain("cards"))


def test_the_list_has_every_paper_with_source_and_verified_average():
    text = listing()
    assert all(f"--method {name}" in text for name in METHODS)
    for part in ("--loss focal", "papers.sparsecse", "76.25", "81.57", "77.32", "78.30",
                 "2104.08821", "2310.06918", "2305.07424"):
        assert part in text


# ---- a paper of one's own -------------------------------------------------------------------

def test_the_page_in_the_readme_is_a_whole_paper(program, pairs, monkeypatch, capsys):
    """Run as it stands there: with w = 0 it is SimCSE; its flag, help and row come with it."""
    readme = (ROOT / "README.md").read_text()
    page = re.search(r"```python\n(\"\"\"\nBoth ways.*?)```", readme, re.S)[1]
    module = types.ModuleType("papers.both_ways")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(page, "both_ways.py", "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "both-ways", module.BothWays)
    assert len(page.splitlines()) <= 40 and "--method both-ways" in listing()
    settings = {"method": "both-ways", "dev": pairs, "dev_every": 2}
    lines = [json.loads((program(**settings, back_weight=w, out=str(w)) / "metrics.jsonl")
                        .read_text().splitlines()[0]) for w in (0., .5)]
    plain = json.loads((program(out="simcse", dev=pairs, dev_every=2) / "metrics.jsonl")
                       .read_text().splitlines()[0])
    assert lines[0]["loss"] == plain["loss"] != lines[1]["loss"] and lines[1]["back"] > 0


def test_a_page_that_changes_the_views_alone_needs_no_loss_of_its_own(monkeypatch, given):
    class Shout(METHODS["simcse"]):
        Config = Config

        def views(self, rows, rng):
            return [super().views(rows, rng)[0], [self.corpus.columns[0][i].upper() for i in rows]]
    monkeypatch.setitem(METHODS, "shout", Shout)
    assert first_step(given() | {"method": "shout"})[0] > 0


# ---- pieces ---------------------------------------------------------------------------------

# Sums of a few hundred numbers in another order differ by some units of the last place.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def gradients(flags, *, steps=2):
    """Of the last of some steps that change no weight, but fill buffers; what was remembered."""
    job, loop = ready(flags, learning_rate=0., clip=1e9)
    for step, loss, _ in loop:
        if step == steps:
            break
    found = {name: p.grad for name, p in job.networks.named_parameters() if p.grad is not None}
    return found, job.method.state_dict(), loss


def apart(a, b):
    """The largest difference of any gradient, in units of the largest gradient."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a) / max(
        x.abs().max().item() for x in a.values())


@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_pieces_have_the_gradient_of_one_graph_with_the_same_dropout(given, monkeypatch, flags):
    """8 rows in pieces of 3, 3, 2. All that a method remembers is the same, too."""
    found, state, loss = gradients(given(**flags, micro_batch=3))
    monkeypatch.setattr(pieces, "once_more", pieces.seeded)       # the graph of a piece is kept
    expected, expected_state, expected_loss = gradients(given(**flags, micro_batch=3))
    assert apart(found, expected) < ROUNDING and loss == expected_loss
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_without_dropout_pieces_have_the_gradient_of_the_whole_batch(given, flags):
    """In float32: bfloat16 rounds a product of 3 rows otherwise than one of 8."""
    usual = flags | {"dropout": 0., "precision": "fp32",
                     "pooling": "mean"}                           # random [CLS] vectors are equal
    found, _, loss = gradients(given(**usual, micro_batch=3))
    expected, _, expected_loss = gradients(given(**usual))
    assert apart(found, expected) < ROUNDING
    assert loss.item() == pytest.approx(expected_loss.item())


# ---- going on -------------------------------------------------------------------------------

def log(folder):
    """metrics.jsonl but for speed, and for loss: its mean after a stop is of fewer steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("sentences_per_second", "loss")}
            for line in lines]


# Papers that learn in turn go on at a task: their own files stop them.
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].in_turn])
def test_ten_steps_are_five_and_a_resume_and_five_to_the_last_bit(method, given, program, stopped,
                                                                  pairs):
    extra = {"positives": "crop", "mlm_weight": .1} if method == "simcse" else {}
    flags = given(method, steps=10, dev=pairs, dev_every=3, **extra)
    whole = program(out="whole", **flags)
    assert stopped(5, program, out="parts", **flags) == 130
    parts = program("--resume", out="parts", **flags)
    for name in ("model.safetensors", "results.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert log(whole) == log(parts)

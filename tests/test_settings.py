"""What can be set: defaults from the papers' tables, flags that win, values that are refused."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from conftest import resolved
from engine.flags import check_ranges, flag, pick_device, say_limits, seed_list
from engine.run_folder import environment
from papers import METHODS


@pytest.mark.parametrize("model_type, width, columns, expected", [
    ("bert", 768, 1, (64, 3e-5, 1)), ("bert", 1024, 1, (64, 1e-5, 1)),
    ("roberta", 768, 1, (512, 1e-5, 1)), ("roberta", 1024, 1, (512, 3e-5, 1)),
    ("bert", 768, 2, (512, 5e-5, 3)), ("bert", 768, 3, (512, 5e-5, 3)),
    ("bert", 1024, 2, (512, 1e-5, 3)), ("bert", 1024, 3, (512, 1e-5, 3))])
def test_defaults_are_those_of_simcses_table_a1(model_type, width, columns, expected):
    config = resolved("simcse", model_type, width, columns)
    assert (config.batch_size, config.learning_rate, config.epochs) == expected
    assert (config.temperature, config.max_tokens, config.dropout) == (.05, 32, .1)


def test_the_head_is_dropped_without_labels_and_kept_with_them():
    assert resolved().head == "train" and resolved(columns=3).head == "keep"
    assert resolved(pooling="mean").head == "none"


def test_the_table_of_a_paper_goes_before_that_of_simcse():
    """DiffCSE for BERT-base: its own rate and epochs, SimCSE's batch."""
    config = resolved(method="diffcse")
    assert (config.batch_size, config.learning_rate, config.epochs) == (64, 7e-6, 2)


def test_the_best_checkpoint_is_chosen_on_sts_b_dev_for_the_sts_tests_and_nowhere_else():
    assert resolved(test="sts").dev == resolved(test="stsb").dev == "stsb"
    assert resolved(test="docs").dev == resolved(test="mine.tsv").dev == "none"
    assert resolved(test="sts", dev="none").dev == "none"


def test_a_flag_that_was_given_always_wins():
    given = {"batch_size": 32, "learning_rate": 1e-3, "head": "none", "epochs": 2}
    config = resolved(width=1024, columns=3, **given)
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("text, seeds", [
    ("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("3-3", [3]), ("2,0-1", [0, 1, 2])])
def test_seeds_are_ranges_with_both_ends(text, seeds):
    assert seed_list(text) == seeds


@pytest.mark.parametrize("settings, said", [
    (dict(temperature=0.), "--temperature: expected above 0, found 0.0"),
    (dict(temperature=math.nan), "--temperature: expected above 0, found nan"),
    (dict(learning_rate=math.inf), "--learning-rate: expected above 0, found inf"),
    (dict(batch_size=1), "--batch-size: expected 2 or more, since the others"),
    (dict(dropout=1.), "--dropout: expected 0 or more and below 1, found 1.0"),
    (dict(steps=-1), "--steps: expected 0 or more, found -1"),
    (dict(hardness=math.nan), "--hardness: expected a finite number, found nan"),
])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(settings, said):
    with pytest.raises(ValueError) as refused:
        check_ranges(METHODS["simcse"].Config(**settings))
    assert said in str(refused.value)


@pytest.mark.parametrize("limits, fits, refuses, words", [
    (dict(least=2), [2, 3], [1.9], "2 or more"), (dict(above=0), [1e-9], [0., -1.], "above 0"),
    (dict(least=0, most=1), [0, 1], [-.1, 1.1], "0 or more and at most 1"),
    (dict(least=0, below=1), [0, .9], [1.], "0 or more and below 1"),
    (dict(), [-9., 9.], [math.inf], "a finite number"),
    (dict(least=1, why=", or it is none"), [1], [0], "1 or more, or it is none")])
def test_a_range_has_open_and_closed_ends_and_says_which(limits, fits, refuses, words):
    @dataclass
    class Config:
        it: float = flag(1., "group", "noun", **limits)
    for value in fits:
        check_ranges(Config(value))
    for value in refuses:
        with pytest.raises(ValueError, match=f"--it: expected {words}, found {value}"):
            check_ranges(Config(value))


def test_the_device_auto_is_a_gpu_or_the_processor_and_mps_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for gpu, expected in [(False, "cpu"), (True, "cuda")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert pick_device("auto").type == expected


def test_a_gpu_that_is_asked_for_by_number_is_the_one_that_is_asked_what_it_has(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(
        device=torch.device(device)))                             # there is none here
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == chosen[0] == torch.device("cuda:1")


def test_a_run_names_its_own_gpu_and_none_if_it_is_on_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU of {device}")
    assert environment(torch.device("cpu"))["gpu"] is None
    assert environment(torch.device("cuda:1"))["gpu"] == "the GPU of cuda:1"


@pytest.mark.parametrize("device, bf16, said", [
    ("cpu", False, ""), ("cuda", True, ""), ("cuda", False, "this GPU has no bfloat16, so "),
    ("mps", False, "--device mps trains in float32, as it lacks float64 ")])
def test_what_a_device_lacks_is_said_in_a_sentence(device, bf16, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    say_limits(torch.device(device))
    found = capsys.readouterr().err
    assert said in found and (said or not found) and found.count("\n") == bool(said)

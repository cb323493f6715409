"""What can be set: defaults from the papers' tables, flags that win, values that are refused."""

from dataclasses import fields

import pytest

from config import Config, listing, parser, resolve, seed_range, validate


def resolved(model_type="bert", width=768, columns=1, **given):
    return resolve(given, model_type=model_type, width=width, columns=columns)


@pytest.mark.parametrize("model_type, width, batch, rate", [
    ("bert", 768, 64, 3e-5), ("bert", 1024, 64, 1e-5),
    ("roberta", 768, 512, 1e-5), ("roberta", 1024, 512, 3e-5)])
def test_unsupervised_defaults_are_those_of_simcses_table_a1(model_type, width, batch, rate):
    config = resolved(model_type, width)
    assert (config.batch_size, config.learning_rate, config.epochs) == (batch, rate, 1)
    assert (config.temperature, config.max_tokens, config.dropout) == (.05, 32, .1)


@pytest.mark.parametrize("width, rate", [(768, 5e-5), (1024, 1e-5)])
@pytest.mark.parametrize("columns", [2, 3])
def test_supervised_defaults_are_those_of_simcses_table_a1(width, rate, columns):
    config = resolved(width=width, columns=columns)
    assert (config.batch_size, config.learning_rate, config.epochs) == (512, rate, 3)


def test_the_head_is_dropped_without_labels_and_kept_with_them():
    assert resolved().head == "train" and resolved(columns=3).head == "keep"
    assert resolved(pooling="mean").head == "none"


@pytest.mark.parametrize("width, weights", [(768, (.1, .1)), (1024, (.005, .05))])
def test_is_cse_has_a_constant_weight_for_base_and_a_ramp_for_large(width, weights):
    config = resolved(width=width, method="is-cse")
    assert (config.alpha_start, config.alpha_end) == weights
    assert (config.buffer_size, config.neighbours, config.smoothing_temperature) == (1024, 16, 2)


def test_focal_has_the_hardness_of_the_authors_code():
    assert resolved(loss="focal").hardness == .3


def test_the_best_checkpoint_is_chosen_on_sts_b_dev_for_the_sts_tests_and_nowhere_else():
    assert resolved(test="sts").dev == resolved(test="stsb").dev == "stsb"
    assert resolved(test="docs").dev == resolved(test="mine.tsv").dev == "none"
    assert resolved(test="sts", dev="none").dev == "none"


def test_a_flag_that_was_given_always_wins():
    given = {"batch_size": 32, "learning_rate": 1e-3, "head": "none", "epochs": 2}
    config = resolved(width=1024, columns=3, **given)
    assert {name: getattr(config, name) for name in given} == given


def test_every_setting_is_a_flag_and_only_what_is_typed_is_given():
    for f in fields(Config):
        choices = f.metadata["choices"]
        value = str(next(iter(choices)) if choices else f.default or 1)
        found = vars(parser().parse_args(["--" + f.name.replace("_", "-"), value]))
        assert found.pop(f.name) == f.type(value)
        assert not any(found.values())


def test_help_says_what_each_flag_means_and_ends_with_examples_and_exit_codes():
    text = parser().format_help()
    assert all(f.metadata["help"].split()[0] in text for f in fields(Config))
    for group in ("what to train:", "data:", "loss:", "optimisation:", "evaluation:", "output:",
                  "system:"):
        assert group in text
    assert text.count("  python mincse.py") == 3 and "130 interrupted" in text


def test_the_list_names_source_and_verified_average_of_each_paper():
    text = listing()
    for part in ("76.25", "81.57", "77.32", "78.30", "2104.08821", "2310.06918", "2305.07424"):
        assert part in text


@pytest.mark.parametrize("text, seeds", [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("3-3", [3])])
def test_seeds_are_a_range_with_both_ends(text, seeds):
    assert seed_range(text) == seeds


@pytest.mark.parametrize("settings, said", [
    (dict(temperature=0.), "--temperature: expected above 0, found 0.0"),
    (dict(temperature=float("nan")), "--temperature: expected above 0, found nan"),
    (dict(batch_size=1), "--batch-size: expected 2 or more, since the others"),
    (dict(dropout=1.), "--dropout: expected from 0 to below 1, found 1.0"),
    (dict(steps=-1), "--steps: expected 0 or more, found -1"),
    (dict(hardness=float("nan")), "--hardness: expected a finite number, found nan"),
    (dict(alpha_start=.5), "--alpha-end: expected at least --alpha-start, 0.5, found 0.1"),
])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(settings, said):
    with pytest.raises(ValueError) as refused:
        validate(Config(**settings))
    assert said in str(refused.value)

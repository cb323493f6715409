"""
Which papers are there, and what goes together?

`METHODS` is the menu of --method. A flag of another paper is refused, and so is what makes no
sense together; all else may be tried. Reading order: the order of the menu.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import Field, fields

from data import Corpus
from engine.flags import add_flags, check_ranges, dashed, exits, seed_range
from engine.results import names_of
from model import EncoderConfig, Head
from papers import (cards, core_tuning, debcse, diffcse, fedrcl, focal, ifnd, infocse, is_cse,
                    kdmcse, pnr, settings, simcse, sscl, twins)

METHODS = {
    "simcse": simcse.SimCSE,
    "is-cse": is_cse.ISCSE,
    "sscl": sscl.SSCL,
    "cards": cards.CARDS,
    "kdmcse": kdmcse.KDMCSE,
    "diffcse": diffcse.DiffCSE,
    "twins": twins.Twins,
    "ifnd": ifnd.IFND,
    "core-tuning": core_tuning.CoreTuning,
    "debcse": debcse.DebCSE,
    "infocse": infocse.InfoCSE,
    "pnr": pnr.PNR,
    "fedrcl": fedrcl.FedRCL,
}


def own_settings(method: str) -> list[Field]:
    """The settings that only this paper's page, and perhaps another's, has."""
    shared = {f.name for f in fields(settings.Config)}
    return [f for f in fields(METHODS[method].Config) if f.name not in shared]


def refuse_foreign(argv: Sequence[str], method: str) -> None:
    """A flag of another paper would be ignored, so it is refused."""
    own = {dashed(f.name) for f in own_settings(method)}
    for flag in (arg.partition("=")[0] for arg in argv):
        owners = [name for name in METHODS if flag in map(dashed, (
            f.name for f in own_settings(name)))]
        if owners and flag not in own:
            raise ValueError(f"{flag} belongs to --method {' and '.join(owners)}, found --method "
                             f"{method}: leave it out")


def refuse_idle(given: dict, config: settings.Config) -> None:
    """A typed setting of a term, loss or view that is off would be ignored, so it is refused."""
    for name, idle, used in (
            ("hardness", config.loss != "focal", "--loss focal"),
            ("rate", config.positives == "dropout", "a text view: give one with --positives"),
            ("mlm_rate", not getattr(config, "mlm_weight", 0), "the masked-LM term: give it a "
             "--mlm-weight")):
        if name in given and idle:
            raise ValueError(f"{dashed(name)} belongs to {used}, or leave it out")


def check_sizes(config: settings.Config, rows: int, shape: EncoderConfig) -> None:
    """The corpus must fill a batch, and a sentence must fit into the encoder."""
    if rows < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} needs a corpus of as many rows, found "
                         f"{rows} in {config.corpus}: use --batch-size {rows} or less")
    if not 3 <= config.max_tokens <= shape.usable_positions:
        raise ValueError(f"--max-tokens: expected 3 to {shape.usable_positions}, the encoder's "
                         f"positions, found {config.max_tokens}")


def check(config: settings.Config, corpora: list[Corpus], shape: EncoderConfig) -> None:
    """Refuse what makes no sense together, in one sentence."""
    method, columns = METHODS[config.method], len(corpora[0].columns)
    check_ranges(config)
    check_sizes(config, len(corpora[0]), shape)
    if columns not in method.columns_taken:
        other = "without hard negatives" if columns > max(method.columns_taken) else (
            "of pairs, such as nli")
        raise ValueError(f"--method {config.method} takes a corpus of "
                         f"{' or '.join(map(str, method.columns_taken))} columns, found {columns} "
                         f"in {config.corpus}: use --method simcse, or a file {other}")
    for name, taken in (("loss", method.losses_taken), ("positives", method.positives_taken)):
        if getattr(config, name) not in taken:
            raise ValueError(f"--method {config.method} has {name} of its own, found --{name} "
                             f"{getattr(config, name)}: use --{name} {taken[0]}")
    if columns > 1 and config.positives != "dropout":
        raise ValueError(f"--positives {config.positives} makes positives, but {config.corpus} "
                         f"brings its own ({columns} columns): use --positives dropout")
    if config.hard_negative_weight != 1 and columns < 3 and not method.hard_negatives:
        raise ValueError(f"--hard-negative-weight {config.hard_negative_weight}: {config.corpus} "
                         "has no hard negatives (3 columns): leave it out")
    if config.head == "keep" and method.head is not Head:
        raise ValueError(f"--head keep: the head of --method {config.method} serves training only: "
                         "use --head train")
    if (len(corpora) > 1) != method.in_turn:
        several = " ".join(name for name, other in METHODS.items() if other.in_turn)
        way = "give --corpus two names or more" if method.in_turn else f"use --method {several}"
        raise ValueError(f"--corpus {' '.join(names_of(config.corpus))}: several corpora, one "
                         f"learned after the other, are for {several}: {way}")
    if config.loss == "focal":
        focal.Focal.check(config, corpora, shape)
    method.check(config, corpora, shape)


def listing() -> str:
    """The text of --list: each paper, then its defaults by size of encoder."""
    from papers.sparsecse import SparseCSE   # here, or `python -m` would find it imported already
    lines = []
    for page in (*METHODS.values(), focal.Focal, SparseCSE):
        for row in vars(page).get("rows", ()):
            lines += [row.flags, f"    {row.idea}", f"    {row.citation}",
                      f"    published average of seven STS tasks: {row.published}"]
        for size, values in vars(page).get("recipes", {}).items():
            lines.append(f"    defaults, {size}: "
                         + " ".join(f"{dashed(name)} {value}" for name, value in values.items()))
    return "\n".join(lines)


EXAMPLES = """examples, with the time they took on an Intel Xeon in float32:
  python mincse.py
      built-in encoder, corpus and test, no network: 2.4 minutes on two cores, 3.8 on one
  python mincse.py --corpus wiki1m --data FOLDER --test sts --steps 500
      the built-in encoder on Wikipedia, scored on STS: 7 minutes on one core
  python mincse.py --encoder bert-base-uncased --corpus wiki1m --test sts --seeds 0-4
      SimCSE's Table 5 row with error bars; meant for one GPU, not timed here

flags of a paper: python mincse.py --method NAME --help, for NAME in
  {}

exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 4 trained and saved,
but the final evaluation failed; 130 interrupted, state saved
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Shared flags, and those of the chosen paper; what is not typed stays out of the result."""
    first = argparse.ArgumentParser(prog="mincse.py", add_help=False, allow_abbrev=False,
                                    usage="python mincse.py [--FLAG VALUE ...]")
    first.add_argument("--method", choices=METHODS, default="simcse")
    argv = sys.argv[1:] if argv is None else argv
    method = first.parse_known_args(argv)[0].method
    with exits(2):
        refuse_foreign(argv, method)
    top = argparse.ArgumentParser(
        prog="mincse.py", usage=first.usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train a sentence encoder and score it.",
        epilog=EXAMPLES.format(" ".join(METHODS)),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    of_focal = fields(focal.Config)                               # shown after what all losses have
    shared = [f for f in fields(settings.Config) if f not in of_focal]
    groups = add_flags(top, [*shared, *of_focal], {"method": METHODS})
    groups["optimisation"].add_argument("--seeds", type=seed_range, metavar="A-B",
                                        default=None, help="one run per seed, then mean and spread")
    for name, text in (("resume", "go on where the same command was stopped"),
                       ("overwrite", "replace the run that the folder holds"),
                       ("dry_run", "check everything, take three steps, print the plan"),
                       ("list", "the papers, with source, defaults and published scores")):
        groups["output"].add_argument(dashed(name), action="store_true", help=text, default=False)
    typed = {arg.partition("=")[0] for arg in argv}
    if "--method" in typed or not typed & {"-h", "--help"}:       # --help alone: the shared ones
        add_flags(top, own_settings(method))
    args = top.parse_args(argv)
    if vars(args).pop("list"):
        print(listing())
        raise SystemExit
    if args.seeds and "seed" in args:
        top.error("--seed and --seeds both say which runs are made: give one of them")
    return args

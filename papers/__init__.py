"""
Which papers are there, and what goes together?

`METHODS` is the menu of --method, in reading order. What makes no sense together is refused, and
so is a flag of another paper; all else may be tried.
"""

import sys

if sys.argv[:1] == ["-m"]:            # python -m papers.sparsecse imports this before itself
    import engine.interrupt           # noqa: F401

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import Field, fields
from inspect import get_annotations, getdoc
from pathlib import Path

from data import Corpus
from engine.flags import Parser, add_flags, check_ranges, dashed, exits, seed_list
from engine.results import names_of
from model import EncoderConfig, Head
from papers import (cards, core_tuning, debcse, diffcse, fedrcl, focal, ifnd, infocse, is_cse,
                    kdmcse, pnr, settings, simcse, sscl, twins)

ROOT = Path(__file__).parent.parent
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
    """The settings that the page of a paper adds to the shared ones."""
    shared = {f.name for f in fields(settings.Config)}
    return [f for f in fields(METHODS[method].Config) if f.name not in shared]


def refuse_foreign(argv: Sequence[str], method: str) -> None:
    """Refuse a flag that only other papers have, since it would be ignored."""
    for flag in (arg.partition("=")[0] for arg in argv):
        owners = [name for name in METHODS
                  if flag in {dashed(f.name) for f in own_settings(name)}]
        if owners and method not in owners:
            raise ValueError(f"{flag} belongs to --method {' and '.join(owners)}, found --method "
                             f"{method}: leave it out")


def refuse_idle(given: dict, config: settings.Config) -> None:
    """Refuse a typed setting of a loss, view or term that is off, since it would be ignored."""
    idle = {"hardness": (config.loss != "focal", "--loss focal"),
            "rate": (config.positives == "dropout", "a text view: give one with --positives")}
    idle |= {name: (not getattr(config, switch, 1), f"{dashed(switch)}, which is 0: raise it")
             for name, switch in METHODS[config.method].needs.items()}
    for name, (off, used) in idle.items():
        if name in given and off:
            raise ValueError(f"{dashed(name)} belongs to {used}, or leave it out")


def check(config: settings.Config, corpora: list[Corpus], shape: EncoderConfig) -> None:
    """Refuse in a sentence what makes no sense together."""
    check_ranges(config)
    method, rows, columns = METHODS[config.method], len(corpora[0]), len(corpora[0].columns)
    own, corpus = f"--method {config.method}", " ".join(names_of(config.corpus))
    taken = " or ".join(map(str, method.columns_taken))
    fewer = columns > max(method.columns_taken)
    in_turn = " ".join(name for name, page in METHODS.items() if page.in_turn)
    for refused, said in (
            (rows < config.batch_size, f"--batch-size {config.batch_size} needs a corpus of as "
             f"many rows, found {rows} in {corpus}: use --batch-size {rows} or less"),
            (not 3 <= config.max_tokens <= shape.usable_positions, "--max-tokens: expected 3 to "
             f"{shape.usable_positions}, the encoder's positions, found {config.max_tokens}"),
            (columns not in method.columns_taken,
             f"{own} takes a corpus of {taken} columns, found {columns} in {corpus}: use --method "
             f"simcse, or a file {'without hard negatives' if fewer else 'of pairs, such as nli'}"),
            (config.loss not in method.losses_taken, f"{own} has a loss of its own, found --loss "
             f"{config.loss}: use --loss {method.losses_taken[0]}"),
            (config.positives not in method.positives_taken, f"{own} has positives of its own, "
             f"found --positives {config.positives}: use --positives {method.positives_taken[0]}"),
            (columns > 1 and config.positives != "dropout", f"--positives {config.positives} makes "
             f"positives, but {corpus} has some ({columns} columns): use --positives dropout"),
            (config.hard_negative_weight != 1 and columns < 3 and not method.hard_negatives,
             f"--hard-negative-weight: {corpus} has no hard negatives (3 columns): leave it out"),
            (config.head in ("keep", "own") and method.head is not Head,
             f"--head {config.head}: the head of {own} serves training only: use --head train"),
            ((len(corpora) > 1) != method.in_turn, f"--corpus {corpus}: several corpora, one "
             f"learned after the other, are for {in_turn}: use --method {in_turn} with two names")):
        if refused:
            raise ValueError(said)
    if config.loss == "focal":
        focal.Focal.check(config, corpora, shape)
    method.check(config, corpora, shape)


def every_page() -> dict[str, type]:
    """The class of every page by name: the methods, a loss, and a program."""
    from papers.sparsecse import SparseCSE   # here, or `python -m` would find it imported already
    return METHODS | {"focal": focal.Focal, "sparsecse": SparseCSE}


def listing(names: Sequence[str] = ()) -> str:
    """The text of --list: the rows of each page, then its defaults by size of encoder."""
    lines = []
    for page in (every_page()[name] for name in names or every_page()):
        for row in vars(page).get("rows", ()):
            lines += [row.flags, f"    {row.idea}", f"    {row.citation}",
                      f"    published average of seven STS tasks: {row.published}"]
        for size, values in vars(page).get("recipes", {}).items():
            flags = " ".join(f"{dashed(name)} {value}" for name, value in values.items())
            lines.append(f"    defaults, {size}: {flags}")
    return "\n".join(lines)


def explain(name: str) -> str:
    """The text of --explain: a page's header, formulas and settings, what to read and to run."""
    module = sys.modules[every_page()[name].__module__]
    page, config = module.__name__.removeprefix("papers."), vars(module).get("Config")
    files = defaultdict(list)                                     # path -> what the page has of it
    for thing, value in vars(module).items():
        files[str(getattr(value, "__module__", "")).replace(".", "/") + ".py"].append(thing)
    docs = {thing: getdoc(vars(module)[thing]) or "" for thing in files.pop(f"papers/{page}.py")}
    records = sorted(ROOT.glob(f"results/*/{name}/**/args.json"),
                     key=lambda path: "study" not in path.parts)
    return "\n".join([
        module.__doc__.strip(), "",
        *(f"{thing}: {text}\n" for thing, text in docs.items()   # those that have a formula
          if " = " in text and thing != "Config"),
        listing([name]),
        *(f"    {dashed(f.name)} {f.default!r}: {f.metadata['help']}"
          for f in (fields(config) if config else ()) if f.name in get_annotations(config)),
        f"\nread papers/{page}.py, then tests/test_{page}.py; the page uses",
        *(f"    {', '.join(things)} of {path}" for path, things in files.items()
          if (ROOT / path).is_file() and not path.startswith("engine")),
        "\nrun, for its claim and for its line in results/",
        *[f"    python -m claims.{page}"] * (ROOT / f"claims/{page}.py").is_file(),
        *(f"    {json.loads(path.read_bytes())['command']}" for path in records[:1])])


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
but the final evaluation failed; 130 interrupted (143: SIGTERM), saved; 141 nobody reads the output
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line as it was typed: the shared flags, and those of the chosen paper."""
    first = argparse.ArgumentParser(prog="mincse.py", add_help=False, allow_abbrev=False,
                                    usage="python mincse.py [--FLAG VALUE ...]")
    first.add_argument("--method", choices=METHODS, default="simcse")
    argv = sys.argv[1:] if argv is None else argv
    method = first.parse_known_args(argv)[0].method
    with exits(2):
        refuse_foreign(argv, method)
    top = Parser(
        prog="mincse.py", usage=first.usage, argument_default=argparse.SUPPRESS,
        description="Train a sentence encoder and score it.",
        epilog=EXAMPLES.format(" ".join(METHODS)),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    of_focal = fields(focal.Config)                               # shown after what all losses have
    shared = [f for f in fields(settings.Config) if f not in of_focal]
    groups = add_flags(top, [*shared, *of_focal], {"method": METHODS})
    groups["optimisation"].add_argument(
        "--seeds", type=seed_list, metavar="A-B", default=None,
        help="one run per seed, then mean and spread: 0-4 or 0,1,2")
    either = groups["output"].add_mutually_exclusive_group()
    for group, name, text in (
            (either, "resume", "go on where the same command was stopped"),
            (either, "overwrite", "replace the run that the folder holds"),
            (groups["output"], "dry_run", "check everything, take three steps, print the plan"),
            (groups["output"], "list", "the papers, with source, defaults, published scores")):
        group.add_argument(dashed(name), action="store_true", help=text, default=False)
    groups["output"].add_argument("--explain", choices=every_page(), metavar="PAPER",
                                  help="what its page says, its settings, what to read and to run")
    typed = {arg.partition("=")[0] for arg in argv}
    if "--method" in typed or not typed & {"-h", "--help"}:       # --help alone: the shared ones
        add_flags(top, own_settings(method))
    top.foreign = [dashed(f.name) for name in METHODS for f in own_settings(name)]
    args = top.parse_args(argv)
    if vars(args).pop("list"):
        print(listing())
        raise SystemExit
    if "explain" in args:
        print(explain(args.explain))
        raise SystemExit
    if getattr(args, "steps", 1) < 1:                             # 0, the default, means epochs
        top.error(f"--steps: expected 1 or more, found {args.steps}: leave it out for --epochs")
    if args.seeds and "seed" in args:
        top.error("--seed and --seeds both say which runs are made: give one of them")
    return args

"""
What can be set, and where does each default come from?

`Config` is one flat list: a field is a flag of the same name (`batch_size`: `--batch-size`), with
the table it was taken from. Fields that say "recipe" depend on the method and on the size of the
encoder: `resolve` looks them up in the papers' tables. A flag given on the command line always
wins. A weight of 0 turns a term off, so there are no on/off flags for terms.
"""

import argparse
from dataclasses import dataclass, field, fields, replace

from losses import LOSSES
from methods import METHODS, PAPERS
from positives import POSITIVES

def flag(default, group: str, text: str, choices=None):
    """A field of Config together with its place in --help."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    encoder: str = flag("mini", "what to train", "mini, a folder, or a Hub id")
    method: str = flag("simcse", "what to train", "the paper", METHODS)
    loss: str = flag("info-nce", "what to train", "the contrastive loss", LOSSES)
    positives: str = flag("dropout", "what to train", "how a positive is made", POSITIVES)
    pooling: str = flag("cls", "what to train", "tokens to sentence (SimCSE Table 6)",
                        ["cls", "mean"])
    head: str = flag("recipe", "what to train", "tanh layer on top: only while training, kept, or "
                     "none (SimCSE Table 6)", ["recipe", "train", "keep", "none"])

    corpus: str = flag("docs", "data", "docs, wiki1m, nli, or a .txt, .csv, .tsv file (or .gz)")
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(32, "data", "longer sentences are cut in training (SimCSE code)")
    rate: float = flag(0.1, "data", "share of words that crop and delete-words take")

    temperature: float = flag(0.05, "loss", "divides the cosines (SimCSE Table D.1)")
    hard_negative_weight: float = flag(1.0, "loss", "α on the own hard negative (SimCSE eq. 8)")
    hardness: float = flag(0.3, "loss", "m of --loss focal (the authors' code)")
    mlm_weight: float = flag(0.0, "loss", "λ of the masked-LM term (0.1 in SimCSE Table E.1)")
    mlm_rate: float = flag(0.15, "loss", "share of tokens masked for it")
    buffer_size: int = flag(1024, "loss", "is-cse: rows remembered (IS-CSE code)")
    neighbours: int = flag(16, "loss", "is-cse: rows blended into a positive (IS-CSE code)")
    smoothing_temperature: float = flag(2.0, "loss", "is-cse: β of the blend (IS-CSE code)")
    alpha_start: float = flag(0.1, "loss", "is-cse: weight of the smoothed term at first (recipe)")
    alpha_end: float = flag(0.1, "loss", "is-cse: and from mid-training on (recipe)")

    epochs: int = flag(1, "optimisation", "passes over the corpus (recipe)")
    steps: int = flag(0, "optimisation", "exactly so many steps instead, schedule included")
    batch_size: int = flag(64, "optimisation", "sentences a step, so negatives + 1 (recipe)")
    learning_rate: float = flag(1e-4, "optimisation", "peak; falls to 0 linearly (recipe)")
    dropout: float = flag(0.1, "optimisation", "in the encoder (SimCSE Table 3)")
    weight_decay: float = flag(0.0, "optimisation", "AdamW's (SimCSE code)")
    clip: float = flag(1.0, "optimisation", "largest gradient norm (SimCSE code)")
    seed: int = flag(42, "optimisation", "of everything random (SimCSE code)")

    test: str = flag("docs", "evaluation", "docs, stsb, sts, or a .tsv of pairs with scores")
    dev: str = flag("recipe", "evaluation", "the same, or none: the last step is kept. "
                    "Default: stsb for the STS tests, else none")
    dev_every: int = flag(125, "evaluation", "steps between dev scores (SimCSE scripts)")

    out: str = flag("", "output", "run folder; default: runs/METHOD-ENCODER-CORPUS")
    device: str = flag("auto", "system", "auto, cpu, cuda, mps")
    precision: str = flag("auto", "system", "auto: bf16 where the processor is built for it",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all")


# SimCSE Table A.1; base and large are the published sizes, small is anything below 768 wide.
UNSUPERVISED = {
    "bert-base": dict(batch_size=64, learning_rate=3e-5),
    "bert-large": dict(batch_size=64, learning_rate=1e-5),
    "roberta-base": dict(batch_size=512, learning_rate=1e-5),
    "roberta-large": dict(batch_size=512, learning_rate=3e-5),
    "small": dict(batch_size=64, learning_rate=1e-4),             # measured here, on STS-B dev
}
SUPERVISED = {
    "base": dict(batch_size=512, learning_rate=5e-5, epochs=3),
    "large": dict(batch_size=512, learning_rate=1e-5, epochs=3),
    "small": dict(batch_size=128, learning_rate=1e-4, epochs=3),  # ours: nobody published one
}
OF_METHOD = {
    ("is-cse", "large"): dict(alpha_start=0.005, alpha_end=0.05),  # their run scripts
}


def size_of(width: int) -> str:
    """The table's column for an encoder of that hidden width."""
    return "large" if width >= 1024 else "base" if width >= 768 else "small"


def recipe(config: Config, *, model_type: str, width: int, columns: int) -> dict:
    """What the papers' tables say for this method, encoder and kind of corpus."""
    size = size_of(width)
    supervised = columns > 1
    unsupervised_size = size if size == "small" else f"{model_type}-{size}"
    table = SUPERVISED[size] if supervised else UNSUPERVISED[unsupervised_size]
    # SimCSE's code builds a head for [CLS] only; supervised models keep it (Table 6).
    head = "none" if config.pooling != "cls" else "keep" if supervised else "train"
    dev = "stsb" if config.test in ("sts", "stsb") else "none"
    return {**table, **OF_METHOD.get((config.method, size), {}), "head": head, "dev": dev}


def resolve(given: dict, *, model_type: str, width: int, columns: int) -> Config:
    """Defaults, then the recipe, then what was given: the later wins."""
    asked = Config(**given)
    found = recipe(asked, model_type=model_type, width=width, columns=columns)
    return replace(asked, **{k: v for k, v in found.items()
                             if given.get(k, "recipe") == "recipe"})


EXAMPLES = """examples, with the time they took on two CPU cores:
  python mincse.py
      built-in encoder, corpus and test, no network: 2 minutes
  python mincse.py --corpus wiki1m --data FOLDER --test sts --steps 500
      the built-in encoder on Wikipedia, scored on STS: 4 minutes
  python mincse.py --encoder bert-base-uncased --corpus wiki1m --test sts --seeds 0-4
      SimCSE's Table 5 row with error bars; meant for one GPU, not timed here

exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 4 trained and saved,
but the final evaluation failed; 130 interrupted, state saved
"""


OPTIONS = {
    "resume": "go on where the same command was stopped",
    "overwrite": "replace the run that the folder holds",
    "keep_state": "keep state.pt after the end",
    "dry_run": "check everything, take three steps, print the plan",
    "list": "the methods, with source, defaults and published scores",
}


def dashed(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def seed_range(text: str) -> list[int]:
    """"0-4" -> [0, 1, 2, 3, 4]."""
    first, _, last = text.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    if not seeds:
        raise ValueError
    return seeds


def parser() -> argparse.ArgumentParser:
    """Every field of Config is a flag, in its group; what is not typed stays out of the result."""
    top = argparse.ArgumentParser(
        prog="mincse.py", usage="python mincse.py [--FLAG VALUE ...]", epilog=EXAMPLES,
        description="Train a sentence encoder and score it.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    groups = {}
    for f in fields(Config):
        name = f.metadata["group"]
        group = groups.setdefault(name, top.add_argument_group(name))
        shown = f" [{f.default}]" if f.default not in ("", "recipe") else ""
        group.add_argument(dashed(f.name), type=f.type,
                           choices=f.metadata["choices"], metavar=metavar(f),
                           help=(f.metadata["help"] + shown).replace("%", "%%"))
    groups["optimisation"].add_argument("--seeds", type=seed_range, metavar="A-B",
                                        help="one run per seed, then mean and spread")
    for name, text in OPTIONS.items():
        groups["output"].add_argument(dashed(name), action="store_true", help=text)
    return top


def metavar(f) -> str | None:
    """A word for the value; a menu shows its entries instead."""
    return None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[f.type]


POSITIVE = ("temperature", "learning_rate", "clip", "smoothing_temperature", "max_tokens",
            "epochs", "dev_every")
AT_LEAST_0 = ("hard_negative_weight", "mlm_weight", "weight_decay", "neighbours", "alpha_start",
              "steps", "threads", "seed")
SHARE = ("rate", "dropout", "mlm_rate")


def validate(config: Config) -> None:
    """Refuse values outside their range, naming the flag."""
    values = vars(config)
    broken = [(name, "above 0") for name in POSITIVE if not values[name] > 0]
    broken += [(name, "0 or more") for name in AT_LEAST_0 if not values[name] >= 0]
    broken += [(name, "from 0 to below 1") for name in SHARE if not 0 <= values[name] < 1]
    if config.batch_size < 2:
        broken.append(("batch_size", "2 or more, since the others of a batch are the negatives"))
    if config.alpha_end < config.alpha_start:
        broken.append(("alpha_end", f"at least --alpha-start, {config.alpha_start}"))
    for name, expected in broken[:1]:
        raise ValueError(f"{dashed(name)}: expected {expected}, found {values[name]}")


def listing() -> str:
    """The text of --list."""
    rows = [f"{paper.flags}\n    {paper.idea}\n    {paper.citation}\n"
            f"    published average of seven STS tasks: {paper.published}" for paper in PAPERS]
    tables = {**UNSUPERVISED, **{f"{k}, supervised": v for k, v in SUPERVISED.items()}}
    tables |= {f"{size}, {method}": v for (method, size), v in OF_METHOD.items()}
    defaults = [f"    {name}: " + " ".join(f"{dashed(k)} {v:g}" for k, v in row.items())
                for name, row in tables.items()]
    return "\n".join([*rows, "", "defaults by encoder (published sizes by their papers' tables):",
                      *defaults])

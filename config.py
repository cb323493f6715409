"""
What can be set, and where does each default come from?

`Config` is one flat list: a field is a flag of the same name (`batch_size`: `--batch-size`), with
the table it was taken from. Fields that say "recipe" depend on the method and on the size of the
encoder: `resolve` looks them up in the papers' tables. A flag given on the command line always
wins. A weight of 0 turns a term off, so there are no on/off flags for terms.
"""

import argparse
import math
from dataclasses import dataclass, field, fields, replace

from losses import LOSSES, RELAXED
from papers import METHODS, PAPERS
from positives import POSITIVES

def flag(default, group: str, text: str, choices=None, *, several: bool = False):
    """A field of Config together with its place in --help; `several` values make a list."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices,
                                            "several": several})


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

    corpus: str = flag("docs", "data", "docs, wiki1m, nli, or a .txt, .csv, .tsv file (or .gz); "
                       "pnr, simcse: several in a row are learned one after the other",
                       several=True)
    order: str = flag("in-turn", "data", "of several corpora; together: all at once, with as many "
                      "steps in all", ["in-turn", "together"])
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    teacher: str = flag("", "data", "twins, debcse, kdmcse: a trained encoder to learn from; "
                        "kdmcse also takes a file of its vectors: .npy, .safetensors")
    max_tokens: int = flag(32, "data", "longer sentences are cut in training (SimCSE code)")
    generator: str = flag("", "data", "diffcse: masked LM of the same words; default: the encoder")
    rate: float = flag(0.1, "data", "share of words that a text view changes")

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
    twins_weight: float = flag(1.0, "loss", "twins: λ of the twins loss (ours)")
    queue_batches: int = flag(2, "loss", "twins: past batches that stay negatives (ours)")
    rtd_weight: float = flag(0.005, "loss", "diffcse: λ of replaced-token detection (DiffCSE A.1)")
    rtd_rate: float = flag(0.3, "loss", "diffcse: share of tokens masked for it (recipe)")
    annotation_rounds: int = flag(3, "loss", "infocse: parts of the corpus that are annotated")
    annotator: str = flag("current", "loss", "infocse: the encoder before each part, or frozen "
                          "after the first", ["current", "frozen"])
    annotation_quantile: float = flag(0.9, "loss", "infocse: of cosines inside documents, where "
                                      "mates begin (recipe)")
    largest_cluster: int = flag(8, "loss", "infocse: sentences in it, at most")
    twin_rate: float = flag(0.5, "loss", "infocse, debcse: ρ, how often a sentence with "
                            "mates is its own positive (recipe)")
    mate_temperature: float = flag(0.1, "loss", "infocse: τ_s of the draw among mates")
    layers_as_negatives: int = flag(2, "loss", "sscl: M, layers below the last (SSCL Table 2)")
    layer_weight: float = flag(0.5, "loss", "sscl: w of the loss with them; 1: as in eq. 4 (code)")
    angular_margin: float = flag(0.125, "loss", "kdmcse: m, radians that negatives come nearer")
    teacher_threshold: float = flag(0.0, "loss", "kdmcse: pairs that the teacher finds more alike "
                                    "are no negatives; 1: all are, 0: set so for 1 in 1000 pairs")
    grounding_weight: float = flag(0.01, "loss", "kdmcse: λ of student against teacher (code)")
    retrieved: int = flag(1, "loss", "cards: s, negatives drawn for each sentence (CARDS README)")
    retrieve_from: int = flag(64, "loss", "cards: K, nearest sentences they are drawn of (recipe)")
    refresh: int = flag(0, "loss", "cards: steps until they are sought anew; 0: never (authors' "
                        "scripts)")
    propensity_bins: int = flag(10, "loss", "debcse: K, bins of surface likeness; 1: no correction")
    false_negatives: str = flag("eliminate", "loss", "ifnd: or make them positives",
                                ["eliminate", "attract"])
    clusters: int = flag(0, "loss", "ifnd: K, and 4·K next to it; 0: about the batch size (ours)")
    cluster_rounds: int = flag(5, "loss", "ifnd: R, parts of the run; clusters are found before "
                               "each but the first (ours)")
    accepted: float = flag(1.0, "loss", "ifnd: share of the labels at the end of the ramp")
    mixing: str = flag("both", "loss", "core-tuning: what is made harder",
                       ["both", "positives", "negatives", "none"])
    mixing_alpha: float = flag(1.0, "loss", "core-tuning: a of Beta(a, a), the shares (code)")
    focus: float = flag(1.0, "loss", "core-tuning: γ on positives known already (code)")
    contrast_weight: float = flag(1.0, "loss", "core-tuning: η of the contrastive loss (ours)")
    classifier_weight: float = flag(1.0, "loss", "core-tuning: of the pair classifier's loss")
    pseudo_weight: float = flag(1.0, "loss", "pnr: w of pseudo-negatives; 0: distillation only")
    distillation_weight: float = flag(1.0, "loss", "pnr: λ of distillation (their code)")
    classes: int = flag(20, "loss", "fedrcl: k-means clusters of the corpus")
    relaxed: str = flag("all-pairs", "loss", "fedrcl: pairs of a class that count; hardest: as in "
                        "their code", RELAXED)
    levels: int = flag(3, "loss", "fedrcl: layers compared, evenly spaced; 1: the last (ours)")
    ce_weight: float = flag(1.0, "loss", "fedrcl: weight of telling the class (their code)")
    scl_weight: float = flag(1.0, "loss", "fedrcl: weight of attraction (their code)")
    penalty_weight: float = flag(1.0, "loss", "fedrcl: β of the brake on it (their code)")
    penalty_threshold: float = flag(0.7, "loss", "fedrcl: λ, cosine where it begins (their code)")

    clients: int = flag(0, "federation", "fedrcl: the corpus is split among so many; 0: none")
    rounds: int = flag(20, "federation", "of local training and averaging (ours)")
    alpha: float = flag(0.1, "federation", "of the Dirichlet split: low, clients know few classes")
    client_share: float = flag(0.5, "federation", "of the clients that take part in a round (ours)")

    epochs: int = flag(1, "optimisation", "passes over the corpus (recipe)")
    steps: int = flag(0, "optimisation", "exactly so many steps instead, schedule included")
    batch_size: int = flag(64, "optimisation", "sentences a step, so negatives + 1 (recipe)")
    learning_rate: float = flag(1e-5, "optimisation", "peak; falls to 0 linearly (recipe)")
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
    micro_batch: int = flag(0, "system", "rows of a column encoded at a time: less memory, "
                            "the same gradient, one more forward pass; 0: all")


# SimCSE Table A.1; base and large are the published sizes, small is anything below 768 wide.
UNSUPERVISED = {
    "bert-base": dict(batch_size=64, learning_rate=3e-5),
    "bert-large": dict(batch_size=64, learning_rate=1e-5),
    "roberta-base": dict(batch_size=512, learning_rate=1e-5),
    "roberta-large": dict(batch_size=512, learning_rate=3e-5),
    "small": dict(batch_size=64, learning_rate=1e-5),             # measured here, on STS-B dev
}
SUPERVISED = {
    "base": dict(batch_size=512, learning_rate=5e-5, epochs=3),
    "large": dict(batch_size=512, learning_rate=1e-5, epochs=3),
    "small": dict(batch_size=128, learning_rate=3e-4, epochs=3),  # rate measured here, on dev
}
OF_METHOD = {
    ("is-cse", "large"): dict(alpha_start=0.005, alpha_end=0.05),  # their run scripts
    ("sscl", "roberta-base"): dict(batch_size=64),                 # ours; BERT's as in SSCL 4.2
    ("sscl", "roberta-large"): dict(batch_size=64, learning_rate=1e-5),            # ours
    ("kdmcse", "base"): dict(epochs=3),                            # their run scripts
    ("kdmcse", "roberta-base"): dict(batch_size=128),              # ours
    ("kdmcse", "large"): dict(batch_size=64, learning_rate=1e-5, epochs=3),        # ours
    ("twins", "roberta-base"): dict(batch_size=128, learning_rate=1e-5),   # ours
    ("twins", "small"): dict(batch_size=128, learning_rate=1e-5),          # ours
    ("infocse", "small"): dict(batch_size=128, annotation_quantile=0.95),  # ours
    ("diffcse", "bert-base"): dict(learning_rate=7e-6, epochs=2),          # DiffCSE A.1
    ("diffcse", "roberta-base"): dict(batch_size=64, learning_rate=1e-5, epochs=2, rtd_rate=0.2),
    ("diffcse", "large"): dict(batch_size=64, learning_rate=5e-6, epochs=2),   # ours
    ("cards", "roberta-base"): dict(batch_size=512, learning_rate=4e-5),   # their README, as below
    ("cards", "roberta-large"): dict(batch_size=512, learning_rate=7.5e-6),
    ("cards", "base"): dict(positives="switch-case", rate=0.05),
    ("cards", "large"): dict(positives="switch-case-quota", rate=0.1, retrieve_from=8),
    ("cards", "small"): dict(positives="switch-case", rate=0.05),          # ours
    ("debcse", "base"): dict(twin_rate=0.25),                              # ours, and these
    ("debcse", "roberta-base"): dict(batch_size=128, learning_rate=1e-5),
    ("debcse", "large"): dict(twin_rate=0.25),
    ("debcse", "small"): dict(batch_size=128, twin_rate=0.25),
    ("diffcse", "small"): dict(epochs=2),                                  # ours
    **{("core-tuning", size): dict(head="none") for size in ("base", "large", "small")},  # own one
    **{("fedrcl", size): dict(head="none") for size in ("base", "large", "small")},
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
    in_sequence = len(names(config.corpus)) > 1                   # each corpus to its last step
    dev = "stsb" if config.test in ("sts", "stsb") and not in_sequence else "none"
    return {**table, "head": head, "dev": dev, **OF_METHOD.get((config.method, size), {}),
            **OF_METHOD.get((config.method, unsupervised_size), {})}


def resolve(given: dict, *, model_type: str, width: int, columns: int) -> Config:
    """Defaults, then the recipe, then what was given: the later wins."""
    asked = Config(**given)
    found = recipe(asked, model_type=model_type, width=width, columns=columns)
    return replace(asked, **{k: v for k, v in found.items()
                             if given.get(k, "recipe") == "recipe"})


EXAMPLES = """examples, with the time they took on an Intel Xeon in float32:
  python mincse.py
      built-in encoder, corpus and test, no network: 2.4 minutes on two cores, 3.8 on one
  python mincse.py --corpus wiki1m --data FOLDER --test sts --steps 500
      the built-in encoder on Wikipedia, scored on STS: 7 minutes on one core
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
    """The flag of a field: batch_size -> --batch-size, from_ -> --from, which Python reserves."""
    return "--" + name.rstrip("_").replace("_", "-")


def names(corpus: str | list[str]) -> list[str]:
    """The corpora of a run: one, or several to be learned one after the other."""
    return [corpus] if isinstance(corpus, str) else corpus


class OneOrMore(argparse.Action):
    """A single value stays what it is; several become a list."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


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
    groups = add_flags(top, Config)
    groups["optimisation"].add_argument("--seeds", type=seed_range, metavar="A-B",
                                        help="one run per seed, then mean and spread")
    for name, text in OPTIONS.items():
        groups["output"].add_argument(dashed(name), action="store_true", help=text)
    return top


def add_flags(parser: argparse.ArgumentParser, settings: type) -> dict:
    """A flag for every field of the dataclass, in its group of --help; returns the groups."""
    groups = {}
    for f in fields(settings):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        shown = f" [{f.default}]" if f.default not in ("", "recipe") else ""
        many = {"nargs": "+", "action": OneOrMore} if f.metadata["several"] else {}
        group.add_argument(dashed(f.name), dest=f.name, type=f.type, **many,
                           choices=f.metadata["choices"], metavar=metavar(f),
                           help=(f.metadata["help"] + shown).replace("%", "%%"))
    return groups


def metavar(f) -> str | None:
    """A word for the value; a menu shows its entries instead."""
    return None if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[f.type]


POSITIVE = ("retrieve_from", "propensity_bins", "annotation_rounds", "mate_temperature",
            "temperature", "learning_rate", "clip", "smoothing_temperature", "max_tokens", "epochs",
            "dev_every", "cluster_rounds", "mixing_alpha", "levels", "rounds", "alpha",
            "client_share")
AT_LEAST_0 = ("hard_negative_weight", "mlm_weight", "weight_decay", "neighbours", "alpha_start",
              "steps", "threads", "seed", "twins_weight", "queue_batches",
              "layers_as_negatives", "grounding_weight", "rtd_weight", "retrieved", "refresh",
              "clusters", "focus", "contrast_weight", "classifier_weight", "pseudo_weight",
              "distillation_weight", "ce_weight", "scl_weight", "penalty_weight", "clients",
              "micro_batch")
UP_TO = {"accepted": 1, "twin_rate": 1, "layer_weight": 1, "teacher_threshold": 1,
         "client_share": 1, "penalty_threshold": 1, "angular_margin": 1.5}   # below a right angle
SHARE = ("annotation_quantile", "rate", "dropout", "mlm_rate", "rtd_rate")


def validate(config: Config) -> None:
    """Refuse values outside their range, naming the flag."""
    values = vars(config)
    broken = [(name, "above 0") for name in POSITIVE if not values[name] > 0]
    broken += [(name, "0 or more") for name in AT_LEAST_0 if not values[name] >= 0]
    broken += [(name, "from 0 to below 1") for name in SHARE if not 0 <= values[name] < 1]
    if config.batch_size < 2:
        broken.append(("batch_size", "2 or more, since the others of a batch are the negatives"))
    if config.largest_cluster < 2:
        broken.append(("largest_cluster", "2 or more, since alone nobody has a mate"))
    if config.classes < 2:
        broken.append(("classes", "2 or more, since with one there is nothing to tell apart"))
    if config.alpha_end < config.alpha_start:
        broken.append(("alpha_end", f"at least --alpha-start, {config.alpha_start}"))
    broken += [(name, f"from 0 to {most}") for name, most in UP_TO.items()
               if not 0 <= values[name] <= most]
    broken += not_finite(values)
    for name, expected in broken[:1]:
        raise ValueError(f"{dashed(name)}: expected {expected}, found {values[name]}")


def not_finite(values: dict) -> list[tuple[str, str]]:
    """NaN and infinity, which some comparisons let through: (name, what is expected)."""
    return [(name, "a finite number") for name, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)]


def listing() -> str:
    """The text of --list."""
    rows = [f"{paper.flags}\n    {paper.idea}\n    {paper.citation}\n"
            f"    published average of seven STS tasks: {paper.published}" for paper in PAPERS]
    tables = {**UNSUPERVISED, **{f"{k}, supervised": v for k, v in SUPERVISED.items()}}
    tables |= {f"{size}, {method}": v for (method, size), v in OF_METHOD.items()}
    defaults = [f"    {name}: " + " ".join(f"{dashed(k)} {v}" for k, v in row.items())
                for name, row in tables.items()]
    return "\n".join([*rows, "", "defaults by encoder (published sizes by their papers' tables):",
                      *defaults])

"""
What can be set for every paper, and where does each default come from?

`Config` is one flat list: a field is a flag of the same name (`batch_size`: `--batch-size`), with
the table it was taken from. A paper's page adds the fields that only it reads. Fields that say
"recipe" depend on the paper and on the size of the encoder: `resolve` looks them up in `recipes`
of the pages. A flag given on the command line always wins. A weight of 0 turns a term off.
"""

from dataclasses import dataclass, replace

from engine.flags import flag
from engine.results import names_of
from model import EncoderConfig
from papers import focal
from papers.views import POSITIVES


@dataclass(frozen=True)
class Config(focal.Config):
    encoder: str = flag("mini", "what to train", "mini, a folder, or a Hub id")
    method: str = flag("simcse", "what to train", "the paper: a page of papers/")
    loss: str = flag("info-nce", "what to train", "the contrastive loss", focal.LOSSES)
    positives: str = flag("dropout", "what to train", "how a positive is made", POSITIVES)
    pooling: str = flag("cls", "what to train", "tokens to sentence (SimCSE Table 6)",
                        ["cls", "mean"])
    head: str = flag("recipe", "what to train", "tanh layer on top: only while training, kept, or "
                     "none (SimCSE Table 6)", ["recipe", "train", "keep", "none"])

    corpus: str = flag("docs", "data", "docs, wiki1m, nli, or a .txt, .csv, .tsv file (or .gz); "
                       "pnr learns several in turn", several=True)
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(32, "data", "longer sentences are cut in training (SimCSE code)")
    rate: float = flag(0.1, "data", "share of words that a text view changes", least=0, below=1)

    temperature: float = flag(0.05, "loss", "divides the cosines (SimCSE Table D.1)", above=0)
    hard_negative_weight: float = flag(1.0, "loss", "α on the own hard negative (SimCSE eq. 8)",
                                       least=0)

    epochs: int = flag(1, "optimisation", "passes over the corpus (recipe)", least=1)
    steps: int = flag(0, "optimisation", "exactly so many steps instead, schedule included",
                      least=0)
    batch_size: int = flag(64, "optimisation", "sentences a step, so negatives + 1 (recipe)",
                           least=2, why=", since the others of a batch are the negatives")
    learning_rate: float = flag(1e-5, "optimisation", "peak; falls to 0 linearly (recipe)", above=0)
    dropout: float = flag(0.1, "optimisation", "in the encoder (SimCSE Table 3)", least=0, below=1)
    weight_decay: float = flag(0.0, "optimisation", "AdamW's (SimCSE code)", least=0)
    clip: float = flag(1.0, "optimisation", "largest gradient norm (SimCSE code)", above=0)
    seed: int = flag(42, "optimisation", "of everything random (SimCSE code)", least=0)

    test: str = flag("docs", "evaluation", "docs, stsb, sts, or a .tsv of pairs with scores")
    dev: str = flag("recipe", "evaluation", "the same, or none: the last step is kept. "
                    "Default: stsb for the STS tests, else none")
    dev_every: int = flag(125, "evaluation", "steps between dev scores (SimCSE scripts)", least=1)

    out: str = flag("", "output", "run folder; default: runs/METHOD-ENCODER-CORPUS")
    device: str = flag("auto", "system", "auto, cpu, cuda, mps")
    precision: str = flag("auto", "system", "auto: bf16 where the processor is built for it",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all", least=0)
    micro_batch: int = flag(0, "system", "rows of a column encoded at a time: less memory, "
                            "the same gradient, one more forward pass; 0: all", least=0)


def size_of(width: int) -> str:
    """The column of the papers' tables for an encoder of that hidden width."""
    return "large" if width >= 1024 else "base" if width >= 768 else "small"


def recipe(method: type, config: Config, shape: EncoderConfig, *, columns: int) -> dict:
    """What SimCSE's tables say for this encoder and kind of corpus, then what the paper's do."""
    size = size_of(shape.width)
    supervised = columns > 1
    # SimCSE's code builds a head for [CLS] only; supervised models keep it (Table 6).
    head = "none" if config.pooling != "cls" else "keep" if supervised else "train"
    in_turn = len(names_of(config.corpus)) > 1                       # each corpus to its last step
    dev = "stsb" if config.test in ("sts", "stsb") and not in_turn else "none"
    found = {"head": head, "dev": dev}
    for page in reversed(method.__mro__):
        table = vars(page).get("recipes", {})
        for column in ("any", size, f"{shape.model_type}-{size}",
                       *[f"{size}, supervised"] * supervised):
            found |= table.get(column, {})
    return found


def resolve(method: type, given: dict, shape: EncoderConfig, *, columns: int) -> Config:
    """Defaults, then the recipe, then what was given: the later wins."""
    asked = method.Config(**given)
    found = recipe(method, asked, shape, columns=columns)
    return replace(asked, **{name: value for name, value in found.items()
                             if given.get(name, "recipe") == "recipe"})

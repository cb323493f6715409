"""
What can be set for every paper, and where does each default come from?

A field of `Config` is a flag (`batch_size`: --batch-size) with the source of its default. A page
adds the fields that only it reads. A default marked "(recipe)" gives way to the `recipes` of the
paper's page, or of papers/simcse.py: see `resolve`. A weight of 0 turns a term off.
"""

from dataclasses import dataclass, replace

from engine.flags import flag
from engine.results import names_of
from model import EncoderConfig, SentenceEncoder
from papers import focal
from papers.views import POSITIVES


@dataclass(frozen=True)
class Config(focal.Config):
    encoder: str = flag("mini", "what to train", "mini, a folder, or a Hub id")
    method: str = flag("simcse", "what to train", "paper, that is a page of papers/")
    loss: str = flag("info-nce", "what to train", "contrastive loss", focal.LOSSES)
    positives: str = flag("dropout", "what to train", "way to make a positive", POSITIVES)
    pooling: str = flag("cls", "what to train", "tokens to sentence (SimCSE Table 6); default: the "
                        "folder's own, else", ["cls", "mean"])
    head: str = flag("recipe", "what to train", "tanh layer on top: only while training, kept, or "
                     "none (SimCSE Table 6)", ["recipe", "train", "keep", "none"])

    corpus: str = flag("docs", "data", "docs, wiki1m, wiki_docs, wiki_articles, reviews, nli, or a "
                       ".txt, .csv, .tsv, .jsonl file (or .gz); pnr learns several in turn",
                       several=True)
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(32, "data", "length at which training cuts a sentence (SimCSE code)")
    rate: float = flag(0.1, "data", "share of words that a text view changes", least=0, below=1)

    temperature: float = flag(0.05, "loss", "divisor of the cosines (SimCSE Table D.1)", above=0)
    hard_negative_weight: float = flag(1.0, "loss", "α on the own hard negative (SimCSE eq. 8)",
                                       least=0)

    epochs: int = flag(1, "optimisation", "passes over the corpus (recipe)", least=1)
    steps: int = flag(0, "optimisation", "number of steps, in place of --epochs (recipe)", least=0)
    batch_size: int = flag(64, "optimisation", "sentences a step, so negatives + 1 (recipe)",
                           least=2, why=", since the others of a batch are the negatives")
    learning_rate: float = flag(1e-5, "optimisation", "peak; falls to 0 linearly (recipe)", above=0)
    dropout: float = flag(0.1, "optimisation", "encoder's rate (SimCSE Table 3)", least=0, below=1)
    weight_decay: float = flag(0.0, "optimisation", "factor of AdamW (SimCSE code)", least=0)
    clip: float = flag(1.0, "optimisation", "largest gradient norm (SimCSE code)", above=0)
    seed: int = flag(42, "optimisation", "start of all random numbers (SimCSE code)", least=0)

    test: str = flag("docs", "evaluation", "docs, stsb, sts, or a .tsv of pairs with scores; "
                     "default: as --dev, where given")
    dev: str = flag("recipe", "evaluation", "the same, or none: the last step is kept; "
                    "default: stsb for the STS tests, else none")
    dev_every: int = flag(125, "evaluation", "steps between dev scores (SimCSE scripts)", least=1)

    out: str = flag("", "output", "run folder; default: runs/METHOD-ENCODER-CORPUS")
    device: str = flag("auto", "system", "processor: auto, cpu, cuda or mps")
    precision: str = flag("auto", "system", "number format; auto: bf16 where the processor has it",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all", least=0)
    micro_batch: int = flag(0, "system", "rows of a column encoded at a time: less memory, "
                            "the same gradient but for dropout, one more pass; 0: all", least=0)
    compile: str = flag("no", "system", "torch.compile the encoder: minutes at first, then fewer "
                        "kernels; draws other dropout; needs a C++ compiler", ["no", "yes"])


def count_steps(config: Config, rows: int) -> int:
    """As many steps as were asked for, or those of the epochs over so many rows."""
    return config.steps or config.epochs * (rows // config.batch_size)


def resolve(method: type, given: dict, shape: EncoderConfig, *, columns: int,
            own: SentenceEncoder | None = None) -> Config:
    """The settings of a run: what was given, else the paper's recipe, SimCSE's, or the default.

    `own` is the encoder as its folder has it: its pooling stays, and a head (a Dense module) is
    trained further and kept, which head="own" says. Names of recipes: any, size, family-size, and
    "size, supervised" for pairs; later ones win.
    """
    config, supervised = method.Config(**given), columns > 1
    size = "large" if shape.width >= 1024 else "base" if shape.width >= 768 else "small"
    # SimCSE's code builds a head for [CLS] only. Table 6 compares the vectors before and after it,
    # on STS-B dev: 82.5 and 81.7 without labels, 85.8 and 86.2 with them. So without labels it is
    # thrown away, and with them kept. Chen et al. 2020 (SimCLR) guess why: a head drops what the
    # contrast has no need of, and the vectors before it keep that. With labels it may drop less.
    pooling = given.get("pooling", own.pooling if own else config.pooling)
    head = "none" if pooling != "cls" else "keep" if supervised else "train"
    in_turn = len(names_of(config.corpus)) > 1                    # each corpus to its last step
    dev = "stsb" if config.test in ("sts", "stsb") and not in_turn else "none"
    found = {"pooling": pooling, "head": head, "dev": dev}
    if given.get("dev", "recipe") not in ("recipe", "none"):
        found["test"] = given["dev"]                              # the pairs at hand
    for page in reversed(method.__mro__):
        for name in ("any", size, f"{shape.model_type}-{size}", f"{size}, supervised"):
            if supervised or not name.endswith("supervised"):
                found |= vars(page).get("recipes", {}).get(name, {})
    found |= {"head": "own"} if own and own.head else {}
    if "epochs" in given:
        found.pop("steps", None)
    return replace(config, **{name: value for name, value in found.items()
                              if given.get(name, "recipe") == "recipe"})

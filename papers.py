"""
Which papers are there, and what goes together?

`METHODS` is the menu of --method, `PAPERS` the text of --list. `check` says in one sentence which
combinations of method, loss, text view and corpus make no sense; all others may be tried.
"""

from dataclasses import dataclass

from corpus_methods import CARDS, DebCSE, FedRCL, IFND, InfoCSE, Twins
from methods import CoreTuning, DiffCSE, ISCSE, KDMCSE, PNR, SSCL, SimCSE
from model import Head

METHODS = {"simcse": SimCSE, "is-cse": ISCSE, "infocse": InfoCSE, "sscl": SSCL, "kdmcse": KDMCSE,
            "twins": Twins, "diffcse": DiffCSE, "cards": CARDS, "debcse": DebCSE,
            "ifnd": IFND, "core-tuning": CoreTuning, "fedrcl": FedRCL, "pnr": PNR}


@dataclass(frozen=True)
class Paper:
    """A row of `--list`. Published averages: seven STS tasks, only those that we could check."""
    flags: str
    idea: str
    citation: str
    published: str


PAPERS = [
    Paper("--method simcse", "two dropout masks make two views of one sentence",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "BERT-base 76.25, -large 78.41; RoBERTa-base 76.57, -large 78.90"),
    Paper("--method simcse --corpus nli", "entailment as positive, contradiction as hard negative",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "BERT-base 81.57, -large 82.21; RoBERTa-base 82.52, -large 83.76"),
    Paper("--mlm-weight 0.1", "keep predicting masked words, for the sake of transfer tasks",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "none on STS: meant for transfer, costs 0.5 on STS-B dev (Table D.2)"),
    Paper("--method simcse --loss focal", "negatives that are close already push harder",
          "Hou, Li: Focal-InfoNCE. Findings of EMNLP 2023, arXiv 2310.06918",
          "BERT-base 77.32, -large 78.72; RoBERTa-base 77.58, -large 78.74"),
    Paper("--method is-cse", "positives smoothed over neighbours in a memory buffer",
          "He, Zhang, Lan, Zhang: IS-CSE. AAAI 2023, arXiv 2305.07424",
          "BERT-base 78.30, -large 79.47; RoBERTa-base 77.73, -large 79.42"),
    Paper("--method infocse", "the model annotates its own positives, inside documents",
          "Yang, Liu, Xiao, Lian, Wu, Lian, Sun, Xie: arXiv 2202.13802",
          "none verified; the algorithm is ours, after the abstract"),
    Paper("--method sscl", "lower layers as negatives, against over-smoothing",
          "Chen, Shou, Pei, Gong, Cao, Chang, Li, Jiang: SSCL. ACL 2023, arXiv 2305.06154",
          "BERT-base 77.90, -large 79.69 (the means of its own rows: 77.75, 79.59)"),
    Paper("--method kdmcse --teacher ENCODER", "a teacher's likeness sets the margin of a negative",
          "Nguyen, Nguyen, Wu, Luu: KDMCSE. NAACL 2024, arXiv 2403.17486",
          "none on text alone: theirs are with images and captions"),
    Paper("--method twins --teacher ENCODER", "changed texts are positives that keep their margin",
          "Xiao, Li, Chen: Identical and Fraternal Twins. arXiv 2307.10932",
          "none verified; the formulas are ours, after the abstract"),
    Paper("--method diffcse", "the sentence vector tells which words were replaced",
          "Chuang, Dangovski, Luo et al.: DiffCSE. NAACL 2022, arXiv 2204.10298",
          "BERT-base 78.49; RoBERTa-base 78.21 (with distilled masked LMs as --generator)"),
    Paper("--method cards", "case-switched positives, nearest sentences as negatives",
          "Wang, Ge, Zhang, Yang: CARDS. SIGIR 2022, arXiv 2206.02457",
          "RoBERTa-base 78.83, -large 80.84 (their released models; none for BERT)"),
    Paper("--method debcse --teacher ENCODER", "pairs drawn by inverse propensity, against bias",
          "Miao, Du, Zhang: DebCSE. CIKM 2023, arXiv 2309.07396",
          "BERT-base 80.33 (theirs; the formulas here are ours, after the abstract)"),
    Paper("--method ifnd", "negatives of the anchor's cluster are left out, the surest first",
          "Chen, Hung, Tseng, Chien, Yang: IFND. ICLR 2022, arXiv 2106.03719",
          "none on text: theirs is on images"),
    Paper("--method core-tuning --corpus nli", "the hardest pairs are mixed into harder ones",
          "Zhang, Hooi, Hu, Liang, Feng: Core-tuning. NeurIPS 2021, arXiv 2102.06605",
          "none on text: theirs is on images"),
    Paper("--method fedrcl --clients 8", "a class attracts but must not collapse, client by client",
          "Seo, Kim, Kim, Han: FedRCL. CVPR 2024, arXiv 2401.04928",
          "none on text: theirs are of images"),
    Paper("--method pnr --corpus A B", "the model of the last corpus as teacher and as negatives",
          "Cha, Cho, Moon: PNR. ICML 2024, arXiv 2306.05101",
          "none on text: theirs are of images"),
    Paper("python pruning.py RUN", "heads and neurons that matter least to alignment and "
          "uniformity are removed", "An, Zhang, Song: SparseCSE. arXiv 2311.03881",
          "none verified; the units and the score are those of the authors' StarK"),
]


def check(config, columns: int, *, layers: int | None = None) -> None:
    """Refuse what makes no sense for a corpus of so many columns, an encoder of so many layers."""
    taken = METHODS[config.method].columns_taken
    if columns not in taken:
        other = "without hard negatives" if columns > max(taken) else "of pairs, such as nli"
        raise ValueError(f"--method {config.method} takes a corpus of "
                         f"{' or '.join(map(str, taken))} columns, found {columns} in "
                         f"{config.corpus}: use --method simcse, or a file {other}")
    if columns == 3 and config.loss == "focal":
        raise ValueError(f"--loss focal is defined without labels, but {config.corpus} has hard "
                         "negatives (3 columns): use --loss info-nce, or a corpus of sentences")
    if columns > 1 and config.positives != "dropout":
        raise ValueError(f"--positives {config.positives} makes positives, but {config.corpus} "
                         f"brings its own ({columns} columns): use --positives dropout")
    if config.method == "is-cse":
        check_buffer(config)
    if config.head == "keep" and METHODS[config.method].head is not Head:
        raise ValueError(f"--head keep: the head of --method {config.method} serves training only: "
                         "use --head train")
    if config.method == "sscl":
        check_layers(config, layers)
    if config.method == "cards":
        check_retrieval(config)
    if config.method == "debcse" and config.positives != "dropout":
        raise ValueError(f"--method debcse draws positives of its own, found --positives "
                         f"{config.positives}: use --positives dropout")
    attracts = config.method == "ifnd" and config.false_negatives == "attract"
    if attracts and config.loss != "info-nce":
        raise ValueError(f"--false-negatives attract has its own loss, found --loss {config.loss}: "
                         "use --loss info-nce, or --false-negatives eliminate")
    if config.method == "core-tuning":
        check_core_tuning(config)
    if config.method in ("fedrcl", "pnr") and config.loss != "info-nce":
        raise ValueError(f"--method {config.method} has a loss of its own, found --loss "
                         f"{config.loss}: use --loss info-nce")
    check_fedrcl(config, layers)
    check_teacher(config)


def check_core_tuning(config) -> None:
    """Core-tuning has a loss and a head of its own, and no weight on hard negatives."""
    for name, only in (("loss", "info-nce"), ("hard_negative_weight", 1), ("head", "none")):
        if getattr(config, name) not in (only, "recipe"):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--method core-tuning has a loss and a head of its own, found {flag} "
                             f"{getattr(config, name)}: use {flag} {only}, or --method simcse")
    if not config.contrast_weight + config.classifier_weight:
        raise ValueError("--contrast-weight and --classifier-weight are both 0, so there is "
                         "nothing to learn: use --contrast-weight 1")


def check_buffer(config) -> None:
    """IS-CSE's buffer must hold a batch and more rows than the neighbours asked for."""
    if not max(config.batch_size, config.neighbours + 1) <= config.buffer_size:
        raise ValueError(f"--buffer-size {config.buffer_size} must be at least the batch size "
                         f"({config.batch_size}) and more than --neighbours ({config.neighbours})")


def check_retrieval(config) -> None:
    """CARDS draws its negatives without repeats."""
    if config.retrieved > config.retrieve_from:
        raise ValueError(f"--retrieved {config.retrieved} must be at most --retrieve-from "
                         f"({config.retrieve_from}), of which they are drawn")


def check_layers(config, layers: int | None) -> None:
    """SSCL's negatives are layers: not the last, which makes the anchors, nor the embeddings."""
    if layers is not None and config.layers_as_negatives >= layers:
        raise ValueError(f"--layers-as-negatives: expected at most {layers - 1}, since "
                         f"{config.encoder} has {layers} layers and the last one makes the "
                         f"anchors, found {config.layers_as_negatives}")


def check_teacher(config) -> None:
    """KDMCSE learns from a teacher, with a loss of its own; most other methods take none."""
    if config.method != "kdmcse":
        if config.teacher and config.method not in ("twins", "debcse"):
            raise ValueError(f"--teacher {config.teacher}: --method {config.method} does not "
                             "learn from one: use --method kdmcse, or leave it out")
        return
    if not config.teacher:
        raise ValueError("--method kdmcse learns from a teacher: give --teacher a file of vectors "
                         "(.npy, .safetensors), an encoder's folder, a Hub id, or mini")
    if config.loss != "info-nce":
        raise ValueError(f"--method kdmcse has its own loss, InfoNCE with a margin on negatives, "
                         f"found --loss {config.loss}: use --loss info-nce")


def check_fedrcl(config, layers: int | None) -> None:
    """FedRCL compares pooled layers by a loss of its own, and one of its terms must count."""
    if config.method != "fedrcl":
        return
    if layers is not None and config.levels > layers:
        raise ValueError(f"--levels: expected at most {layers}, the layers of {config.encoder}, "
                         f"found {config.levels}")
    if config.head != "none":
        raise ValueError(f"--method fedrcl compares layers without a head, found --head "
                         f"{config.head}: use --head none")
    if not (config.ce_weight or config.scl_weight or config.penalty_weight):
        raise ValueError("--ce-weight, --scl-weight, --penalty-weight: expected one above 0, found "
                         "0 for each: nothing would be learned")

"""
How good is an encoder? Semantic textual similarity, and the shape of the embedding space.

    python eval_sts.py runs/mine                              # a folder, a Hub id, or mini
    python eval_sts.py bert-base-uncased --pooling first-last --verbose --json scores.json

Evaluation knows one thing about a model: `encode`, N sentences -> (N, D). `read_test` makes a test
of a name: `sts` (STS12-16, STS-B, SICK-R), `stsb`, `docs` (the built-in doc twins), or a file.

Scores are 100 x Spearman's ρ of cosines with human scores. A task with several subsets
has two: "all" ranks its pairs together, "mean" averages over subsets. SimCSE and we report "all".
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data as corpora
from engine import changes, hub
from engine.columns import own_file
from engine.docs import doc_twins
from engine.encoders import check_vocabulary, load
from engine.flags import Parser, complain, count, exits, pick_device, program
from engine.pairs import Pair, columns_of, read_pairs, rows_of
from engine.tables import plain, scores_text
from losses import alignment, cosine, uniformity
from model import POOLINGS, SentenceEncoder, encode

Encode = Callable[[Sequence[str]], Tensor]          # N sentences -> (N, D)
Sides = Callable[[list[Pair]], tuple[Tensor, Tensor]]   # P pairs -> 2 x (P, D)

# Scored pairs of every subset: a file with another count is damaged. STS15 and STS16 hold more
# pairs, but only these were given a score; STS13 lacks SMT, whose licence forbids copies.
STS = {"STS12": {"MSRpar": 750, "MSRvid": 750, "SMTeuroparl": 459, "surprise.OnWN": 750,
                 "surprise.SMTnews": 399},
       "STS13": {"FNWN": 189, "headlines": 750, "OnWN": 561},
       "STS14": {"deft-forum": 450, "deft-news": 300, "headlines": 750, "images": 750, "OnWN": 750,
                 "tweet-news": 750},
       "STS15": {"answers-forums": 375, "answers-students": 750, "belief": 375, "headlines": 750,
                 "images": 750},
       "STS16": {"answer-answer": 254, "headlines": 249, "plagiarism": 230, "postediting": 244,
                 "question-question": 209}}
STSB = {"train": 5749, "dev": 1500, "test": 1379}
SICK = {"train": 4500, "trial": 500, "test_annotated": 4927}


def counted(path: Path, rows: list, order: Sequence[int], expected: int) -> list[Pair]:
    """All the pairs of a file, whose number is known."""
    pairs = list(columns_of(path, rows, order))
    if len(pairs) != expected:
        raise ValueError(f"{path}: expected {expected} scored pairs, found {len(pairs)}: the file "
                         "is damaged or of another version")
    return pairs


def read_subset(folder: Path, name: str, expected: int) -> list[Pair]:
    """STS.input.NAME.txt beside STS.gs.NAME.txt; pairs without a score were never judged."""
    path = folder / f"STS.input.{name}.txt"
    texts, scores = rows_of(path), rows_of(folder / f"STS.gs.{name}.txt")
    if len(texts) != len(scores):
        raise ValueError(f"{path}: expected {len(scores)} lines, one for each line of "
                         f"STS.gs.{name}.txt, found {len(texts)}")
    judged = [(number, [*cells, score]) for (number, cells), (_, (score, *_)) in zip(texts, scores)
              if score.strip()]
    return counted(path, judged, (0, 1, 2), expected)


def read_stsb(senteval: Path, split: str) -> list[Pair]:
    """STS Benchmark: columns genre, file, year, id, score, sentence, sentence."""
    path = senteval / "STS" / "STSBenchmark" / f"sts-{split}.csv"
    return counted(path, rows_of(path), (5, 6, 4), STSB[split])


def read_sick(senteval: Path, split: str) -> list[Pair]:
    """SICK relatedness: a header, then id, sentence, sentence, score, entailment."""
    path = senteval / "SICK" / f"SICK_{split}.txt"
    return counted(path, rows_of(path)[1:], (1, 2, 3), SICK[split])


def read_seven(senteval: Path) -> dict[str, dict[str, list[Pair]]]:
    """The seven tasks of SimCSE's Table 5: task -> subset -> pairs."""
    tasks = {task: {name: read_subset(senteval / "STS" / f"{task}-en-test", name, expected)
                    for name, expected in subsets.items()} for task, subsets in STS.items()}
    return tasks | {"STS-B": {"test": read_stsb(senteval, "test")},
                    "SICK-R": {"test": read_sick(senteval, "test_annotated")}}


def spearman(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """100 x Spearman's ρ, ties at their average rank; NaN where one side is constant."""
    from scipy.stats import spearmanr                             # 0.4 s to import: only if used
    if len(set(predicted)) == 1 or len(set(gold)) == 1:           # a collapsed encoder
        return math.nan
    return 100 * float(spearmanr(predicted, gold).statistic)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def average(scores: dict[str, float]) -> float:
    """The mean of the scores, each rounded to two decimals first, as in SimCSE's tables."""
    return mean([round(score, 2) for score in scores.values()])


@dataclass(frozen=True)
class Result:
    """What a test found; `scores` and `mean` have a value per task, and "avg"."""
    scores: dict[str, float]                                      # "all"
    mean: dict[str, float] = field(default_factory=dict)          # over the subsets of each task
    subsets: dict[str, dict[str, float]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    geometry: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list] = field(default_factory=dict)        # see engine/changes.py


@dataclass(frozen=True)
class StsTest:
    """Pairs of sentences with human scores, by task and subset."""
    tasks: dict[str, dict[str, list[Pair]]]
    geometry_of: dict[str, list[Pair]] = field(default_factory=dict)   # name of a split -> pairs

    @property
    def by_task(self) -> list[list[Pair]]:
        """The pairs of every task, its subsets one after the other."""
        return [sum(subsets.values(), []) for subsets in self.tasks.values()]

    def sides(self, encode: Encode) -> Sides:
        """A function from pairs to their vectors; every sentence was encoded once, in one call."""
        groups = [pairs for subsets in self.tasks.values() for pairs in subsets.values()]
        groups += self.geometry_of.values()
        texts = sorted({text for pairs in groups for *both, _ in pairs for text in both})
        vectors, row = encode(texts), {text: i for i, text in enumerate(texts)}   # (N, D)
        return lambda pairs: tuple(vectors[[row[pair[side]] for pair in pairs]] for side in (0, 1))

    def score(self, encode: Encode) -> Result:
        sides = self.sides(encode)
        found = {task: score_task(subsets, sides) for task, subsets in self.tasks.items()}
        scores = {task: every for task, (every, _) in found.items()}
        subsets = {task: each for task, (_, each) in found.items()}
        means = {task: mean(list(each.values())) for task, each in subsets.items()}
        cosines = [F.cosine_similarity(*sides(pairs)).tolist() for pairs in self.by_task]
        return Result(
            scores | {"avg": average(scores)}, means | {"avg": average(means)}, subsets,
            {task: sum(map(len, subsets.values())) for task, subsets in self.tasks.items()},
            {name: geometry(pairs, *sides(pairs)) for name, pairs in self.geometry_of.items()},
            {"ranks": sum(map(changes.ranks_of, cosines), [])})

    def flips(self, before: dict, after: dict) -> str:
        """The pairs that moved most between two `answers`; "" where one is unknown."""
        return changes.pair_flips(self.by_task, before, after) if before and after else ""


def score_task(subsets: dict[str, list[Pair]], sides: Sides) -> tuple[float, dict[str, float]]:
    """The "all" score of a task, and the score of each of its subsets."""
    predicted = {name: F.cosine_similarity(*sides(pairs)).tolist()
                 for name, pairs in subsets.items()}
    gold = {name: [score for _, _, score in pairs] for name, pairs in subsets.items()}
    every = rank_cosines(sum(predicted.values(), []), sum(gold.values(), []))
    return every, {name: rank_cosines(predicted[name], gold[name]) for name in subsets}


def rank_cosines(cosines: Sequence[float], gold: Sequence[float]) -> float:
    """`spearman`; NaN where the cosines differ by rounding only, as those of equal sentences."""
    return spearman(cosines, gold) if max(cosines) - min(cosines) > 1e-6 else math.nan


def geometry(pairs: list[Pair], left: Tensor, right: Tensor) -> dict[str, float]:   # (P, D)s
    """Alignment of the pairs scored above 4, uniformity of all sentences, repeats included.

    SimCSE, section 2 and footnote 3.
    """
    same = torch.tensor([score > 4 for _, _, score in pairs])
    return {"alignment": alignment(left[same], right[same]).item() if same.any() else math.nan,
            "uniformity": uniformity(torch.cat([left, right])).item()}


@dataclass(frozen=True)
class TwinTest:
    """Find the NumPy or SciPy function by its first sentence, from that of its PyTorch namesake."""
    twins: list[tuple[str, str, str]]                             # name, torch's, numpy's

    def score(self, encode: Encode) -> Result:
        """acc@1: found first, in percent. mrr: 100 x the mean of 1 / rank."""
        _, ours, theirs = zip(*self.twins)
        sides = encode(ours + theirs).chunk(2)                      # (N, D) twice
        similarity = cosine(*sides)                                 # (N, N)
        own = similarity.diagonal()[:, None]                        # (N, 1)
        # A tie counts against the encoder, or a collapsed one would find all of them; so does NaN.
        rank = (~(similarity < own)).sum(dim=1).float()             # (N,), 1 is best
        first = 100 * (rank == 1).float().mean().item()
        return Result(scores={"acc@1": first, "mrr": 100 * (1 / rank).mean().item(), "avg": first},
                      pairs={"doc twins": len(self.twins)},
                      geometry={"doc twins": geometry([(*pair, 5.0) for _, *pair in self.twins],
                                                      *sides)},
                      answers={"ranks": rank.tolist(),
                               "found": [theirs[i] for i in similarity.argmax(dim=1)]})

    def flips(self, before: dict, after: dict) -> str:
        """The questions that moved most between two `answers`; "" where one is unknown."""
        return changes.twin_flips(self.twins, before, after) if before and after else ""


def read_test(name: str, data: Path | None = None, *, split: str = "test") -> StsTest | TwinTest:
    """A test by its name (`docs`, `stsb`, `sts`) or from a file of scored pairs."""
    if name == "docs":
        return TwinTest(doc_twins())
    if name not in ("stsb", "sts"):
        if name != "-" and "." not in name:
            raise ValueError("expected a test called docs, stsb or sts, or a .tsv, .csv or .jsonl "
                             f"file, found {name!r}")
        pairs = read_pairs(own_file(name, "a file of scored pairs"))
        title = Path(name.removesuffix(".gz")).stem
        return StsTest({title: {title: pairs}}, {title: pairs})
    senteval = hub.senteval_folder(data)
    if name == "stsb":
        pairs = read_stsb(senteval, split)
        return StsTest({"STS-B": {split: pairs}}, {f"STS-B {split}": pairs})
    whole = [pair for part in STSB for pair in read_stsb(senteval, part)]
    return StsTest(read_seven(senteval),
                   {"STS-B test": read_stsb(senteval, "test"), "STS-B whole": whole})


def open_encoder(folder: Path, *, pooling: str | None = None, head: str = "recipe"
                 ) -> tuple[SentenceEncoder, corpora.Tokenizer]:
    """Encoder and tokenizer of a folder, checked against each other; the user gets the notices.

    A `head` of training, other than "recipe", takes the place of the folder's own.
    """
    model = load(folder, pooling=pooling, tell=complain)
    if model.head and head != "recipe":
        complain(f"NOTICE: --head {head} takes the place of the Dense module of {folder}")
        model.head = None
    tokenizer = corpora.Tokenizer.read(folder)
    check_vocabulary(model.config, tokenizer.whole.get_vocab().values())
    return model, tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Score a sentence encoder.")
    parser.add_argument("encoder", help="a folder, a Hub id, or mini")
    parser.add_argument("--test", default="sts", help="sts, stsb, docs or a file of pairs [sts]")
    parser.add_argument("--split", default="test", choices=STSB, help="part of stsb [test]")
    parser.add_argument("--data", type=Path, help="folder with senteval/ (or MINCSE_DATA)")
    parser.add_argument("--pooling", choices=[*POOLINGS, "pooler"], help="tokens to sentence; "
                        "pooler: cls and the tanh layer on it [the folder's own, else cls]")
    parser.add_argument("--max-tokens", type=int, help="tokens of a sentence [the folder's limit]")
    parser.add_argument("--batch-size", type=count, default=64, help="sentences a pass [64]")
    parser.add_argument("--device", default="auto", help="processor: auto, cpu, cuda, mps [auto]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="number format [fp32]")
    parser.add_argument("--threads", type=count, default=0, help="processor threads [all]")
    parser.add_argument("--verbose", action="store_true", help="scores of every subset, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all scores")
    args = parser.parse_args(argv)
    if args.max_tokens is not None and args.max_tokens < 3:
        parser.error("--max-tokens must be at least 3: [CLS], a word and [SEP]")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with exits(2):
        device = pick_device(args.device)
    with exits(3):
        test = read_test(args.test, args.data, split=args.split)
        model, tokenizer = open_encoder(hub.encoder_folder(args.encoder), pooling=args.pooling)
    precision = torch.bfloat16 if args.precision == "bf16" else torch.float32
    result = test.score(partial(encode, model.to(device), tokenizer, batch_size=args.batch_size,
                                max_tokens=args.max_tokens, precision=precision))
    print(f"{args.encoder}: {args.pooling or model.pooling} pooling, "
          f"{args.max_tokens or model.max_tokens} tokens at most, {args.precision}\n\n"
          f"{scores_text(result, verbose=args.verbose)}")
    if args.json:
        with exits(2):
            scores = {name: found for name, found in asdict(result).items() if name != "answers"}
            args.json.write_text(json.dumps(plain(scores), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(program(main))

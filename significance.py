"""
Is one encoder better than another, or was it luck?

    python significance.py runs/b --against runs/a --data FOLDER
    python significance.py runs/b/seed-* --against runs/a/seed-* --data FOLDER

Luck comes in two kinds. Other pairs of sentences might have been in the test: `bootstrap` draws the
test again and again from its own pairs. Another seed might have been trained: `sign_flip_p` asks
how often chance alone would part the seeds so well. A gain that is no more than luck in either
sense is none. Of many comparisons some succeed by chance: `holm`.

Not here: scores (eval_sts.py), the table of many runs (report.py).
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data as corpora
from eval_sts import (StsTest, count, exits, likeness, markdown, open_encoder, pick_device,
                      read_test)
from model import encode

DRAWS = 10_000


# ---- other seeds ----------------------------------------------------------------------------

def sign_flip_p(differences: list[float]) -> float:
    """How often would chance give a mean difference of that size, were the two groups alike?

    Exact permutation test over paired seeds: each difference could as well have had the other sign.
    Two-sided; with n seeds the lowest possible value is 2 / 2^n, so three seeds never show more
    than 0.25.
    """
    size = abs(sum(differences))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences)))
            for signs in product((1, -1), repeat=len(differences))]
    return sum(s >= size - 1e-9 for s in sums) / len(sums)


def holm(values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that one false alarm among them is rare."""
    order, highest, corrected = sorted(range(len(values)), key=values.__getitem__), 0., {}
    for rank, i in enumerate(order):
        highest = max(highest, min(1., (len(values) - rank) * values[i]))
        corrected[i] = highest
    return [corrected[i] for i in range(len(values))]


# ---- other pairs ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Predictions:
    """One task: what people said of its P pairs, and the cosines of two groups of encoders.

    A value stands for all its equals by its number among the sorted values: ranks need no more.
    """
    sizes: list[int]                                              # pairs of every subset
    gold: np.ndarray                                              # (P,)
    ours: list[np.ndarray]                                        # an encoder each, (P,)
    theirs: list[np.ndarray]

    def gain(self, times: np.ndarray) -> float:                   # (P,)
        """Mean Spearman of ours minus theirs, x 100, where each pair occurs so many times."""
        gold = standard_ranks(self.gold, times)
        ours, theirs = (statistics.fmean(times @ (gold * standard_ranks(one, times))
                                         for one in group) for group in (self.ours, self.theirs))
        return 100 * (ours - theirs)


def numbered(values: list[float]) -> np.ndarray:
    """Every value's number among the different ones, from the smallest."""
    return np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1)


def standard_ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:          # (P,), (P,)
    """Ranks, equals at their average, centred and of length 1 over all occurrences.

    The product of two such rows, weighted by the occurrences, is Spearman's ρ; of equals only, 0.
    """
    equals = np.bincount(values, weights=times)
    ranks = (equals.cumsum() - (equals - 1) / 2)[values]
    ranks -= times @ ranks / times.sum()
    return ranks / max(np.sqrt(times @ ranks**2), 1e-9)


def draw(sizes: list[int], rng: np.random.Generator) -> np.ndarray:               # -> (P,)
    """How often each pair occurs in a test drawn anew, each subset from its own pairs."""
    return np.concatenate([np.bincount(rng.integers(size, size=size), minlength=size)
                           for size in sizes]).astype(float)


def bootstrap(tasks: dict[str, Predictions], *, draws: int = DRAWS, seed: int = 0
              ) -> dict[str, tuple[float, float, float, float]]:
    """Task, and "avg" -> gain, the 95 % interval's lower and upper end, two-sided p.

    Paired: both groups are scored on the same drawn pairs. Every task is drawn on its own, the
    average is theirs. p is at least 1 / draws. Percentiles: Efron & Tibshirani 1993, ch. 13.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([[task.gain(draw(task.sizes, rng)) for task in tasks.values()]
                      for _ in tqdm(range(draws), disable=None, unit="draw")])    # (draws, tasks)
    found = np.array([task.gain(np.ones(len(task.gold))) for task in tasks.values()])
    lines = {name: summary(*both) for name, *both in zip(tasks, found, drawn.T)}
    return lines | {"avg": summary(found.mean(), drawn.mean(axis=1))}


def summary(found: float, drawn: np.ndarray) -> tuple[float, float, float, float]:
    """Gain, interval and p of one task from its gains in all draws."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    return float(found), float(low), float(high), float(min(1, max(p, 1 / len(drawn))))


# ---- the program ----------------------------------------------------------------------------

def predict(test: StsTest, names: list[str]) -> list[dict[str, np.ndarray]]:
    """Per encoder: task -> the cosines of its pairs, numbered."""
    device, found = pick_device("auto"), []
    for name in names:
        model, tokenizer = open_encoder(corpora.encoder_folder(name))
        sides = test.sides(partial(encode, model.to(device), tokenizer))
        found.append({task: numbered(sum(likeness(subsets, sides).values(), []))
                      for task, subsets in test.tasks.items()})
    return found


def compare(test: StsTest, ours: list[dict], theirs: list[dict]) -> dict[str, Predictions]:
    """The same, task by task."""
    return {task: Predictions([len(pairs) for pairs in subsets.values()],
                              numbered([gold for pairs in subsets.values() for *_, gold in pairs]),
                              [one[task] for one in ours], [one[task] for one in theirs])
            for task, subsets in test.tasks.items()}


def over_seeds(test: StsTest, ours: list[dict], theirs: list[dict]) -> str:
    """The gain of every encoder over its partner, and what chance would say of that."""
    gains = [statistics.fmean(task.gain(np.ones(len(task.gold)))
                              for task in compare(test, [us], [them]).values())
             for us, them in zip(ours, theirs)]
    return (f"One by one: {', '.join(f'{gain:+.2f}' for gain in gains)}; "
            f"sign-flip test over them: p = {sign_flip_p(gains):.4f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare encoders on the same pairs of sentences.")
    parser.add_argument("encoders", nargs="+", help="folders or Hub ids, of one seed each")
    parser.add_argument("--against", nargs="+", required=True, metavar="ENCODER",
                        help="what they are compared with")
    parser.add_argument("--test", default="sts", help="sts, stsb or a .tsv file [sts]")
    parser.add_argument("--data", type=Path, help="folder with senteval/ (or MINCSE_DATA)")
    parser.add_argument("--draws", type=count, default=DRAWS, help=f"of the bootstrap [{DRAWS}]")
    args = parser.parse_args(argv)
    if args.test == "docs":
        parser.error("--test: expected sts, stsb or a .tsv file of scored pairs, found docs")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with exits(3):
        test = read_test(args.test, args.data)
        ours, theirs = predict(test, args.encoders), predict(test, args.against)
    lines = bootstrap(compare(test, ours, theirs), draws=args.draws)
    rows = [[name, *(f"{value:+.2f}" for value in values), f"{p:.4f}"]
            for name, (*values, p) in lines.items()]
    print(markdown([["", "gain", "from", "to", "p"], *rows], first=str.ljust))
    if len(ours) == len(theirs) > 1:
        print("\n" + over_seeds(test, ours, theirs))


if __name__ == "__main__":
    main()

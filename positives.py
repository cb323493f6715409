"""
What counts as *the same*? Ways to make a positive of a sentence.

Text views take a sentence and a random source and return a sentence; `POSITIVES` is their menu.
The first, `keep`, changes nothing and is the best known (SimCSE, Table 1): the encoder's dropout
makes the two views differ. `MemoryBuffer` works on embeddings instead: it blends a positive with
its nearest relatives among the last few batches (IS-CSE). `annotate` lets the encoder find the
sentences of a document that belong together (InfoCSE). `hard_pairs` finds the pairs of a labelled
batch that are hardest to tell apart, and `mix` blends them (Core-tuning).
"""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from losses import cosine


def keep(sentence: str, rng: random.Random) -> str:
    """The sentence itself: the encoder's dropout alone makes the two views differ (SimCSE)."""
    return sentence


def crop(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """A run of neighbouring words, `rate` of them cut off at the ends (SimCSE, Table 1)."""
    words = sentence.split()
    length = math.ceil(len(words) * (1 - rate))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def delete_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word is dropped with probability `rate`; one always stays (SimCSE, Table 1)."""
    words = sentence.split()
    return " ".join(word for word in words if rng.random() >= rate) or rng.choice(words)


def repeat_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Some words are said twice in place: none, or up to `rate` of them, at least up to two."""
    words = sentence.split()
    most = min(max(2, int(rate * len(words))), len(words))
    twice = set(rng.sample(range(len(words)), rng.randint(0, most)))
    return " ".join(f"{word} {word}" if i in twice else word for i, word in enumerate(words))


def swap_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """A word changes places with the next one with probability `rate`; none moves twice."""
    words, i = sentence.split(), 0
    while i < len(words) - 1:
        swap = rng.random() < rate
        if swap:
            words[i], words[i + 1] = words[i + 1], words[i]
        i += 1 + swap
    return " ".join(words)


def switch_case(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word's first letter changes its case with probability `rate` (CARDS, their v2).

    "a dog barks" -> "a Dog barks": the meaning stays, but a cased tokenizer cuts "Dog" into other
    tokens than "dog". An uncased one undoes the change, and this is then the same as `keep`.
    """
    return " ".join(flip(word) if rng.random() < rate else word for word in sentence.split())


def switch_case_quota(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """As `switch_case`, of a share `rate` of the words: one at least (CARDS, their v1)."""
    words = sentence.split()
    quota = max(1, round(rate * len(words)))
    letters = [i for i in rng.sample(range(len(words)), len(words)) if words[i][0].isalpha()]
    chosen = set(letters[:quota])
    return " ".join(flip(word) if i in chosen else word for i, word in enumerate(words))


def flip(word: str) -> str:
    """The other case for the first letter: "when" -> "When". "12th" stays; so does "ß", whose
    capital would be two letters."""
    first = word[0].upper() if word[0].islower() else word[0].lower()
    return first + word[1:] if word[0].isalpha() and len(first) == 1 else word


POSITIVES = {"dropout": keep, "crop": crop, "delete-words": delete_words,
             "repeat-words": repeat_words, "swap-words": swap_words,
             "switch-case": switch_case, "switch-case-quota": switch_case_quota}


class MemoryBuffer(nn.Module):
    """The last M embeddings, unit length. Only looked up, never learned from: no gradient enters.

    IS-CSE (He et al. 2023), section 3; sizes and order of operations are those of their code.
    """

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(slots, width))   # (M, D), oldest first

    @property
    def full(self) -> Tensor:                                     # () bool
        """Has every slot been written? As a tensor, so that asking does not halt a GPU."""
        return self.rows[0].any()

    @torch.no_grad()
    def push(self, x: Tensor) -> None:                            # (B, D)
        """The newest rows go in at the end, as many of the oldest leave."""
        assert len(x) <= len(self.rows), "a batch larger than the buffer would change its length"
        self.rows = torch.cat([self.rows[len(x):], F.normalize(x, dim=-1)])

    def smooth(self, x: Tensor, *, neighbours: int = 16, temperature: float = 2.0) -> Tensor:
        """Blend each embedding with its nearest memories; x itself was pushed just before.

            g = Σ_m w_m k_m,   w = softmax(x · k_m / β),   k = x and its K nearest rows

        The nearest row of all is x's own copy, so that rank is left out. Gradient flows through
        x as a member of its group and through its scores, never into the memory. β: 2.0.
        """
        x = F.normalize(x, dim=-1)                                                  # (B, D)
        ranks = (x.detach() @ self.rows.mT).topk(neighbours + 1).indices            # (B, 1 + K)
        group = torch.cat([x[:, None], self.rows[ranks[:, 1:]]], dim=1)             # (B, 1 + K, D)
        weight = (group @ x[:, :, None] / temperature).softmax(dim=1)               # (B, 1 + K, 1)
        return (weight * group).sum(dim=1)                                          # (B, D)


# ---- InfoCSE: the encoder finds positives for itself ----------------------------------------
# In the style of Yang et al. 2022. That clusters are sought inside a document is from a second-hand
# summary; the threshold, the kind of clustering and the filters are ours.

def words_of(sentence: str) -> list[str]:
    return sentence.lower().split()


def text_numbers(lines: list[str]) -> Tensor:                     # -> (N,)
    """Equal numbers where lines differ by case and white space only."""
    seen = {}
    return torch.tensor([seen.setdefault(" ".join(words_of(line)), len(seen)) for line in lines])


def is_title(line: str) -> bool:
    """At most 8 words and no mark of an end: how the titles of articles look in SimCSE's file."""
    return len(line.split()) <= 8 and line[-1] not in '.!?")'


def can_be_mate(line: str) -> bool:
    """Titles, fragments and lists would be the most alike of all, and teach nothing."""
    return 6 <= len(line.split()) <= 64 and not is_title(line)


def find_documents(lines: list[str], documents: list[int] | None, *, longest: int = 64
                   ) -> list[range]:
    """The rows of each document, long ones in parts; where no numbers tell, a title begins one.

    Fewer titles than one in 200 lines are taken to mean that the lines are shuffled (ours).
    """
    titles = list(map(is_title, lines))
    if documents is None and 200 * sum(titles) < len(lines):
        raise ValueError(
            "--method infocse seeks positives inside documents: expected a blank line between the "
            "documents of the corpus, or lines in order with titles between them, found "
            f"{sum(titles)} titles in {len(lines)} lines, so they seem shuffled: use another "
            "--corpus (wiki_docs, or a .txt with blank lines) or another --method")
    begins = [0]
    for row in range(1, len(lines)):
        new = titles[row] if documents is None else documents[row] != documents[row - 1]
        if new or row - begins[-1] == longest:
            begins.append(row)
    return [range(*ends) for ends in zip(begins, begins[1:] + [len(lines)])]


def average_linkage(likeness: np.ndarray, *, least: float, largest: int = 8) -> np.ndarray:
    """Merge the two clusters with the highest mean likeness, again and again.  (N, N) -> (N,)

        S(A ∪ B, C) = (|A| S(A, C) + |B| S(B, C)) / (|A| + |B|)

    Until no two with a mean of `least` or more fit into `largest` members. A cluster is named
    after its first member; of equal means the first in reading order is merged first.
    """
    n = len(likeness)
    if n < 2:
        return np.arange(n)
    s, sizes, name = np.array(likeness, np.float64), np.ones(n), np.arange(n)
    while True:
        fits = np.triu(sizes[:, None] + sizes <= largest, 1)
        a, b = divmod(int(np.where(fits, s, -np.inf).argmax()), n)
        if not (fits[a, b] and s[a, b] >= least):
            return name
        s[a] = s[:, a] = (sizes[a] * s[a] + sizes[b] * s[b]) / (sizes[a] + sizes[b])
        s[b] = s[:, b] = -np.inf                                  # b is part of a from now on
        sizes[a] += sizes[b]
        name[name == b] = a


def similarity_threshold(within: np.ndarray, across: np.ndarray, *, quantile: float) -> float:
    """From which cosine on two sentences of a document may be mates.

        δ = max(the quantile of cosines within documents, mean + 3 std of those across), in 0..0.95

    It has no scale of its own: it follows the encoder, whose cosines shrink as it learns.
    """
    floor = across.mean() + 3 * across.std() if len(across) else 0.0
    usual = np.quantile(within, quantile) if len(within) else 1.0
    return float(np.clip(max(usual, floor), 0.0, 0.95))


def jaccard(a: str, b: str) -> float:
    """Shared words among all words: 1 for a sentence and itself, in whatever case."""
    a, b = set(words_of(a)), set(words_of(b))
    return len(a & b) / len(a | b)


ANNOTATION_FIGURES = ("threshold", "coverage", "mean_cluster_size", "mate_cosine", "mate_jaccard")


@dataclass(frozen=True)
class Annotation:
    """What an encoder says about documents: which of their sentences mean the same."""
    threshold: float
    cluster: dict[int, int]                                       # row -> first row of its cluster
    pairs: list[tuple[int, int, float, float]]                    # rows i < j, cosine, Jaccard

    @property
    def coverage(self) -> float:
        """The share of rows that have a mate."""
        return len({row for pair in self.pairs for row in pair[:2]}) / len(self.cluster)

    def figures(self) -> list[float]:
        """ANNOTATION_FIGURES; where there is no cluster of two or more, the means are NaN."""
        sizes = [size for size in Counter(self.cluster.values()).values() if size > 1]
        means = [sum(x) / len(x) if x else math.nan for x in
                 (sizes, [pair[2] for pair in self.pairs], [pair[3] for pair in self.pairs])]
        return [self.threshold, self.coverage, *means]


def annotate(lines: list[str], documents: list[range], encode: Callable, *, quantile: float,
             largest: int = 8, seed: int = 0) -> Annotation:
    """Cluster the sentences of each document, by what the encoder makes of them at present.

    Where more than 60 % find a mate the threshold was too low: the quantile is raised once.
    """
    rows = [[row for row in document if can_be_mate(lines[row])] for document in documents]
    x = F.normalize(encode([lines[row] for part in rows for row in part]), dim=-1)  # (N, D)
    likeness = [(y @ y.mT).numpy() for y in x.split([len(part) for part in rows])]
    rng = np.random.default_rng(seed)                             # leaves the global one alone
    within = np.concatenate([s[np.triu_indices(len(s), 1)] for s in likeness])
    within = rng.choice(within, 2_000_000, replace=False) if len(within) > 2_000_000 else within
    across = cosines_across(x, rows, rng)
    for raised in (quantile, min(quantile + 0.03, 1)):
        least = similarity_threshold(within, across, quantile=raised)
        cluster, pairs = {row: row for document in documents for row in document}, []
        for part, s in zip(rows, likeness):
            names = average_linkage(s, least=least, largest=largest)
            cluster |= {row: part[name] for row, name in zip(part, names)}
            pairs += mates(lines, part, names, s, least=least)
        found = Annotation(least, cluster, pairs)
        if found.coverage <= 0.6:
            break
    return found


def cosines_across(x: Tensor, rows: list[list[int]], rng: np.random.Generator, *,
                   draws: int = 100_000) -> np.ndarray:           # (N, D) -> (draws,) at most
    """Cosines of sentences of two documents, drawn at random."""
    document = np.repeat(np.arange(len(rows)), [len(part) for part in rows])        # (N,)
    i, j = rng.integers(max(len(x), 1), size=(2, draws if len(x) else 0))
    apart = document[i] != document[j]
    return (x[i[apart]] * x[j[apart]]).sum(dim=-1).numpy()


def mates(lines: list[str], rows: list[int], names: np.ndarray, likeness: np.ndarray, *,
          least: float, too_alike: float = 0.8) -> list[tuple[int, int, float, float]]:
    """The pairs inside clusters that are positives: alike in meaning, and not trivially so.

    Average linkage lets in weak members, so each pair must reach `least` itself. Equal texts
    have all words in common.
    """
    found = []
    close = np.triu((names[:, None] == names) & (likeness >= least), 1)
    for i, j in np.argwhere(close):
        overlap = jaccard(lines[rows[i]], lines[rows[j]])
        if overlap < too_alike:
            found.append((rows[i], rows[j], float(likeness[i, j]), overlap))
    return found


def mate_table(pairs: list[tuple], rows: list[int], *, width: int,
               temperature: float = 0.1) -> tuple[Tensor, Tensor]:   # -> (R, width), (R, width)
    """Each row's mates and their chances: the softmax of cosine / τ, or zeros without a mate."""
    cosines = {row: {} for row in rows}
    for i, j, near, _ in pairs:
        cosines[i][j] = cosines[j][i] = near
    found = torch.zeros(len(rows), width, dtype=torch.int32)
    scores = torch.full((len(rows), width), -math.inf)
    for place, row in enumerate(rows):
        if mine := cosines[row]:
            found[place, : len(mine)] = torch.tensor(list(mine))
            scores[place, : len(mine)] = torch.tensor(list(mine.values()))
    return found, (scores / temperature).softmax(dim=1).nan_to_num()


def adjusted_rand(a: Tensor, b: Tensor) -> float:                 # (N,), (N,) labels -> -1..1
    """How much two clusterings agree: 1 on everything, 0 as much as by chance.

    Hubert & Arabie 1985: pairs of items together in both, corrected for chance.
    """
    both, in_a, in_b = (
        sum(math.comb(size, 2) for size in Counter(labels).values())
        for labels in (zip(a.tolist(), b.tolist()), a.tolist(), b.tolist()))
    expected, most = in_a * in_b / math.comb(len(a), 2), (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


# ---- Core-tuning: positives and negatives made harder ---------------------------------------

@dataclass(frozen=True)
class HardPairs:
    """What is mixed for each of B anchors, and with how much. Candidates: entailed, then denied."""
    positive: Tensor                  # (B,) entailed and least like the anchor
    negative: Tensor                  # (B,) the candidate most like it that is none of its group
    stranger: Tensor                  # (B,) any candidate of another group
    of_positive: Tensor               # (B, 1) its share of the mixed positive
    of_stranger: Tensor               # (B, 1) its share of the mixed negative


def mix(x: Tensor, other: Tensor, share: Tensor) -> Tensor:       # (B, D) twice, (B, 1) -> (B, D)
    """`share` of x, the rest of the other."""
    return share * x + (1 - share) * other


@torch.no_grad()
def hard_pairs(anchor: Tensor, candidates: Tensor, same: Tensor, *, alpha: float,
               rng: np.random.Generator) -> HardPairs:            # (B, D), (C, D), (B, B)
    """The least alike of each anchor's own group, the most alike of all others.

    Zhang et al. 2021 as the paper means it: what must not be chosen is filled with infinity. The
    released code fills with 0, below all of its cosines, and so chooses just that. Shares come
    from Beta(α, α); a stranger has 0.8 of a mixed negative at least. A denied hypothesis is a
    negative of its own premise, too, but no stranger.
    """
    copies, likeness = len(candidates) // len(anchor), cosine(anchor, candidates)   # (B, C)
    mates = F.pad(same, (0, len(candidates) - len(anchor)))                         # (B, C)
    chance = torch.from_numpy(rng.random(likeness.shape)).to(likeness)
    shares = torch.from_numpy(rng.beta(alpha, alpha, (2, len(anchor), 1))).to(likeness)
    return HardPairs(
        positive=likeness.masked_fill(~mates, math.inf).argmin(dim=1),
        negative=likeness.masked_fill(mates, -math.inf).argmax(dim=1),
        stranger=chance.masked_fill(same.repeat(1, copies), -1).argmax(dim=1),
        of_positive=shares[0], of_stranger=shares[1].clamp(min=0.8))


@dataclass(frozen=True)
class Others:
    """A row for each of B anchors, which it is paired with; in contrast, all see all rows."""
    vectors: Tensor                   # (B, D)
    positive: Tensor | None           # (B, B) of whom it is a positive
    counts: Tensor | None             # (B, B) who sees it at all; None where it is for pairs only
    label: Tensor                     # (B, 3) or (3,) of the pair: entailed, denied, unrelated


def harder(anchor: Tensor, entailed: Tensor, *denied: Tensor, same: Tensor, pairs: HardPairs,
           mixing: str) -> list[Others]:                          # (B, D) x 2 or 3, (B, B)
    """The columns of a batch, what is mixed of them and, for pairs only, the strangers.

    A mixed positive is that of one anchor, and does not count for others of its group. Where all
    rows are of one group there are no strangers, so nothing is mixed.
    """
    own = torch.eye(len(same), dtype=torch.bool, device=same.device)
    never, always = torch.zeros_like(same), torch.ones_like(same)
    yes, no, unrelated = torch.eye(3, device=anchor.device, dtype=anchor.dtype)
    found = [Others(entailed, same, always, yes), *(Others(x, never, always, no) for x in denied)]
    if same.all():
        return found
    x = torch.cat([entailed, *denied])                                              # (C, D)
    found.append(Others(x[pairs.stranger], None, None, unrelated))
    if mixing in ("both", "positives"):
        of_own = torch.arange(len(same), device=same.device) + len(same)            # if denied
        label = torch.where((pairs.negative == of_own)[:, None], no, unrelated)     # (B, 3)
        mixed = mix(entailed[pairs.positive], x[pairs.negative], pairs.of_positive)
        found.append(Others(mixed, own, own | ~same, mix(yes, label, pairs.of_positive)))
    if mixing in ("both", "negatives"):
        mixed = mix(x[pairs.stranger], anchor, pairs.of_stranger)
        found.append(Others(mixed, never, always, mix(unrelated, yes, pairs.of_stranger)))
    return found

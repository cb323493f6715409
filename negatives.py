"""
What counts as *different*? Finding negatives, drawing them, and leaving out those that are none.

    index           texts -> one vector each, at two bytes a number
    nearest_others  vectors -> for each row the rows most like it, exactly and never itself
    draw            rows -> some of each one's neighbours, by chance          (CARDS)
    input_weight    what a retrieved negative counts: nothing where it is the anchor itself

and for DebCSE, which draws both sides of a pair: `compare` measures likeness in meaning and on the
surface, `inverse_propensity` turns the two into chances, `draw_weighted` draws. Its candidates
come from `nearest_others`, `rare_word_mates`, `document_mates` and `random_others`.

`by_chance` says from which likeness on two texts are no negatives of each other (KDMCSE);
`kmeans`, `assign`, `accept` and `false_negatives` find such pairs by clusters (IFND).

A pool is an (N, C) tensor of numbers of texts, C candidates a row; -1 is an empty place.
Not here: views of a text (positives.py), losses and what a weight does to them (losses.py).
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


# ---- exact nearest neighbours ---------------------------------------------------------------

def index(encode: Callable, texts: Sequence[str], *, chunk: int = 8192) -> Tensor:  # -> (N, D)
    """The vectors of all texts in half precision: a million of width 768 take 1.5 GB."""
    width = encode(texts[:1]).shape[1]
    vectors = torch.empty(len(texts), width, dtype=torch.float16)
    for start in tqdm(range(0, len(texts), chunk), disable=None, desc="index", unit="chunk"):
        vectors[start : start + chunk] = encode(texts[start : start + chunk]).half()
    return vectors


@torch.no_grad()
def nearest_others(x: Tensor, k: int, *, chunk: int = 4096, device: torch.device | None = None
                   ) -> Tensor:                                   # (N, D) -> (N, K) int32
    """The k rows of highest cosine with each row, itself left out; the nearest comes first.

    Exact: 2·N²·D operations. All scores of a million rows would fill 4 TB, so those of chunk x
    chunk exist at a time: 64 MB. That many neighbours must exist.
    """
    if not 0 < k < len(x):
        raise ValueError(f"expected 1 to {len(x) - 1} neighbours, as there are {len(x)} different "
                         f"texts, found {k}")
    found = torch.empty(len(x), k, dtype=torch.int32)
    starts = range(0, len(x), chunk)
    for start in tqdm(starts, disable=None, desc="neighbours", unit="chunk"):
        rows = unit(x[start : start + chunk], device)             # (R, D), R up to chunk
        best, numbers = rows.new_empty(len(rows), 0), None
        for first in starts:
            scores = rows @ unit(x[first : first + chunk], device).mT               # (R, chunk)
            if first == start:
                scores.fill_diagonal_(-torch.inf)                 # nobody is their own negative
            top, at = scores.topk(min(k, scores.shape[1]))
            at = at + first
            both = at if numbers is None else torch.cat([numbers, at], dim=1)
            best, order = torch.cat([best, top], dim=1).topk(min(k, both.shape[1]))
            numbers = both.gather(1, order)                       # (R, K) at most
        found[start : start + chunk] = numbers
    return found


def unit(x: Tensor, device: torch.device | None = None) -> Tensor:
    """Length 1 and at least single precision, where it is computed with."""
    x = x.to(device)
    return F.normalize(x.float() if x.dtype == torch.float16 else x, dim=-1)


# ---- retrieved negatives (CARDS) ------------------------------------------------------------

def first_texts(texts: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Of the texts that share a number the first, in the order of their first appearance."""
    found = {}
    for text, number in zip(texts, numbers):
        found.setdefault(number, text)
    return list(found.values())


def draw(neighbours: Sequence[Sequence[int]], count: int, rng: random.Random) -> list[list[int]]:
    """`count` of each row's neighbours, all equally likely and none twice: count lists of B."""
    picks = [rng.sample(row, count) for row in neighbours]
    return [list(column) for column in zip(*picks)] if count else []


def input_weight(anchors: Tensor, retrieved: Tensor, *, alpha: float = 1.0) -> Tensor:
    """What each candidate counts: (B, T) anchors, (s·B, T) retrieved -> (B, B + s·B).

    1 for every positive and for what other anchors retrieved, α for what the anchor itself did
    (CARDS: α = e^β), 0 for a retrieved text that reads as the anchor does, token for token.
    """
    batch, share = len(anchors), len(retrieved) // len(anchors)
    own = torch.eye(batch, device=anchors.device).repeat(1, share)                  # (B, s·B)
    itself = (anchors[:, None] == retrieved).all(dim=-1)                            # (B, s·B)
    weight = (1 + (alpha - 1) * own).masked_fill(itself, 0)
    return torch.cat([torch.ones_like(weight[:, :1]).expand(-1, batch), weight], dim=1)


# ---- candidates (DebCSE) --------------------------------------------------------------------

EMPTY = -1


def random_others(n: int, count: int, generator: torch.Generator) -> Tensor:        # -> (N, C)
    """Any rows but the own, all equally likely."""
    away = torch.randint(1, n, (n, count), generator=generator)
    return (torch.arange(n)[:, None] + away) % n


def some_of(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:        # -> (N, C)
    """At most `count` of each row's candidates, all equally likely and none twice."""
    order = torch.rand(pool.shape, generator=generator)
    return pool.gather(1, order.topk(min(count, pool.shape[1]), dim=1).indices)


def document_mates(documents: Sequence[int] | None, n: int) -> Tensor:              # -> (N, 2)
    """The sentences just before and after in the same document; none where nobody knows."""
    mates = torch.full((n, 2), EMPTY)
    if documents is not None:
        inside = torch.tensor(documents).diff() == 0              # (N - 1,) is i + 1 with i?
        before = torch.arange(n - 1)
        mates[1:, 0] = torch.where(inside, before, EMPTY)
        mates[:-1, 1] = torch.where(inside, before + 1, EMPTY)
    return mates


def rare_word_mates(texts: Sequence[str], count: int, *, rare: float = 0.001) -> Tensor:
    """The texts that share the most rare words with each one: those in fewer than 0.1 % of them.

    (N, C). A word in two texts is always rare, or small corpora would have none.
    """
    words = [set(text.lower().split()) for text in texts]
    places = defaultdict(list)
    for number, own in enumerate(words):
        for word in own:
            places[word].append(number)
    known = {word: found for word, found in places.items()
             if 2 <= len(found) < max(3, rare * len(texts))}
    mates = torch.full((len(texts), count), EMPTY)
    for number, own in enumerate(tqdm(words, disable=None, desc="rare words", unit="text")):
        shared = Counter()
        for word in sorted(own & known.keys()):                   # sets have no order of their own
            shared.update(known[word])
        del shared[number]
        best = [other for other, _ in shared.most_common(count)]
        mates[number, : len(best)] = torch.tensor(best, dtype=torch.long)
    return mates


# ---- likeness on the surface (DebCSE) -------------------------------------------------------

@dataclass(frozen=True)
class Words:
    """Lower-cased words as numbers: equal words, equal numbers."""
    ids: Tensor                       # (N, T), padded
    lengths: Tensor                   # (N,)

    @classmethod
    def of(cls, texts: Sequence[str], *, most: int) -> "Words":
        """At most so many words of each text: none of the rest would reach the encoder."""
        known = {}
        rows = [[known.setdefault(word, len(known)) for word in text.lower().split()[:most]]
                for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)
        for place, row in zip(ids, rows):
            place[: len(row)] = torch.tensor(row, dtype=torch.int32)
        return cls(ids, torch.tensor([len(row) for row in rows]))

    def __getitem__(self, rows: Tensor) -> "Words":
        return Words(self.ids[rows], self.lengths[rows])


def edit_distance(a: Words, b: Words) -> Tensor:                  # P pairs -> (P,)
    """Levenshtein's: the fewest words to put in, take out or exchange that turn a into b.

    Row i of the table holds the distances from the first i words of a to every beginning of b.
    """
    places = torch.arange(b.ids.shape[1] + 1, dtype=torch.int32)                    # (T + 1,)
    row = places.expand(len(a.ids), -1)                                             # (P, T + 1)
    last = row
    for i in range(1, int(a.lengths.max()) + 1):
        exchange = row[:, :-1] + (a.ids[:, i - 1, None] != b.ids)
        row = torch.cat([torch.full_like(row[:, :1], i),
                         torch.minimum(exchange, row[:, 1:] + 1)], dim=1)
        row = (row - places).cummin(dim=1).values + places        # putting in, from left to right
        last = torch.where(a.lengths[:, None] == i, row, last)
    return last.gather(1, b.lengths[:, None])[:, 0]


def surface_bin(a: Words, b: Words, bins: int) -> Tensor:         # P pairs -> (P,)
    """The bin of surf = 1 - distance / longer length: 0 nothing in common, bins - 1 (nearly) equal.

    In whole numbers, as 1 - 9/10 is a little less than 1/10 in floating point.
    """
    longer = torch.maximum(a.lengths, b.lengths)
    return (bins * (longer - edit_distance(a, b)) // longer).clamp(max=bins - 1)


# ---- inverse propensity (DebCSE) ------------------------------------------------------------

@torch.no_grad()
def compare(vectors: Tensor, words: Words, pool: Tensor, *, bins: int, chunk: int = 512
            ) -> tuple[Tensor, Tensor]:                           # (M, D), (N, C) -> (N, C) twice
    """How alike each row and its candidates are in meaning, and in which bin on the surface.

    Meaning: the cosine, or 0 where that is below. Empty places have a likeness of NaN.
    """
    alike, surface = [], []
    for start in tqdm(range(0, len(pool), chunk), disable=None, desc="likeness", unit="chunk"):
        some = pool[start : start + chunk]                                          # (R, C)
        rows = torch.arange(start, start + len(some))
        cosines = (unit(vectors[some]) @ unit(vectors[rows])[:, :, None])[..., 0]   # (R, C)
        alike.append(cosines.clamp(min=0).masked_fill(some == EMPTY, torch.nan))
        pairs = surface_bin(words[rows.repeat_interleave(some.shape[1])], words[some.flatten()],
                            bins)
        surface.append(pairs.view_as(some))
    return torch.cat(alike), torch.cat(surface)


def propensity(surface: Tensor, kept: Tensor, bins: int) -> Tensor:   # (N, C) twice -> (K,)
    """With which probability the rule that made the pool emits a pair of each bin."""
    return torch.bincount(surface[kept], minlength=bins).double() / kept.sum()


def inverse_propensity(relevance: Tensor, surface: Tensor, emitted: Tensor, *, least: float
                       ) -> Tensor:                               # (N, C) twice, (K,) -> (N, C)
    """The chance of each candidate, corrected for how its surface favours it.

        p_c = w_c / Σ_c w_c,   w_c = r_c / max(e(bin of c), e_min)

    Without the clip a single odd pair would be drawn over and over. Where no candidate is
    relevant all chances are 0. In the style of DebCSE (Miao, Du, Zhang 2023); the formula is ours.
    """
    weight = relevance.double() / emitted.clamp(min=least)[surface]
    total = weight.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weight / total, 0)


def draw_weighted(pool: Tensor, chance: Tensor, other: Tensor, *, share: float, count: int,
                  generator: torch.Generator) -> Tensor:          # (N, C) twice, (N,) -> (N, E)
    """`count` draws a row: by chance from the pool, with probability `share` the `other`.

    Where all chances are 0 it is the other always.
    """
    chance = (1 - share) * chance
    last = 1 - chance.sum(dim=1, keepdim=True)
    last = last.where(last > 1e-9, 0)                             # what only rounding left is none
    at = torch.multinomial(torch.cat([chance, last], dim=1), count, replacement=True,
                           generator=generator)
    return torch.cat([pool, other[:, None]], dim=1).gather(1, at)


def effective_size(chance: Tensor) -> float:                      # (N, C) -> ()
    """Between how many candidates the draw really chooses: mean of 1 / Σ p² where there are any."""
    squares = chance.square().sum(dim=1)
    return (1 / squares[squares > 0]).mean().item()


# ---- debiased pairs: all of it together (DebCSE) --------------------------------------------

@dataclass(frozen=True)
class Pairs:
    """E positives and E negatives of each of N texts, by number."""
    positives: Tensor                 # (N, E) into vectors and words: texts and rewritings
    negatives: Tensor                 # (N, E) into texts
    limit: float                      # a likeness above it makes a false negative
    report: str


def debiased_pairs(texts: Sequence[str], vectors: Tensor, words: Words, *, bins: int,
                   twin_rate: float, count: int, seed: int,
                   documents: Sequence[int] | None = None, device: torch.device | None = None
                   ) -> Pairs:
    """Draw pairs by what they mean, against the habits of the rules that propose them.

    `vectors` and `words` are of the N texts and then of their rewritings: number s·N + i is
    rewriting s of text i. Two thresholds on likeness belong to the encoder, so they are set by
    what it says of random pairs: 95 % lie below that of negatives, 1 in 1000 above the other.
    """
    n, generator = len(texts), torch.Generator().manual_seed(seed)
    measure = partial(compare, vectors, words, bins=bins)
    by_chance = random_others(n, min(64, max(1, 1_000_000 // n)), generator)
    alike, surface = measure(by_chance)
    low, high = alike.flatten().quantile(torch.tensor([0.95, 0.999]))
    emitted = propensity(surface, alike >= 0, bins)
    nearest = nearest_others(vectors[:n], min(200, n - 1), device=device).long()    # (N, 200)
    least_alike = by_chance.gather(1, alike.argmin(dim=1, keepdim=True))[:, 0]      # (N,)

    pool = positive_pool(n, len(vectors) // n - 1, documents, nearest)
    alike, surface = measure(pool)
    chance = inverse_propensity(alike.where(alike >= high, 0), surface,
                                propensity(surface, pool != EMPTY, bins), least=0.02)
    positives = draw_weighted(pool, chance, torch.arange(n), share=twin_rate, count=count,
                              generator=generator)
    report = (f"positives have a likeness of {high:.2f} or more, chosen among "
              f"{effective_size(chance):.1f} candidates; {(chance.sum(1) == 0).float().mean():.0%} "
              "of the texts have none but their twin")

    pool = negative_pool(texts, nearest, generator)
    alike, surface = measure(pool)
    chance = inverse_propensity((1 - alike).where(alike <= low, 0), surface, emitted, least=0.01)
    negatives = draw_weighted(pool, chance, least_alike, share=0, count=count, generator=generator)
    return Pairs(positives, negatives, low.item(), f"{report}; negatives {low:.2f} or less, among "
                 f"{effective_size(chance):.1f}")


def positive_pool(n: int, rewritings: int, documents: Sequence[int] | None, nearest: Tensor
                  ) -> Tensor:                                    # -> (N, C)
    """All rewritings of a text, its neighbours in the document and the eight nearest in meaning."""
    rewritten = torch.arange(n)[:, None] + n * torch.arange(1, 1 + rewritings)
    return torch.cat([rewritten, document_mates(documents, n), nearest[:, :8]], dim=1)


def negative_pool(texts: Sequence[str], nearest: Tensor, generator: torch.Generator) -> Tensor:
    """16 texts by chance, 8 that share rare words, 8 of the 50th to 200th nearest in meaning."""
    return torch.cat([random_others(len(texts), 16, generator), rare_word_mates(texts, 8),
                      some_of(nearest[:, 49:200], 8, generator)], dim=1)


# ---- too alike to be different (KDMCSE) -----------------------------------------------------

def by_chance(rows: Tensor, seed: int, *, pairs: int = 10_000) -> float:            # (N, D) -> ()
    """The cosine that one random pair in a thousand exceeds, at least 0.5.

    Encoders differ in how alike they find everything, so no one threshold suits all teachers.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(rows), (pairs,), generator=generator)
    away = torch.randint(1, len(rows), (pairs,), generator=generator)               # never itself
    likeness = F.cosine_similarity(rows[first].float(), rows[(first + away) % len(rows)].float())
    return max(likeness.quantile(0.999).item(), 0.5)


# ---- together in a cluster, so not different (IFND) -----------------------------------------

@torch.no_grad()
def kmeans(x: Tensor, k: int, *, seed: int, iterations: int = 20,
           device: torch.device | None = None) -> Tensor:         # (N, D) -> (K, D)
    """The centres of k clusters on the unit sphere, fewer where fewer rows differ.

    Lloyd's algorithm from the starts of k-means++, on 256·k rows at most: up to 512·K²·D
    operations an iteration. A cluster that nobody is in starts anew at the row worst served.
    """
    generator = torch.Generator().manual_seed(seed)
    x = unit(x[torch.randperm(len(x), generator=generator)[: 256 * k]], device)
    centres = far_apart(x[: 50 * k], k, generator)
    for _ in range(iterations):
        label, likeness, _ = assign(x, centres)
        total = torch.zeros_like(centres).index_add_(0, label, x)
        empty = torch.bincount(label, minlength=len(centres)) == 0
        total[empty] = x[likeness.argsort()[: empty.sum()]]
        centres = F.normalize(total, dim=-1)
    return centres


def far_apart(x: Tensor, k: int, generator: torch.Generator) -> Tensor:   # (N, D) -> (K, D)
    """k rows, each drawn by its squared distance from the nearest one before (k-means++).

    Arthur & Vassilvitskii 2007. On unit length that distance is 2 - 2 cos.
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = torch.full_like(x[:, 0], torch.inf)                # (N,) halved
    while len(chosen) < k:
        distance = torch.minimum(distance, 1 - x @ x[chosen[-1]])
        distance[distance < 1e-6] = 0                             # rounding, between equal rows
        if not distance.any():
            break
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
    return x[chosen]


@torch.no_grad()
def assign(x: Tensor, centres: Tensor, *, temperature: float = 0.1, chunk: int = 8192
           ) -> tuple[Tensor, Tensor, Tensor]:                    # (N, D), (K, D) -> (N,) x 3
    """The cluster of each row, its cosine with that centre, and how sure the choice is.

    Sure: softmax_k(cos / τ) at the chosen one. Only its rank is used (ours).
    """
    found = []
    for rows in x.split(chunk):
        cosines = unit(rows, centres.device) @ centres.mT         # (chunk, K)
        best, label = cosines.max(dim=1)
        sure = (cosines / temperature).softmax(dim=1).gather(1, label[:, None])[:, 0]
        found.append((label, best, sure))
    return tuple(map(torch.cat, zip(*found)))


def accept(label: Tensor, sure: Tensor, share: float) -> Tensor:  # (N,), (N,) -> (N,)
    """The labels of the surest rows, exactly floor(share · N); EMPTY for the others.

    Of equally sure rows the first ones, so that a greater share contains the smaller.
    """
    order = sure.argsort(descending=True, stable=True)
    return label.index_fill(0, order[math.floor(share * len(label)) :], EMPTY)


def false_negatives(label: Tensor) -> Tensor:                     # (B,) -> (B, B) bool
    """Which pairs share a label that was accepted of both; nobody is a negative of itself."""
    same = (label[:, None] == label) & (label != EMPTY)
    return same.fill_diagonal_(False)


# ---- classes that nobody gave (FedRCL) ------------------------------------------------------

def topics(x: Tensor, count: int, *, seed: int) -> Tensor:        # (N, D) -> (N,)
    """The number of each row's k-means cluster, from 0: a class for those who have no labels.

    On directions from the mean: all vectors of an encoder without training share one direction.
    """
    x = unit(x.float() - x.float().mean(dim=0))
    return assign(x, kmeans(x, count, seed=seed))[0]

"""
DebCSE: pairs that are proposed too often, for their words alone, are drawn less often.

Unlike SimCSE: the positive is a changed or another text, and every sentence has a hard negative.
    prepare   E positives and E negatives of every sentence, drawn from pools with the chances
                  p_c = w_c / Σ_c w_c,   w_c = r_c / max(e(surface of c), e_min)
                  of a positive r_c = sem if sem >= θ+, of a negative 1 - sem if sem <= θ-, else 0
                  θ+ is the 99.9 % quantile of sem over random pairs, θ- the 95 %. If θ+ is 0.7,
                  sem 0.95 at e 0.4 weighs 2.4, sem 0.80 at e 0.2 weighs 4.0, sem 0.60 nothing
    views     the sentence, one of its positives and one of its negatives
    loss      InfoNCE; positives of other anchors with sem > θ- are false negatives and left out

A rule that changes a text leaves most words as they are; random texts share hardly a word. So that
the model learns to compare meanings instead of words, each candidate is divided by e, the
share of its pool with such a surface. `sem` is the cosine of a frozen teacher.

In the style of Miao, Du, Zhang: CIKM 2023, arXiv 2309.07396. The abstract has inverse propensity
from surface and meaning; formulas, pools, thresholds and defaults are ours, and no code was found.
A step costs 1.75 times SimCSE's; `prepare` costs 5 encodings of the corpus, 2·N²·D operations and
50 to 110 edit distances a sentence.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Corpus
from engine.encoders import read_config
from engine.flags import Row, complain, flag
from engine.hub import encoder_folder
from losses import cosine
from papers import settings
from papers.corpus import EMPTY, index, nearest_others, open_teacher, unit, words_of
from papers.simcse import Encoded, SimCSE, own_hard_negative
from papers.views import delete_words, keep, repeat_words


@dataclass(frozen=True)
class Config(settings.Config):
    teacher: str = flag("", "debcse", "judge of meaning; default: the encoder as it starts")
    propensity_bins: int = flag(10, "debcse", "bins of surface similarity; 1: uncorrected", least=1)
    own_rate: float = flag(0.25, "debcse", "share of draws where a sentence is its own positive",
                            least=0, most=1)


# Each rule twice. A third one, synonyms, would need a dictionary that few machines have.
VERSIONS = [keep, *[partial(repeat_words, rate=0.32), partial(delete_words, rate=0.2)] * 2]


class DebCSE(SimCSE):
    """Texts have numbers: v·N + i is version v of sentence i, and version 0 the sentence itself."""
    Config = Config
    rows = [Row("--method debcse --teacher ENCODER", "pairs drawn by inverse propensity",
                "Miao, Du, Zhang: DebCSE. CIKM 2023, arXiv 2309.07396",
                "BERT-base 80.33 (theirs; the formulas here are ours, after the abstract)")]
    recipes = {"roberta-base": dict(batch_size=128, learning_rate=1e-5),            # ours
               "small": dict(batch_size=128)}
    columns_taken = (1,)
    positives_taken = ("dropout",)    # the text itself, as it draws changed ones of its own
    hard_negatives = True
    for_views = ("positives", "negatives")

    @classmethod
    def check(cls, config, corpora, shape):
        if config.teacher.endswith(".npy"):
            raise ValueError(f"--teacher {config.teacher} has vectors of the corpus only, and "
                             "--method debcse asks about changed texts: use an encoder as teacher")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        n, draws = len(corpus), config.epochs                     # N, E
        judge = read_config(encoder_folder(config.teacher)) if config.teacher else model.config
        self.register_buffer("positives", torch.zeros(draws, n, dtype=torch.int32))
        self.register_buffer("negatives", torch.zeros(draws, n, dtype=torch.int32))
        self.register_buffer("limit", torch.ones(()))             # θ-
        self.register_buffer("of_sentences", torch.zeros(n, judge.width).half())    # (N, Dt)
        self.register_buffer("of_positives", torch.zeros(draws, n, judge.width).half())

    def prepare(self, encode: Callable) -> None:
        config, device = self.config, self.limit.device
        judge = partial(encode, pooling=config.pooling)
        if config.teacher:
            judge = open_teacher(config, self.corpus)
        else:
            complain(f"WARNING: meaning is judged by {config.encoder} as it starts; use --teacher "
                     "with one that was trained on sentences, such as a simcse run")
        every = [self.text(number) for number in range(len(VERSIONS) * len(self.corpus))]
        vectors = index(partial(judge, max_tokens=config.max_tokens), every)        # (5N, Dt)
        words = word_numbers(every, most=config.max_tokens)                         # (5N, T)
        positives, negatives, limit = debiased_pairs(self.corpus, vectors, words, config, device)
        self.positives.copy_(positives)
        self.negatives.copy_(negatives)
        self.limit.fill_(limit)
        self.of_sentences.copy_(vectors[: len(self.corpus)])
        self.of_positives.copy_(vectors[positives])

    def search(self, vectors: Tensor) -> Tensor:                  # (N, Dt) -> (N, 200)
        return nearest_texts(vectors, self.limit.device)

    def text(self, number: int) -> str:
        """The text of a number, made when it is asked for, and always the same."""
        version, row = divmod(number, len(self.corpus))
        rng = random.Random(f"{self.config.seed} {number}")
        return VERSIONS[version](self.corpus.columns[0][row], rng)

    def which(self, rows: Tensor) -> Tensor:                      # (B,) -> (B,)
        """Which of the E pairs the rows of a batch take; in the next epoch most take another."""
        return (rows.sum() % len(self.positives)).expand(len(rows))

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        own = torch.tensor(rows)
        pair = self.which(own), own                               # (B,)s
        columns = own, self.positives[pair], self.negatives[pair]
        return [[self.text(number) for number in column.tolist()] for column in columns]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, positives = len(out.anchor), self.of_positives[self.which(out.rows), out.rows]
        meaning = cosine(self.of_sentences[out.rows].float(), positives.float())    # (B, B)
        false = (meaning > self.limit).fill_diagonal_(False)
        weight = own_hard_negative(out.anchor, self.config.hard_negative_weight)
        weight[:, :batch].masked_fill_(false, 0)
        # The share of the other positives of the batch that was left out.
        self.terms = {"false_negatives": false.sum() / (batch * (batch - 1))}
        return self.loss_of(out.anchor, torch.cat(out.columns[1:]), weight=weight)


def debiased_pairs(corpus: Corpus, vectors: Tensor, words: Tensor, config: Config,
                   device: torch.device | None = None) -> tuple[Tensor, Tensor, float]:
    """E positives and E negatives of each sentence, (E, N)s of numbers, and the threshold θ-."""
    n, count = len(corpus), config.epochs
    bins, generator = config.propensity_bins, torch.Generator().manual_seed(config.seed)
    measure = partial(similarities, vectors.to(device), words.to(device), bins=bins)
    # Cosines differ from teacher to teacher, so random pairs set the thresholds: 64 a text, or
    # a million in all.
    pool = random_others(n, min(64, max(1, 1_000_000 // n)), generator)
    meaning, surface = measure(pool)
    low, high = meaning.flatten().quantile(torch.tensor([0.95, 0.999]))             # θ-, θ+
    e_random = propensity(pool, surface, bins)
    farthest = pool.gather(1, meaning.argmin(dim=1, keepdim=True))[:, 0]            # (N,)
    nearest = nearest_texts(vectors[:n], device).long()           # (N, 200)

    pool = positive_pool(len(vectors) // n, corpus.documents, nearest)
    meaning, surface = measure(pool)
    e, relevance = propensity(pool, surface, bins), meaning.where(meaning >= high, 0)
    chance = inverse_propensity(relevance, surface, e, least=0.02)
    positives = draw_weighted(pool, chance, torch.arange(n), count, generator, config.own_rate)
    alone = (~chance.any(dim=1)).float().mean()

    pool = negative_pool(corpus.columns[0], nearest, generator)
    meaning, surface = measure(pool)
    relevance = (1 - meaning).where(meaning <= low, 0)
    chance = inverse_propensity(relevance, surface, e_random, least=0.01)
    negatives = draw_weighted(pool, chance, farthest, count, generator)
    complain(f"positives have a similarity of {high:.2f} or more, negatives of {low:.2f} or less; "
             f"{alone:.0%} of the texts are their only positive")
    return positives.T, negatives.T, low.item()


def nearest_texts(x: Tensor, device: torch.device | None = None) -> Tensor:   # (N, D) -> (N, 200)
    return nearest_others(x, min(200, len(x) - 1), device=device)


def propensity(pool: Tensor, surface: Tensor, bins: int) -> Tensor:    # (N, C) twice -> (bins,)
    """e: the share of each bin of surface among all pairs of a pool."""
    there = pool != EMPTY
    return torch.bincount(surface[there], minlength=bins).double() / there.sum()


def inverse_propensity(relevance: Tensor, surface: Tensor, e: Tensor, *, least: float) -> Tensor:
    """The chances p (N, C) of the candidates of each row, all 0 where none is relevant."""
    # Without the clip, e_min, a single odd pair would be drawn over and over.
    weight = relevance.double() / e.clamp(min=least)[surface]
    return (weight / weight.sum(dim=1, keepdim=True)).nan_to_num()


def draw_weighted(pool: Tensor, chance: Tensor, other: Tensor, count: int,
                  generator: torch.Generator, rate: float = 0.0) -> Tensor:         # -> (N, count)
    """`count` draws a row: `other` with probability `rate`, or always if all chances are 0."""
    chance = (1 - rate) * chance
    last = F.threshold(1 - chance.sum(dim=1, keepdim=True), 1e-9, 0)   # 0 where rounding left it
    at = torch.multinomial(torch.cat([chance, last], dim=1), count, replacement=True,
                           generator=generator)
    return torch.cat([pool, other[:, None]], dim=1).gather(1, at)


def positive_pool(versions: int, documents: Sequence[int] | None, nearest: Tensor) -> Tensor:
    """The changed versions of a text, its neighbours in the document, the 8 nearest in meaning."""
    n = len(nearest)
    changed = torch.arange(n)[:, None] + n * torch.arange(1, versions)
    beside = torch.full((n, 2), EMPTY)                            # just before and just after
    if documents is not None:
        [first] = (torch.tensor(documents).diff() == 0).nonzero(as_tuple=True)      # i with i + 1
        beside[first + 1, 0], beside[first, 1] = first, first + 1
    return torch.cat([changed, beside, nearest[:, :8]], dim=1)


def negative_pool(texts: Sequence[str], nearest: Tensor, generator: torch.Generator) -> Tensor:
    """16 random texts, 8 that share rare words, 8 of the 50th to 200th nearest in meaning."""
    others, far = random_others(len(texts), 16, generator), nearest[:, 49:200]
    some = torch.rand(far.shape, generator=generator).topk(min(8, far.shape[1]), dim=1).indices
    return torch.cat([others, rare_word_neighbours(texts, 8), far.gather(1, some)], dim=1)


def random_others(n: int, count: int, generator: torch.Generator) -> Tensor:        # -> (N, C)
    """Any rows but the own, all equally likely."""
    return (torch.arange(n)[:, None] + torch.randint(1, n, (n, count), generator=generator)) % n


def rare_word_neighbours(texts: Sequence[str], count: int) -> Tensor:               # -> (N, C)
    """The texts that share the most rare words with each: words in fewer than `common` texts."""
    # A word in two texts is rare in any corpus, or a small one would have no rare words at all.
    places, common = defaultdict(list), max(3, 0.001 * len(texts))
    for number, text in enumerate(texts):
        for word in set(words_of(text)):
            places[word].append(number)
    found = torch.full((len(texts), count), EMPTY)
    for number, text in enumerate(tqdm(texts, disable=None, desc="rare words", unit="text")):
        words = sorted({*words_of(text)})                         # sets have no order of their own
        shared = Counter(chain(*(places[word] for word in words if len(places[word]) < common)))
        del shared[number]
        best = [other for other, _ in shared.most_common(count)]
        found[number, : len(best)] = torch.tensor(best, dtype=torch.long)
    return found


@torch.no_grad()
def similarities(vectors: Tensor, words: Tensor, pool: Tensor, *, bins: int, chunk: int = 512
                 ) -> tuple[Tensor, Tensor]:                      # (N, C) -> (N, C) twice
    """`sem` of each text with its candidates, NaN where EMPTY, and the bins of surface."""
    meaning, surface = [], []
    blocks = tqdm(torch.arange(len(pool)).split(chunk), disable=None, desc="similarity")
    for rows, some in zip(blocks, pool.split(chunk)):
        rows, some = rows.to(vectors.device), some.to(vectors.device)               # (R,), (R, C)
        cosines = (unit(vectors[some]) @ unit(vectors[rows])[:, :, None])[..., 0]   # (R, C)
        meaning.append(cosines.clamp(min=0).masked_fill(some == EMPTY, torch.nan))
        own = words[rows.repeat_interleave(some.shape[1])]        # (R · C, T)
        surface.append(surface_bin(own, words[some.flatten()], bins).view_as(some))
    return torch.cat(meaning).cpu(), torch.cat(surface).cpu()


def word_numbers(texts: Sequence[str], *, most: int) -> Tensor:   # -> (N, T), EMPTY behind the last
    """The first `most` words of each text as numbers: about what the encoder sees."""
    known, found = {}, torch.full((len(texts), most), EMPTY, dtype=torch.int32)
    for row, text in zip(found, texts):
        words = [known.setdefault(word, len(known)) for word in words_of(text)[:most]]
        row[: len(words)] = torch.tensor(words, dtype=torch.int32)
    return found


def surface_bin(a: Tensor, b: Tensor, bins: int) -> Tensor:       # (P, T) twice -> (P,)
    """The bin of 1 - edit distance / longer length: 0 if nothing matches, the last if all does."""
    # In whole numbers, as 1 - 9/10 is a little less than 1/10 in floating point.
    longer = torch.maximum((a != EMPTY).sum(dim=1), (b != EMPTY).sum(dim=1))        # (P,)
    return (bins * (longer - edit_distance(a, b)) // longer).clamp(max=bins - 1)


def edit_distance(a: Tensor, b: Tensor) -> Tensor:                # (P, T) twice -> (P,)
    """Levenshtein's: the fewest words to put in, take out or exchange that turn a into b."""
    length, other = (a != EMPTY).sum(dim=1), (b != EMPTY).sum(dim=1)                # (P,)
    places = torch.arange(b.shape[1] + 1, dtype=torch.int32, device=b.device)       # (T + 1,)
    # Row i holds the distances from the first i words of a to every beginning of b.
    row = last = places.expand(len(a), -1)                                          # (P, T + 1)
    for i in range(1, int(length.max()) + 1):
        exchange = row[:, :-1] + (a[:, i - 1, None] != b)
        row = F.pad(torch.minimum(exchange, row[:, 1:] + 1), (1, 0), value=i)
        row = (row - places).cummin(dim=1).values + places        # putting in, from left to right
        last = torch.where(length[:, None] == i, row, last)
    return last.gather(1, other[:, None])[:, 0]

"""
What do several papers do with a whole corpus? Index, nearest neighbours, k-means, a teacher.

    words_of, text_numbers     which texts are equal?
    rows_of_run, hold_out      which rows will training see, and which does it never see?
    index, nearest_others      texts -> vectors -> the nearest neighbours of each
    kmeans, assign             vectors -> centres -> the cluster of each
    open_teacher               the name of another encoder -> a function that gives vectors

What needs every pair of a million texts is exact, and computes a block at a time on the device.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Corpus, row_order
from engine.flags import pick_device, wants_bf16
from engine.hub import encoder_folder
from eval_sts import Encode, open_encoder
from model import encode
from papers.settings import Config

EMPTY = -1                            # in a table of row numbers or labels: there is none
PROBE = 512                           # most rows that are held out; of few, a tenth
LEAST = 20                            # fewest rows that a probe is drawn from


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return text.lower().split()


def text_numbers(texts: Sequence[str]) -> Tensor:                 # -> (N,)
    """A number for each text: the same where texts differ by case and white space only."""
    seen = {}
    return torch.tensor([seen.setdefault(" ".join(words_of(text)), len(seen)) for text in texts])


def rows_of_run(n: int, config: Config) -> list[int]:
    """The rows that training will see: all n, unless --steps ends it within the first epoch."""
    if not 0 < config.steps < n // config.batch_size:
        return list(range(n))
    order = row_order([(config.steps, range(n))], config.batch_size, seed=config.seed)
    return [row for rows in order for row in rows]


def stretches(steps: int, refreshes: int) -> list[tuple[int, int]]:
    """(begin, end) of the steps before, between and after refreshes: equally long, none empty."""
    count = min(refreshes + 1, steps)
    ends = [steps * number // count for number in range(count + 1)]
    return list(zip(ends, ends[1:]))


def hold_out(texts: Sequence[str], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """A probe to measure with, the same for every seed, and the rows that share no text with it."""
    probe = sorted(random.Random("probe").sample(list(rows), min(PROBE, len(rows) // 10)))
    held = {texts[row] for row in probe}
    return probe, [row for row in rows if texts[row] not in held]


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

    Exact, in 2·N²·D operations, on blocks of 64 MB: all cosines of a million rows would fill 4 TB.
    """
    x, found = x.to(device), torch.empty(len(x), k, dtype=torch.int32)
    starts = range(0, len(x), chunk)
    for start in tqdm(starts, disable=None, desc="neighbours", unit="chunk"):
        rows = unit(x[start : start + chunk])                     # (R, D), R up to chunk
        best = rows.new_empty(len(rows), 0)                       # (R, K) in the end, as `numbers`
        numbers = torch.empty_like(best, dtype=torch.long)
        for first in starts:
            cosines = rows @ unit(x[first : first + chunk]).mT                      # (R, chunk)
            if first == start:
                cosines.fill_diagonal_(-torch.inf)                # nobody is their own neighbour
            top, at = cosines.topk(min(k, cosines.shape[1]))
            best, numbers = torch.cat([best, top], dim=1), torch.cat([numbers, at + first], dim=1)
            best, order = best.topk(min(k, best.shape[1]))
            numbers = numbers.gather(1, order)
        found[start : start + chunk] = numbers
    return found


def unit(x: Tensor, device: torch.device | None = None) -> Tensor:
    """Rows of length 1 on the device; half precision becomes single, as it is for storing."""
    x = x.to(device)
    return F.normalize(x.float() if x.dtype == torch.float16 else x, dim=-1)


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, seed: int, iterations: int = 20,
           device: torch.device | None = None) -> Tensor:         # (N, D) -> (K, D)
    """The centres of k clusters on the unit sphere; fewer, where fewer rows differ.

    Lloyd's algorithm from the starts of k-means++, on 256·k rows at most. A cluster that has lost
    all rows starts anew at the row that is farthest from its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    x = unit(x[torch.randperm(len(x), generator=generator)[: 256 * k]], device)
    centres = far_apart(x[: 50 * k], k, generator)
    numbers = torch.arange(len(centres), device=x.device)
    for _ in range(iterations):
        label, similarity, _ = assign(x, centres)
        # A sum of products, and not index_add_, whose order of adding is any on a GPU.
        total = sum((its_label == numbers[:, None]).to(x.dtype) @ rows              # (K, D)
                    for rows, its_label in zip(x.split(8192), label.split(8192)))
        empty = torch.bincount(label, minlength=len(centres)) == 0
        total[empty] = x[similarity.argsort()[: empty.sum()]]
        centres = F.normalize(total, dim=-1)
    return centres


def far_apart(x: Tensor, k: int, generator: torch.Generator) -> Tensor:   # (N, D) -> (K, D)
    """The starts of k-means++: rows drawn by their squared distance from those drawn before.

    The least of these distances counts (Arthur & Vassilvitskii 2007); its square is 2 - 2 cos.
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = torch.full_like(x[:, 0], torch.inf)                # (N,) squared and halved
    while len(chosen) < k:
        distance = torch.minimum(distance, 1 - x @ x[chosen[-1]])
        distance[distance < 1e-6] = 0                             # rounding, between equal rows
        if not distance.any():                                    # no further row differs
            break
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
    return x[chosen]


@torch.no_grad()
def assign(x: Tensor, centres: Tensor, *, temperature: float = 0.1, chunk: int = 8192
           ) -> tuple[Tensor, Tensor, Tensor]:                    # (N, D), (K, D) -> (N,) x 3
    """The cluster of each row, its cosine with that centre, and the confidence of the choice.

    Confidence is the softmax of cos / τ over the centres, at the chosen one.
    """
    found = []
    for rows in x.split(chunk):
        cosines = unit(rows, centres.device) @ centres.mT         # (chunk, K)
        similarity, label = cosines.max(dim=1)
        confidence = (cosines / temperature).softmax(dim=1).gather(1, label[:, None])[:, 0]
        found.append((label, similarity, confidence))
    return tuple(map(torch.cat, zip(*found)))


def open_teacher(config: Config, corpus: Corpus) -> Encode:
    """The function of another encoder, N sentences -> (N, D), on the run's device.

    Or of an .npy with a vector for each row of the corpus: it knows no other sentences.
    """
    name, device = config.teacher, pick_device(config.device)
    if not name.endswith(".npy"):
        with torch.random.fork_rng(devices=[]):                   # later draws are as without it
            model, tokenizer = open_encoder(encoder_folder(name))
        bf16 = wants_bf16(config.precision, device)
        return partial(encode, model.to(device), tokenizer,
                       precision=torch.bfloat16 if bf16 else torch.float32)
    whole = corpus.whole or corpus                                # a dry run has some rows only
    vectors = read_vectors(Path(name), whole)
    row = {}
    for number, sentence in enumerate(whole.columns[0]):          # of equal ones the first counts
        row.setdefault(sentence, number)

    def look_up(sentences: Sequence[str], **settings) -> Tensor:  # -> (N, D)
        if not row.keys() >= set(sentences):
            raise ValueError(f"--teacher {name}: expected vectors of changed sentences as well, "
                             f"found those of {corpus.name} only: give an encoder's folder, a Hub "
                             "id, or mini")
        return vectors[[row[sentence] for sentence in sentences]].float()
    return look_up


def read_vectors(path: Path, corpus: Corpus) -> Tensor:           # -> (N, D)
    """The rows of an .npy, left on the disk until they are asked for; never unpickles."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of vectors, found nothing there")
    try:
        rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    except Exception as error:          # numpy parses the header as Python and lets much through
        raise ValueError(f"{path}: expected an array of numbers as numpy.save writes it, found "
                         f"something else ({str(error)[:80]})") from None
    if rows.ndim != 2 or len(rows) != len(corpus) or not rows.is_floating_point():
        raise ValueError(f"{path}: expected ({len(corpus)}, D) floats, a row for each of "
                         f"{corpus.name}, found {tuple(rows.shape)} in {str(rows.dtype)[6:]}")
    length = torch.cat([some.half().float().norm(dim=1) for some in rows.split(4096)])   # (N,)
    broken = (~(length.isfinite() & (length > 0))).nonzero()[:, 0]
    if len(broken):
        raise ValueError(f"{path}: row {broken[0].item()}, counted from 0, is zero or not finite "
                         "in half precision and has no direction")
    return rows

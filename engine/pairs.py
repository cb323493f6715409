"""How is a file of scored pairs read? Two sentences and their human score a row."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engine.columns import (LABELS, SCORES, TEXTS, advice, kind_of, meaning, own_file,
                            split_rows)
from engine.doctor import look_at_columns

Pair = tuple[str, str, float]                       # sentence, sentence, human score


def rows_of(path: Path, kind: str = "tsv") -> list[tuple[int, list[str]]]:
    """Line numbers and cells of a file of pairs."""
    return list(split_rows(own_file(str(path), "a file of scored pairs"), kind))


def pair_at(place: str, left: str, right: str, score: str) -> Pair:
    """A pair and its score; runs of white space become one space, as in SentEval."""
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and left.strip() and right.strip()):
        raise ValueError(f"{place}: expected two sentences and a score, "
                         f"found {(left[:40], right[:40], score[:20])}")
    return " ".join(left.split()), " ".join(right.split()), value


def columns_of(path: Path, rows: Iterable[tuple[int, list[str]]], order: Sequence[int],
               kind: str = "tsv") -> Iterator[Pair]:
    """Pairs from rows, without blank ones; `order` has the places of left, right and score."""
    for number, cells in rows:
        if not any(map(str.strip, cells)):
            continue
        if len(cells) <= max(order):
            raise ValueError(f"{path}:{number}: expected at least {max(order) + 1} columns with "
                             f"{'commas' if kind == 'csv' else 'tabs'} between, found {len(cells)} "
                             f"in {' '.join(cells)[:60]!r}{advice(kind, cells, max(order) + 1)}")
        yield pair_at(f"{path}:{number}", *(cells[i] for i in order))


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file of one's own: sentence, sentence, score, or where its header has them."""
    kind = kind_of(path, ["tsv", "csv", "jsonl"])
    rows = rows_of(path, kind)
    start = next((start for start, (_, cells) in enumerate(rows) if any(cells)), 0)
    first = rows[start][1] if rows else []
    order = score_places(first)
    if kind == "jsonl" and not order:
        raise ValueError(f"{path}: expected the keys sentence1, sentence2 and score, found "
                         f"{', '.join(first)[:200] or 'nothing'}")
    rows = rows[start + 1 :] if order else rows
    pairs = list(columns_of(path, rows, order or (0, 1, 2), kind))
    if len({score for _, _, score in pairs}) < 2:
        raise ValueError(f"{path}: expected pairs whose scores differ, as their ranks are "
                         f"compared, found {len(pairs)} pairs: add others")
    look_at_columns(path, kind, list(zip(*pairs))[:2], scored=True)
    return pairs


def score_places(row: Sequence[str]) -> list[int]:
    """Places of two sentences and their score in a usual header; [] where the row is none."""
    found = list(map(meaning, row))
    texts = [place for place, what in enumerate(found) if what in TEXTS]
    scores = [found.index(what) for what in (SCORES, LABELS) if what in found]
    return [*texts[:2], scores[0]] if len(texts) > 1 and scores else []

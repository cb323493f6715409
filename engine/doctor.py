"""What is a corpus like? A look at it before hours of training."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.columns import IDS, LABELS, SCORES, TEXTS, kind_by_header, no_text

NUMBER = re.compile(r"[-+#$]?\.?\d[\d.,:/ %TZ-]*(e[-+]?\d+)?|nan", re.IGNORECASE)    # dates, too
ID = re.compile(r"[A-Za-z]{0,8}[-_:.]?\d[\w-]*")
QUOTED = re.compile(r'"(?:[^"]|"")*"')


def look_at_columns(path: Path, kind: str, columns: list[Sequence[str]], *, scored: bool = False
                    ) -> None:
    """Refuse what is no text, by up to 1,000 evenly spaced rows.

    A test, whose pairs are scored, may ask about the same few sentences again and again.
    """
    n, size = len(columns[0]), min(len(columns[0]), 1000)
    sample = [[column[i * n // size] for i in range(size)] for column in columns]
    texts = sum(sample, [])
    other = kind if kind != "txt" else (
        "tsv" if mostly("\t" in text for text in texts) else kind_by_header(texts[0]))
    if other != kind:
        raise ValueError(f"{path}: expected one sentence a line, found {texts[0][:60]!r}: if it "
                         f"is a .{other}, name it so")
    for place, (_, *values) in enumerate(sample):                 # the first may be a header
        if what := looks_like(values, first=place == 0, labels=len(sample) > 1 and not scored):
            raise ValueError(no_text(path, place, what, ", ".join(dict.fromkeys(values))[:40]))
    quoted = [text for text in texts if text[0] == '"']
    if kind in ("txt", "tsv") and quoted and all(map(QUOTED.fullmatch, quoted)) and (
            len(quoted) == len(texts)
            or kind == "tsv" and any('""' in text[1:-1] for text in quoted)):
        raise ValueError(f"{path}: expected texts without quotes around, which a .{kind} keeps as "
                         f"letters, found {quoted[0][:40]}: leave them out, or write a .csv")


def looks_like(values: list[str], *, first: bool, labels: bool) -> str:
    """What a column holds if it is no text, else ""; `first` is where row numbers stand."""
    different, numbers = set(values), mostly(map(NUMBER.fullmatch, values))
    if len(different) == len(values) and first and (
            numbers or labels and mostly(map(ID.fullmatch, values))):
        return IDS
    # A small file may well ask about few sentences, but words that come back at once are labels.
    often = 10 * len(different) if any(" " in text for text in values) else len(different) + 2
    if len(different) <= 3 and (numbers or labels and len(values) >= often):
        return LABELS
    return SCORES if numbers else ""


def mostly(facts: Iterable) -> bool:
    """Are more than nine in ten true?"""
    facts = list(map(bool, facts))
    return sum(facts) > 0.9 * len(facts)


def doctor(corpus, tokenizer, *, max_tokens: int) -> dict:
    """What a corpus is like. Tokens are counted in up to 10,000 evenly spaced rows."""
    n, size = len(corpus), min(len(corpus), 10_000)
    # 64 bits a row: of ten million, two agree by chance in one of 400,000 corpora.
    codes = np.fromiter(map(hash, zip(*corpus.columns)), np.int64, count=n)
    sample = [i * n // size for i in range(size)]
    counts = [tokenizer.lengths([column[i] for i in sample]) for column in corpus.columns]
    longest = [max(row) for row in zip(*counts)]
    return {
        "corpus": corpus.name, "rows": n, "columns": len(corpus.columns), "sha256": corpus.sha256,
        "documents": corpus.documents[-1] + 1 if corpus.documents else None,
        "blank lines": corpus.blank, "exact duplicates": n - len(np.unique(codes)),
        "rows sampled": size, "max tokens": max_tokens,
        "share truncated": sum(length > max_tokens for length in longest) / size,
        "mean tokens": sum(map(sum, counts)) / (size * len(counts)),
        "first row": [column[0] for column in corpus.columns]}


def doctor_text(report: dict) -> str:
    """The doctor's report for the screen."""
    documents = f" in {report['documents']:,} documents" if report["documents"] else ""
    sampled = report["rows sampled"] < report["rows"]
    names = TEXTS if report["columns"] > 1 else [""]
    first = ", ".join(f"{name} {text[:60]!r}".strip()
                      for name, text in zip(names, report["first row"]))
    return "\n".join([
        f"corpus {report['corpus']}: {report['rows']:,} rows x {report['columns']}{documents}",
        f"  left out: {report['blank lines']:,} blank lines; "
        f"kept: {report['exact duplicates']:,} exact duplicates",
        f"  {report['mean tokens']:.1f} tokens a text, {report['share truncated']:.1%} of rows cut "
        f"at {report['max tokens']}"
        + (f" (in {report['rows sampled']:,} evenly spaced rows)" if sampled else ""),
        f"  first row: {first}",
        f"  sha256 {report['sha256']}"])

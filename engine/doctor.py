"""What is a corpus like? A look at it before hours of training."""

import numpy as np


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
        "mean tokens": sum(map(sum, counts)) / (size * len(counts))}


def doctor_text(report: dict) -> str:
    """The doctor's report for the screen."""
    documents = f" in {report['documents']:,} documents" if report["documents"] else ""
    sampled = report["rows sampled"] < report["rows"]
    return "\n".join([
        f"corpus {report['corpus']}: {report['rows']:,} rows x {report['columns']}{documents}",
        f"  left out: {report['blank lines']:,} blank lines; "
        f"kept: {report['exact duplicates']:,} exact duplicates",
        f"  {report['mean tokens']:.1f} tokens a text, {report['share truncated']:.1%} of rows cut "
        f"at {report['max tokens']}"
        + (f" (in {report['rows sampled']:,} evenly spaced rows)" if sampled else ""),
        f"  sha256 {report['sha256']}"])

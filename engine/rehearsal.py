"""What will a run cost? Its first rows are gone through, and what they took is counted up."""

import tempfile
from collections.abc import Iterator
from functools import partial
from timeit import timeit

import torch

from engine.encoders import load, save
from engine.flags import exits
from engine.pieces import peak_memory
from model import encode


def rehearse(job, loop: Iterator, *, rows: int, steps: int) -> str:
    """The text of --dry-run, by a job on the first rows of a corpus of so many `rows`.

    `loop` takes steps of the job, of which the whole run has so many `steps`. What a method does
    with all rows grows with them; its `search` of all pairs grows with their square.
    """
    once, method, n = partial(timeit, number=1), job.method, len(job.inputs.corpus)   # seconds
    growth, batch, width = rows / n, job.config.batch_size, job.model.config.width
    with exits(3):
        preparing = once(lambda: method.prepare(job.encode_corpus))
    # Rows that training never comes to may need no look.
    seen = min(rows, steps * batch) / min(n, steps * batch)
    preparing *= growth if method.all_rows else seen
    if method.search:
        vectors = torch.randn(n, width).half()
        preparing += once(lambda: method.search(vectors)) * growth * (growth - 1)
    *_, seconds = (once(lambda: next(loop)[1].item()) for _ in range(min(3, job.steps)))
    later = method.rounds(job.steps)[1:]
    refreshing = len(later) and len(later) * seen * once(
        lambda: method.refresh(job.encode_corpus, later[0][1]))
    scoring = once(lambda: (job.inputs.dev or job.inputs.test).score(job.encode))
    scores = method.turns or bool(job.inputs.dev) * -(-steps // job.config.dev_every)
    with tempfile.TemporaryDirectory() as folder:
        save(job.model, folder)
        again, texts = load(folder).to(job.inputs.device), job.inputs.corpus.columns[0][:8]
        same = torch.equal(job.encode(texts), encode(again, job.inputs.tokenizer, texts))
    minutes = (preparing + steps * seconds + refreshing + (scores + 2) * scoring) / 60
    tables = sum(x.nbytes for x in method.buffers() if 0.9 * n < max(x.shape, default=0) <= n)
    index = 2 * n * width if method.search or later else 0        # half precision, for a while
    return "\n".join([
        f"steps: {steps} at {seconds:.3f} s", f"dev scores: {scores}, at {scoring:.1f} s",
        f"before the first step: {preparing / 60:.1f} minutes, by its first rows",
        f"looks at the corpus later on: {len(later)}, {refreshing / 60:.1f} minutes in all",
        f"expected time: {minutes:.1f} minutes",
        f"peak memory: {peak_memory(job.inputs.device)}, and for all rows "
        f"{(growth - 1) * (tables + index) / 2**30:.2f}",
        f"saved and reloaded with equal vectors: {'yes' if same else 'NO'}"])

"""
How is a batch computed that is too large for one pass? Piece by piece, with the same gradient
but for dropout, whose masks a piece draws for itself.

A contrastive loss compares all rows of a batch, so the batch cannot become several smaller ones.
But only the encoder needs much memory, and it looks at one row at a time: it takes some rows of
every column at once, and the loss sees the results of all pieces. The graph of a piece is thrown
away, and made again when its gradient arrives: gradient caching (Gao et al. 2021, GradCache), which
costs one more forward pass.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.flags import lacks_memory

TRIM_EVERY = 50                       # steps


@dataclass(frozen=True)
class Pieces:
    """Computes a block of V columns of B rows, `most` rows of a column at a time (0: all)."""
    columns: int = 1                  # V
    most: int = 0

    def __call__(self, f: Callable[..., list[Tensor]], *block: Tensor, **whole: Tensor
                 ) -> list[Tensor]:
        """f(*block, **whole), for an f that makes (V·B, ...) of (V·B, ...) row by row.

        `whole` spares f work, but fits the whole block only; pieces go without it.
        """
        columns = [x.unflatten(0, (self.columns, -1)) for x in block]               # (V, B, ...)s
        rows = columns[0].shape[1]
        if not 0 < self.most < rows:
            return f(*block, **whole)
        seed, made = torch.randint(2**62, ()).item(), []
        for start in range(0, rows, self.most):
            piece = (x[:, start : start + self.most].flatten(0, 1) for x in columns)
            made.append(once_more(f, seed + 1 + start, *piece))
        torch.manual_seed(seed)                       # what follows draws the same with all pieces
        split = ([x.unflatten(0, (self.columns, -1)) for x in results] for results in zip(*made))
        return [torch.cat(results, dim=1).flatten(0, 1) for results in split]       # (V·B, ...)s


def seeded(f: Callable, seed: int, *piece: Tensor) -> list[Tensor]:
    torch.manual_seed(seed)
    return f(*piece)


def once_more(f: Callable, seed: int, *piece: Tensor) -> list[Tensor]:
    """seeded(...) without its graph, which is computed anew when the gradient arrives."""
    return checkpoint(seeded, f, seed, *piece, use_reentrant=False, preserve_rng_state=False)


def within_memory(steps: Iterator, config) -> Iterator:
    """The same steps; memory is given back now and then, and a lack of it says what helps."""
    try:
        for count, step in enumerate(steps, start=1):
            yield step
            if count % TRIM_EVERY == 0:
                trim_memory()
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        rows = min(config.micro_batch or config.batch_size, config.batch_size)
        what, advice = "1 row", "a lower --max-tokens, or a smaller encoder"
        if rows > 1:
            what = f"{rows} rows"
            advice = f"--micro-batch {rows // 2}, which has the same gradient but for dropout"
        raise MemoryError(f"out of memory with {what} of a column at a time: try "
                          f"{advice}") from None


def trim_memory() -> None:
    """Give freed memory back, which glibc keeps: without this `mini` holds 2.1 GB and uses 0.5."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def peak_memory(device: torch.device) -> str:
    """The most memory that this process held so far on this device."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return "not known on Windows"
    unit = 2**30 if sys.platform == "darwin" else 2**20           # bytes on a Mac, else KiB
    return f"{getrusage(RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"

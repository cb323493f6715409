"""
How is a batch computed that is too much for one pass? Piece by piece, with the same gradient.

    (V·B, T) --cut--> pieces: some rows of every column --encoder--> the rows of all pieces again

A contrastive loss compares all rows of a batch, so the batch cannot fall apart into smaller ones.
But only the encoder is large, and it looks at one row at a time: it works piece by piece, and the
loss sees what came out of all of them. The graph of a piece is thrown away, and made once more
when its gradient is there: gradient caching (Gao et al. 2021, GradCache). It costs one more
forward pass. The dropout of a piece is drawn for its first row.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TRIM_EVERY = 50                       # steps


@dataclass(frozen=True)
class Pieces:
    """Computes a block of V columns of B rows piece by piece, where that is asked for."""
    columns: int = 1                  # V
    most: int = 0                     # rows of a column at a time; 0: all

    def __call__(self, f: Callable[..., list[Tensor]], *block: Tensor) -> list[Tensor]:
        """f(*block), for an f that makes (V·B, ...) of (V·B, ...) row by row."""
        columns = [x.unflatten(0, (self.columns, -1)) for x in block]               # (V, B, ...)s
        rows = columns[0].shape[1]
        if not 0 < self.most < rows:
            return f(*block)
        seed, made = torch.randint(2**62, ()).item(), []
        for start in range(0, rows, self.most):
            piece = (x[:, start : start + self.most].flatten(0, 1) for x in columns)
            made.append(once_more(f, seed + 1 + start, *piece))
        torch.manual_seed(seed)                                   # what follows is the same for all
        return [self.whole(parts) for parts in zip(*made)]

    def whole(self, parts: list[Tensor]) -> Tensor:               # (V·b, ...)s -> (V·B, ...)
        """The results of all pieces, in the order of the block."""
        return torch.cat([x.unflatten(0, (self.columns, -1)) for x in parts], dim=1).flatten(0, 1)


def seeded(f: Callable, seed: int, *piece: Tensor) -> list[Tensor]:
    torch.manual_seed(seed)
    return f(*piece)


def once_more(f: Callable, seed: int, *piece: Tensor) -> list[Tensor]:
    """Only the result is kept: when the gradient arrives, all is computed anew, dropout included.

    The gradients of later pieces come first, and each graph goes before the next is made.
    """
    return checkpoint(seeded, f, seed, *piece, use_reentrant=False, preserve_rng_state=False)


def within_memory(steps: Iterator, config) -> Iterator:
    """The same steps, memory given back now and then; where it ends, the error says what helps."""
    try:
        for count, step in enumerate(steps, start=1):
            yield step
            if count % TRIM_EVERY == 0:
                trim_memory()
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        rows = min(config.micro_batch or config.batch_size, config.batch_size)
        way = (f"try --micro-batch {rows // 2}, which has the same gradient" if rows > 1 else
               "try a lower --max-tokens, or a smaller encoder")
        raise MemoryError(f"out of memory with {rows} row{'s' * (rows > 1)} of a column at a time: "
                          f"{way}") from None


def trim_memory() -> None:
    """Give back what the C library keeps for later: batches differ in size, so little of it fits.

    `mini` would hold 2.1 GB after 250 steps, of which it uses 0.5. Only glibc knows the call.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def lacks_memory(error: Exception) -> bool:
    """A processor's lack of memory is a plain RuntimeError, known by its text alone."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(text in str(error) for text in ("DefaultCPUAllocator", "bad_alloc"))


def peak_memory(device: torch.device) -> str:
    """The most that this process held so far, on the device that it computes on."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return "not known on Windows"
    unit = 2**30 if sys.platform == "darwin" else 2**20           # bytes on a Mac, else KiB
    return f"{getrusage(RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def timed(work: Callable, *arguments) -> float:
    """Seconds that work(*arguments) takes."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started

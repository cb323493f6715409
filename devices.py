"""
How is a batch computed that is too much for one pass, or that several devices share?

    (V·B, T) --cut--> pieces: some rows of every column --encoder--> the rows of all pieces again

A contrastive loss compares all rows of a batch, so the batch cannot fall apart into smaller ones.
But only the encoder is large, and it looks at one row at a time: it works piece by piece, and the
loss sees what came out of all of them.

    --micro-batch N      Pieces one after another. The graph of a piece is thrown away, and made
                         once more when its gradient is there: gradient caching (Gao et al. 2021,
                         GradCache). Costs one more forward pass.
    torchrun mincse.py   Pieces side by side: each process encodes its share of the rows, all have
                         the same loss, and the gradient flows back to where a row was encoded.

Either gives the gradient of the whole batch. The dropout of a piece is drawn for its first row,
so two processes do what one does with half the batch as `--micro-batch`.
Of several processes only the first one prints, scores and writes.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# While the first process scores, the others wait; that another one has ended is known at once.
LONGEST_WAIT = timedelta(hours=2)
TRIM_EVERY = 50                       # steps


# ---- pieces ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pieces:
    """Computes a block of V columns of B rows piece by piece, where that is asked for."""
    columns: int = 1                  # V
    most: int = 0                     # rows of a column at a time; 0: all that this process has

    def __call__(self, f: Callable[..., list[Tensor]], *block: Tensor) -> list[Tensor]:
        """f(*block), for an f that makes (V·B, ...) of (V·B, ...) row by row."""
        columns = [x.unflatten(0, (self.columns, -1)) for x in block]               # (V, B, ...)s
        rows = columns[0].shape[1] // world()                     # of this process
        size = min(self.most or rows, rows)
        if size == columns[0].shape[1]:
            return f(*block)
        run = once_more if size < rows else seeded
        seed = torch.randint(2**62, ()).item()
        made = []
        for start in range(rank() * rows, (rank() + 1) * rows, size):
            end = min(start + size, (rank() + 1) * rows)
            made.append(run(f, seed + 1 + start, *(x[:, start:end].flatten(0, 1) for x in columns)))
        torch.manual_seed(seed)                                   # what follows is the same for all
        return [self.whole(parts) for parts in zip(*made)]

    def whole(self, parts: list[Tensor]) -> Tensor:               # (V·b, ...)s -> (V·B, ...)
        """The results of all pieces, of all processes, in the order of the block."""
        own = torch.cat([x.unflatten(0, (self.columns, -1)) for x in parts], dim=1)
        return (Gather.apply(own) if world() > 1 else own).flatten(0, 1)


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
        share = config.batch_size // world()
        rows = min(config.micro_batch or share, share)
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


# ---- processes ------------------------------------------------------------------------------

class LostContact(Exception):
    """Another process has ended, or has not answered for LONGEST_WAIT."""


@contextmanager
def contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise LostContact("another process of this run has ended, and none goes on without "
                          "it") from None


def rank() -> int:
    """Which process this is: 0 is the first."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are: 1 unless torchrun started more, whatever GPUs are there."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join() -> None:
    """Meet the other processes that torchrun started, if any. All but the first are silent."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        return
    gpus = torch.cuda.device_count()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=LONGEST_WAIT)
    if (place := int(os.environ["LOCAL_RANK"])) < gpus:
        torch.cuda.set_device(place)                              # "cuda" is this one from now on
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def leave() -> None:
    if world() > 1:
        dist.destroy_process_group()


def check(config, device: torch.device) -> None:
    """Refuse what several processes cannot share."""
    if config.batch_size % world():
        raise ValueError(f"--batch-size {config.batch_size}: expected a multiple of {world()}, the "
                         "processes of torchrun, each of which takes as many rows")
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"torchrun started {here} processes here, found "
                         f"{torch.cuda.device_count()} GPUs: use --nproc_per_node="
                         f"{torch.cuda.device_count()}, or --device cpu")


def complain(text: str) -> None:
    """One sentence for the user, from whichever process has to say it."""
    which = f"process {rank() + 1} of {world()}: " if world() > 1 else ""
    print(f"{Path(sys.argv[0]).name}: {which}{text}", file=sys.__stderr__ if which else sys.stderr)


def launcher() -> str:
    return f"torchrun --nproc_per_node={world()}" if world() > 1 else "python"


# ---- what processes tell each other ---------------------------------------------------------

class Gather(torch.autograd.Function):
    """The rows of all processes.                                 (V, b, ...) -> (V, B, ...)

    Backward a process gets what the losses of all of them say of its rows: the sum over W equal
    losses, so W times the gradient. `average_gradients` divides by W again.
    """

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(world())]
        with contact():
            dist.all_gather(parts, own)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        with contact():
            dist.all_reduce(gradient)
        return gradient.chunk(world(), dim=1)[rank()]


def average_gradients(module: nn.Module) -> None:
    """The mean over the processes is the gradient of the batch: of what each encoded itself (see
    `Gather`), and of heads and losses, that all of them computed."""
    if world() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    with contact():
        for sent in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            sent.wait()
    for gradient in gradients:
        gradient /= world()


def equalize(module: nn.Module) -> None:
    """Its buffers as the first process has them, to the last bit."""
    with contact():
        for buffer in module.buffers() if world() > 1 else ():
            dist.broadcast(buffer, 0)


def highest(number: int) -> int:
    """Of the numbers that the processes have. All wait here for each other."""
    if world() == 1:
        return number
    found = torch.tensor(number)                                  # not on a GPU, which would stop
    with contact():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def once(f: Callable, *arguments, **settings) -> Any:
    """What f returns to the first process, which alone calls it: the others wait and are told."""
    if world() == 1:
        return f(*arguments, **settings)
    told = [None, "failed"]
    try:
        if rank() == 0:
            told = [f(*arguments, **settings), "done"]
    finally:
        with contact():
            dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] == "failed":
        raise SystemExit(1)                                       # the first one says why
    return told[0]


@contextmanager
def first_ahead() -> Iterator[None]:
    """The others begin when the first has ended: what it downloads or unpacks is there then."""
    if rank():
        highest(0)
    try:
        yield
    finally:
        if not rank():
            highest(0)

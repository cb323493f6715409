"""What was encoded lately? A memory of embeddings, for methods that look back over some steps."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Memory(nn.Module):
    """The last M embeddings, of unit length and without gradient; a buffer, so runs save them."""

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(slots, width))   # (M, D), oldest first

    @property
    def full(self) -> Tensor:                                     # () bool
        """Has every slot been written? A tensor, since to ask for a bool would halt a GPU."""
        return self.rows[0].any()

    @torch.no_grad()
    def push(self, x: Tensor) -> None:                            # (B, D)
        """Add rows at the end, and drop as many of the oldest."""
        assert len(x) <= len(self.rows), "a batch larger than the memory would change its length"
        self.rows = torch.cat([self.rows[len(x):], F.normalize(x, dim=-1)])

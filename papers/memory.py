"""
What was encoded lately? A memory of embeddings, for methods that look back over some steps.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Memory(nn.Module):
    """The last M embeddings, of unit length. They are looked up, and no gradient enters them.

    As a buffer they are saved with the run, so that a resumed one remembers the same.
    """

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(slots, width))   # (M, D), oldest first

    @property
    def full(self) -> Tensor:                                     # () bool
        """Has every slot been written? A tensor, since to ask for a bool would halt a GPU."""
        return self.rows[0].any()

    @torch.no_grad()
    def push(self, x: Tensor) -> None:                            # (B, D)
        """The newest rows go in at the end, and as many of the oldest leave."""
        assert len(x) <= len(self.rows), "a batch larger than the memory would change its length"
        self.rows = torch.cat([self.rows[len(x):], F.normalize(x, dim=-1)])

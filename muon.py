"""
Which way should a weight matrix go? Not only where its gradient is large.

    orthogonal(x)       the nearest matrix whose directions all count the same
    Muon(matrices)      steps along it
    Together(...)       several optimizers in the place of one

The gradient of a matrix mostly points in a few directions, and Adam, which scales every entry on
its own, goes there too. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves every
direction by the same amount: what is rare is learned as fast as what is frequent. Word embeddings
are a lookup table and no map from vector to vector, so AdamW keeps them, and biases and norms.

Not here: which weights are trained with it, and at what rate (pretrain.py).
"""

import torch
from torch import Tensor

STEPS, POLYNOMIAL = 5, (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor) -> Tensor:                              # (N, M) -> (N, M)
    """U V' of the singular value decomposition U Σ V', nearly: every σ ends in 0.7 to 1.2.

    The odd polynomial aσ + bσ³ + cσ⁵, five times over, lifts all but the smallest σ of (0, 1] to
    about 1, and needs only products of matrices (Newton-Schulz; Jordan et al. chose a, b, c).
    """
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / (wide.norm() + 1e-7)                            # all σ at most 1
    a, b, c = POLYNOMIAL
    for _ in range(STEPS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices (N, M).

    An orthogonal matrix has entries of 1/√max(N, M), root mean square. Times that root and 0.2, a
    step moves an entry about as far as Adam's does, so that one learning rate serves both; and as
    no direction is spared, weights grow until their decay stops them (Liu et al. 2025, "Muon is
    scalable", section 2.2, has both constants).
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                memory = self.state[matrix].setdefault("memory", torch.zeros_like(matrix))
                memory.lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(memory, group["momentum"])               # Nesterov's
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(matrix.shape) ** 0.5
                matrix.sub_(orthogonal(ahead), alpha=group["lr"] * size)


class Together:
    """Optimizers, each for its own parameters, that are used like one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {parameter: kept for part in self.parts for parameter, kept in part.state.items()}

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, saved: list[dict]) -> None:
        for part, of_part in zip(self.parts, saved, strict=True):
            part.load_state_dict(of_part)

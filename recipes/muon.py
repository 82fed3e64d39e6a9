"""Muon: momentum whose matrix updates are made nearly orthogonal (Keller Jordan, 2024), shared among processes."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of Jordan's quintic iteration
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices [N, rows, columns], about; computed in bfloat16, returned in float32.

    The singular values come out between 0.7 and 1.2, which is near enough; a matrix of zeros stays one.
    """
    first, second, third = NEWTON_SCHULZ
    result = matrices.bfloat16()
    tall = result.size(-2) > result.size(-1)
    if tall:
        result = result.mT
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = result @ result.mT
        result = first * result + (second * square + third * (square @ square)) @ result
    return (result.mT if tall else result).float()


class Muon:
    """The optimizer of the matrices inside the layers.

    Every process holds every momentum and orthogonalises its share of the matrices of each shape; gradients have to be
    the same in all processes when `step` is called.

    Attributes:
        momenta: one per parameter, of its shape.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]
        self._places: dict[torch.Size, list[int]] = defaultdict(list)
        for place, parameter in enumerate(parameters):
            self._places[parameter.shape].append(place)

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        """Update the parameters from their gradients, with Nesterov's momentum."""
        for momentum_of, parameter in zip(self.momenta, self.parameters, strict=True):
            momentum_of.lerp_(parameter.grad, 1 - momentum)
        for shape, places in self._places.items():
            tall = max(1.0, shape[0] / shape[1]) ** 0.5  # keeps the size of what a matrix puts out, whatever its shape
            for place, update in zip(places, self._updates(places, momentum), strict=True):
                self.parameters[place].mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate * tall)

    def _updates(self, places: list[int], momentum: float) -> Tensor:
        rank, processes = dist.get_rank(), dist.get_world_size()
        share = -(-len(places) // processes)
        # The last process may have fewer matrices; it repeats one, for all have to send equally many.
        mine = [places[min(rank * share + at, len(places) - 1)] for at in range(share)]
        updates = orthogonalized(
            torch.stack([self.parameters[place].grad.lerp(self.momenta[place], momentum) for place in mine])
        )
        gathered = [torch.empty_like(updates) for _ in range(processes)]
        dist.all_gather(gathered, updates)
        return torch.cat(gathered)[: len(places)]

"""From ranking logits to logits whose sigmoid is a probability, per surface and task.

Papers: Platt, "Probabilistic Outputs for Support Vector Machines", 1999 (the affine map); Zadrozny and Elkan, KDD 2002
(monotone maps). Formulas for logit z of surface s and task t:

    affine      exp(a_st) z + b_st
    piecewise   b_st + m_0 z' + sum_k (m_k - m_{k-1}) max(z - knot_k, 0),  m_k = exp(a_stk) > 0,  z' = z - knot_0

All are strictly increasing and start as the identity. They read `z.detach()`: calibration learns from the loss on its
own output and can neither move the model nor change the order of candidates within a surface.

Shape letters: C candidates, T tasks, S surfaces, K knots. Input and output [C, T].

Example:
    >>> import torch
    >>> SurfaceCalibration(surfaces=["hf", "sr"], tasks=["click"])(torch.tensor([[0.5], [-2.0]]), [1, 1]).tolist()
    [[0.5], [-2.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from components.names import check_names, surface_key
from components.ragged import split_surfaces


class AffineMap(nn.Module):
    """exp(log_scale_t) z_t + bias_t for each task; positive scale by construction.

    Args:
        tasks: T.
    """

    def __init__(self, *, tasks: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(tasks))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, logits_CT: Tensor) -> Tensor:
        return self.log_scale.exp() * logits_CT.detach() + self.bias


class PiecewiseMap(nn.Module):
    """A monotone piecewise-linear map for each task, its knots fixed in logit space.

    Args:
        tasks: T.
        knots: K rising logits; the slope changes at each but the first, and the outer slopes go on.

    Raises:
        ValueError: fewer than two knots, or knots that do not rise.
    """

    knots: Tensor

    def __init__(self, *, tasks: int, knots: Sequence[float]) -> None:
        super().__init__()
        if len(knots) < 2:
            raise ValueError(f"got {len(knots)} knots; a piecewise map needs at least 2")
        for low, high in pairwise(knots):
            if not low < high:
                raise ValueError(f"knots have {low} before {high}; they must rise")
        self.register_buffer("knots", torch.tensor(list(knots), dtype=torch.float32))
        self.log_slope = nn.Parameter(torch.zeros(tasks, len(knots)))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, logits_CT: Tensor) -> Tensor:
        above_CTK = logits_CT.detach().unsqueeze(-1) - self.knots
        slope_TK = self.log_slope.exp()
        # Below the first knot the first slope goes on; each further knot adds the change of slope above it.
        change_TK = slope_TK[:, 1:] - slope_TK[:, :-1]
        first = slope_TK[:, 0] * above_CTK[..., 0]
        return self.knots[0] + self.bias + first + (change_TK * above_CTK[..., 1:].clamp(min=0.0)).sum(-1)


class SurfaceCalibration(nn.Module):
    """A map of its own for every surface and task; the rows of a surface train its maps only.

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of columns.
        knots: rising logits for the piecewise-linear map, or None for the affine one.

    Raises:
        ValueError: no or repeated names, or unusable knots.
    """

    def __init__(self, *, surfaces: Sequence[str], tasks: Sequence[str], knots: Sequence[float] | None = None) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        self.maps = nn.ModuleDict({surface_key(s): _map(len(self.tasks), knots) for s in self.surfaces})

    def forward(self, logits_CT: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        pieces = split_surfaces(logits_CT, candidates_per_surface, len(self.surfaces))
        return torch.cat([self.maps[surface_key(s)](rows) for s, rows in zip(self.surfaces, pieces, strict=True)])


class GlobalCalibration(nn.Module):
    """The rival: one map a task for the rows of all surfaces.

    Args:
        tasks: names, in the order of columns.
        knots: rising logits for the piecewise-linear map, or None for the affine one.

    Raises:
        ValueError: no or repeated names, or unusable knots.
    """

    def __init__(self, *, tasks: Sequence[str], knots: Sequence[float] | None = None) -> None:
        super().__init__()
        self.tasks = check_names("tasks", tasks)
        self.map = _map(len(self.tasks), knots)

    def forward(self, logits_CT: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        return self.map(logits_CT)


class IdentityCalibration(nn.Module):
    """No calibration: the detached logits as they are."""

    def forward(self, logits_CT: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        return logits_CT.detach()


def _map(tasks: int, knots: Sequence[float] | None) -> nn.Module:
    return AffineMap(tasks=tasks) if knots is None else PiecewiseMap(tasks=tasks, knots=knots)

"""Explicit feature crossing, and its use to project a wide vector to a narrow one.

Paper: Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021. Formula of layer l, on a vector x of width X:

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l          full rank
    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l    rank r, V_l [r, X], U_l [X, r]

Shapes: [*, X] to [*, X]; `CrossProjection` to [*, P].

Example:
    >>> import torch
    >>> DCNv2(in_dim=6, layers=2, rank=3)(torch.ones(5, 6)).shape
    torch.Size([5, 6])
    >>> CrossProjection(in_dim=6, out_dim=2, layers=1, rank=3)(torch.ones(5, 6)).shape
    torch.Size([5, 2])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from components.names import check_at_least


class FullRankCross(nn.Module):
    """The full-rank form.

    torchrec's CrossNet multiplies a matrix with one column a row; as one product of matrices the same step took
    a quarter of the time (2048 x 256, CPU).

    Args:
        in_dim: X.
        layers: number of cross layers.
    """

    def __init__(self, *, in_dim: int, layers: int) -> None:
        super().__init__()
        linears = [nn.Linear(in_dim, in_dim) for _ in range(layers)]
        for linear in linears:
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.linears = nn.ModuleList(linears)

    def forward(self, x_0: Tensor) -> Tensor:
        x_l = x_0
        for linear in self.linears:
            x_l = x_0 * linear(x_l) + x_l
        return x_l


class LowRankCross(LowRankCrossNet):
    """torchrec's LowRankCrossNet, its bias and its residual added within the products: fewer passes over [C, X]."""

    def forward(self, input: Tensor) -> Tensor:
        x_0 = x_l = input
        for v, w, b in zip(self.V_kernels, self.W_kernels, self.bias, strict=True):
            x_l = torch.addcmul(x_l, x_0, F.linear(F.linear(x_l, v), w, b))
        return x_l


class DCNv2(nn.Module):
    """Cross layers of full or low rank; keeps the width.

    Args:
        in_dim: X.
        layers: number of cross layers, at least 1.
        rank: r, or None for full rank; a rank near X/4 keeps most of the accuracy.

    Raises:
        ValueError: a size below 1, or a rank above X.
    """

    def __init__(self, *, in_dim: int, layers: int, rank: int | None = None) -> None:
        super().__init__()
        check_at_least(1, in_dim=in_dim, layers=layers)
        self.out_dim = in_dim
        self.cross: nn.Module
        if rank is None:
            self.cross = FullRankCross(in_dim=in_dim, layers=layers)
        else:
            check_at_least(1, rank=rank)
            if rank > in_dim:
                raise ValueError(f"rank is {rank} for a vector of width {in_dim}; it must not be above the width")
            self.cross = LowRankCross(in_features=in_dim, num_layers=layers, low_rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.cross(x)


class CrossProjection(nn.Module):
    """Cross a wide vector with itself, then project it to a narrow one.

    Args:
        in_dim: X.
        out_dim: P.
        layers: number of cross layers, at least 1.
        rank: r, or None for full rank.

    Raises:
        ValueError: a size below 1, or a rank above X.
    """

    def __init__(self, *, in_dim: int, out_dim: int, layers: int = 1, rank: int | None = None) -> None:
        super().__init__()
        check_at_least(1, out_dim=out_dim)
        self.cross = DCNv2(in_dim=in_dim, layers=layers, rank=rank)
        self.project = nn.Linear(in_dim, out_dim)
        self.out_dim = out_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.cross(x))


class LinearProjection(nn.Module):
    """The rival of `CrossProjection`: narrow the vector without crossing it.

    Args:
        in_dim: X.
        out_dim: P.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        check_at_least(1, in_dim=in_dim, out_dim=out_dim)
        self.project = nn.Linear(in_dim, out_dim)
        self.out_dim = out_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

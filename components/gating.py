"""A gate that lets each surface turn inputs up or down.

Paper: Chang et al., "PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior
Information", KDD 2023 (EPNet). Formula for a row x of surface s:

    y = 2 * sigmoid(MLP([surface_s; stopgrad(x)])) * x

The gate reads x but sends it no gradient; it starts near 1, so that switching it on changes little at first.

Shape letters: X width of the gated vector, D width of the surface embedding. Input and output [rows, X].

Example:
    >>> import torch
    >>> gate = EPNet(surfaces=["hf", "sr"], in_dim=3, hidden=8)
    >>> gate(torch.ones(2, 3), torch.tensor([0, 1])).shape
    torch.Size([2, 3])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.features import SurfaceEmbedding
from components.names import check_at_least


class EPNet(nn.Module):
    """Gate on one vector, with a surface embedding of its own.

    Args:
        surfaces: names, in the order of the model's surfaces.
        in_dim: X.
        hidden: width of the gate's hidden layer.
        surface_dim: D.

    Raises:
        ValueError: no or repeated surfaces, a size below 1.
    """

    def __init__(self, *, surfaces: Sequence[str], in_dim: int, hidden: int, surface_dim: int = 8) -> None:
        super().__init__()
        check_at_least(1, in_dim=in_dim, hidden=hidden)
        self.surface = SurfaceEmbedding(surfaces=surfaces, dim=surface_dim)
        self.mlp = nn.Sequential(nn.Linear(surface_dim + in_dim, hidden), nn.ReLU(), nn.Linear(hidden, in_dim))
        self.surfaces = self.surface.surfaces
        self.out_dim = in_dim

    def forward(self, x: Tensor, surface_of_row: Tensor) -> Tensor:
        """[rows, X]; `surface_of_row` is int64 [rows], index of each row's surface."""
        seen = torch.cat([self.surface(surface_of_row), x.detach()], dim=1)
        return 2.0 * torch.sigmoid(self.mlp(seen)) * x

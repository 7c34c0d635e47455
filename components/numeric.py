"""Numbers as inputs: standardised, with absence told apart from zero, and optionally piecewise-linear.

Papers: Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022
(piecewise-linear encoding). Formula, for a value x of column n:

    value    = clip((x - mean_n) / std_n, -c, c), 0 where absent
    presence = 1 where present, 0 where absent
    ple_b    = clip((x - edge_b) / (edge_{b+1} - edge_b), 0, 1), 0 where absent

(The paper leaves the outermost bins open; the standardised value beside the encoding carries what lies beyond.)

Shapes: [rows, N] to [rows, 2N], or [rows, 2N + N*B] with B bins. NaN means absent.

Example:
    >>> import torch
    >>> block = NumericFeatures(mean=[1.0, 0.0], std=[2.0, 1.0])
    >>> block(torch.tensor([[5.0, float("nan")]])).tolist()
    [[2.0, 0.0, 1.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class NumericFeatures(nn.Module):
    """Standardised values, then presence, then (with `edges`) the piecewise-linear encoding.

    Args:
        mean: N means of the observed values.
        std: N standard deviations, above 0.
        clip: bound c of standardised values, so that one wild row cannot blow up a step.
        edges: N rows of B + 1 strictly rising bin edges, or None for no piecewise-linear encoding.

    Raises:
        ValueError: lists of unequal length, a std or clip that is not above 0, edges that do not rise.
    """

    mean: Tensor
    std: Tensor
    edges: Tensor

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        clip: float = 10.0,
        edges: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"got {len(mean)} means and {len(std)} standard deviations; they must be as many")
        for n, value in enumerate(std):
            if not value > 0:
                raise ValueError(f"std[{n}] is {value}; it must be above 0")
        if not clip > 0:
            raise ValueError(f"clip is {clip}; it must be above 0")
        self.columns = len(mean)
        self.clip = clip
        self.bins = _check_edges(edges, self.columns)
        self.out_dim = self.columns * (2 + self.bins)
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32))
        if edges is not None and self.bins:
            self.register_buffer("edges", torch.tensor([list(row) for row in edges], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, N] with NaN for absent, to [rows, out_dim]."""
        absent = torch.isnan(x)
        # NaN is replaced before the arithmetic: 0 * NaN would be NaN again in the backward pass.
        present = torch.where(absent, self.mean, x)
        value = ((present - self.mean) / self.std).clamp(-self.clip, self.clip)
        parts = [value, (~absent).to(value.dtype)]
        if self.bins:
            parts.append(self._piecewise(present).masked_fill(absent.unsqueeze(-1), 0.0).flatten(1))
        return torch.cat(parts, dim=1)

    def _piecewise(self, present: Tensor) -> Tensor:
        low, high = self.edges[:, :-1], self.edges[:, 1:]
        return ((present.unsqueeze(-1) - low) / (high - low)).clamp(0.0, 1.0)


def _check_edges(edges: Sequence[Sequence[float]] | None, columns: int) -> int:
    """Number of bins; 0 without edges."""
    if edges is None or (not edges and not columns):
        return 0
    if len(edges) != columns:
        raise ValueError(f"edges have {len(edges)} rows for {columns} columns; they must be as many")
    for n, row in enumerate(edges):
        if len(row) != len(edges[0]) or len(row) < 2:
            raise ValueError(
                f"edges[{n}] has {len(row)} edges and edges[0] {len(edges[0])}; all need the same, 2 or more"
            )
        for low, high in pairwise(row):
            if not low < high:
                raise ValueError(f"edges[{n}] has {low} before {high}; edges must rise")
    return len(edges[0]) - 1

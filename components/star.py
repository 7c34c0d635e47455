"""Star topology: every surface's network is a shared one, bent by weights of its own.

Paper: Sheng et al., "One Model to Serve All: Star Topology Adaptive Recommender for Multi-Domain CTR Prediction",
CIKM 2021. Formulas for a row x of surface s; `*` is element by element:

    x'    = (gamma * gamma_s) * (x - mean_s) / sqrt(var_s + eps) + (beta + beta_s)     partitioned normalisation
    h     = relu((W * W_s) h + (b + b_s))                                              each layer, and the heads
    logit = head_t(h) + auxiliary_t(x)                                                 auxiliary: one small network

gamma_s and W_s start at 1, beta_s and b_s at 0, so that every surface starts as the shared network. Moments are those
of the surface's rows in the batch while training and their running means after it; a batch with fewer than two rows
of a surface uses the running means. In a distributed run each rank normalises by its own rows.

Shape letters: C candidates, T tasks, X input width, S surfaces. Input [C, 1, X], output [C, T].

Example:
    >>> import torch
    >>> towers = StarTowers(surfaces=["hf", "sr"], tasks=["click", "save"], in_dim=4, hidden=[8])
    >>> towers(torch.randn(5, 1, 4), [2, 3]).shape
    torch.Size([5, 2])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.mlp import MLP
from components.names import check_at_least, check_names, surface_key, task_key
from components.ragged import split_surfaces


class PartitionedNorm(nn.Module):
    """Normalisation by a surface's own moments, [C_s, X] to [C_s, X].

    Args:
        surfaces: names.
        dim: X.
        momentum: share of a batch's moments in the running ones.
        eps: added to the variance.
    """

    def __init__(self, *, surfaces: Sequence[str], dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.own = nn.ModuleDict(
            {surface_key(s): nn.BatchNorm1d(dim, momentum=momentum, eps=eps) for s in check_names("surfaces", surfaces)}
        )

    def forward(self, x_CX: Tensor, surface: str) -> Tensor:
        norm = self.own[surface_key(surface)]
        assert isinstance(norm, nn.BatchNorm1d)
        use_batch = self.training and x_CX.shape[0] > 1
        return F.batch_norm(
            x_CX,
            norm.running_mean,
            norm.running_var,
            weight=self.scale * norm.weight,
            bias=self.shift + norm.bias,
            training=use_batch,
            momentum=norm.momentum or 0.0,
            eps=norm.eps,
        )


class OwnWeights(nn.Module):
    """What one surface multiplies and adds: weight [out, in], ones at first, and bias [out], zeros at first."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(out_dim, in_dim)), nn.Parameter(torch.zeros(out_dim))


class StarLinear(nn.Module):
    """A dense layer of shared times own weights and shared plus own bias, [C_s, X] to [C_s, D].

    Args:
        surfaces: names.
        in_dim: X.
        out_dim: D.
    """

    def __init__(self, *, surfaces: Sequence[str], in_dim: int, out_dim: int) -> None:
        super().__init__()
        check_at_least(1, in_dim=in_dim, out_dim=out_dim)
        self.shared = nn.Linear(in_dim, out_dim)
        self.own = nn.ModuleDict({surface_key(s): OwnWeights(in_dim, out_dim) for s in surfaces})

    def forward(self, x_CX: Tensor, surface: str) -> Tensor:
        own = self.own[surface_key(surface)]
        assert isinstance(own, OwnWeights)
        return F.linear(x_CX, self.shared.weight * own.weight, self.shared.bias + own.bias)


class StarTowers(nn.Module):
    """Star network of all surfaces, in the place of towers, [C, 1, X] to [C, T].

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of the layers, at least one.
        auxiliary: widths of the auxiliary network's layers; none makes it linear.

    Raises:
        ValueError: no or repeated names, no layer, a size below 1.
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        auxiliary: Sequence[int] = (16,),
    ) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        if not hidden:
            raise ValueError("hidden is empty; a star network needs at least 1 layer")
        widths = [in_dim, *hidden]
        self.norm = PartitionedNorm(surfaces=self.surfaces, dim=in_dim)
        self.layers = nn.ModuleList(
            StarLinear(surfaces=self.surfaces, in_dim=a, out_dim=b) for a, b in pairwise(widths)
        )
        self.heads = nn.ModuleDict(
            {task_key(t): StarLinear(surfaces=self.surfaces, in_dim=widths[-1], out_dim=1) for t in self.tasks}
        )
        self.auxiliary = MLP(in_dim=in_dim, hidden=auxiliary)
        self.auxiliary_head = nn.Linear(self.auxiliary.out_dim, len(self.tasks))

    def forward(
        self, x: Tensor, candidates_per_surface: Sequence[int], late: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[C, T]. Raises ValueError for late-fused vectors, or an input that differs by task."""
        if late:
            raise ValueError(f"a star network has no place for the late vectors of {sorted(late)}; use Towers")
        if x.shape[1] != 1:
            raise ValueError(f"a star network reads one vector a row, got {x.shape[1]} (one a task); use no mixture")
        rows_CX = x.squeeze(1)
        pieces = split_surfaces(rows_CX, candidates_per_surface, len(self.surfaces))
        star = torch.cat([self._star(rows, s) for s, rows in zip(self.surfaces, pieces, strict=True)])
        return star + self.auxiliary_head(self.auxiliary(rows_CX))

    def _star(self, x_CX: Tensor, surface: str) -> Tensor:
        hidden = self.norm(x_CX, surface)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden, surface))
        return torch.cat([self.heads[task_key(t)](hidden, surface) for t in self.tasks], dim=1)

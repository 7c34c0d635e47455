"""One tower tree a surface: a trunk, what only this surface has, and a head for each task.

Rows lie surface by surface; each tower computes its own slice and nothing else (never every tower for every row and
a choice afterwards). A surface without rows computes an empty slice, so that its parameters take part in the
backward pass with gradient zero and no rank of a distributed run waits for them.

Formula for a row of surface s with late-fused vector z (empty where the surface has none):

    logit_t = w_{s,t} . MLP_s([x_t; z]) + b_{s,t}

Shape letters: C candidates, T tasks, X input width, Z late width, S surfaces. Input [C, T, X], or [C, 1, X] where
all tasks read the same vector; output [C, T].

Example:
    >>> import torch
    >>> towers = Towers(surfaces=["hf", "sr"], tasks=["click", "save"], in_dim=4, hidden=[8], late_dims={"sr": 3})
    >>> towers(torch.ones(5, 1, 4), [2, 3], {"sr": torch.ones(3, 3)}).shape
    torch.Size([5, 2])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.mlp import MLP
from components.names import check_at_least, check_names, surface_key, task_key
from components.ragged import split_surfaces


class TowerTree(nn.Module):
    """Trunk and heads of one surface, [C, T or 1, X] to [C, T].

    Args:
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of the trunk; none puts the heads straight on the input.
        late_dim: Z, 0 for none.
        activation: after every layer of the trunk.
        dropout: probability in [0, 1).
        layer_norm: normalise before each activation.

    Raises:
        ValueError: no or repeated tasks, a size below its least, an unknown activation.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        late_dim: int = 0,
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = check_names("tasks", tasks)
        check_at_least(0, late_dim=late_dim)
        self.late_dim = late_dim
        self.trunk = MLP(
            in_dim=in_dim + late_dim, hidden=hidden, activation=activation, dropout=dropout, layer_norm=layer_norm
        )
        self.heads = nn.ModuleDict({task_key(t): nn.Linear(self.trunk.out_dim, 1) for t in self.tasks})

    def forward(self, x: Tensor, late_CZ: Tensor | None = None) -> Tensor:
        """[C, T]. Raises ValueError where the late vector is missing, unasked for, or of another width."""
        given = 0 if late_CZ is None else late_CZ.shape[1]
        if given != self.late_dim:
            raise ValueError(f"the tower was built for a late vector of width {self.late_dim} and got {given}")
        if late_CZ is not None:
            x = torch.cat([x, late_CZ.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=2)
        trunk = self.trunk(x)
        heads = [cast(nn.Linear, self.heads[task_key(task)]) for task in self.tasks]
        weight_TD, bias_T = torch.cat([h.weight for h in heads]), torch.cat([h.bias for h in heads])
        if trunk.shape[1] == 1:
            return F.linear(trunk.squeeze(1), weight_TD, bias_T)
        return (trunk * weight_TD).sum(-1) + bias_T


class Towers(nn.Module):
    """A tower tree for each surface, [C, T or 1, X] to [C, T].

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of every trunk.
        late_dims: Z of the surfaces that have modules of their own.
        activation: after every layer of a trunk.
        dropout: probability in [0, 1).
        layer_norm: normalise before each activation.

    Raises:
        ValueError: no or repeated names, a late surface that is not among `surfaces`, a size below its least.
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        late_dims: Mapping[str, int] | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        self.late_dims: dict[str, int] = dict(late_dims or {})
        stray = sorted(set(self.late_dims) - set(self.surfaces))
        if stray:
            raise ValueError(f"late_dims names surfaces {stray}, which are not among {list(self.surfaces)}")
        self.trees = nn.ModuleDict(
            {
                surface_key(s): TowerTree(
                    tasks=self.tasks,
                    in_dim=in_dim,
                    hidden=hidden,
                    late_dim=self.late_dims.get(s, 0),
                    activation=activation,
                    dropout=dropout,
                    layer_norm=layer_norm,
                )
                for s in self.surfaces
            }
        )

    def forward(
        self, x: Tensor, candidates_per_surface: Sequence[int], late: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[C, T]. `late` holds [C_s, Z_s] of each surface that was built with one."""
        pieces = split_surfaces(x, candidates_per_surface, len(self.surfaces))
        late = late or {}
        return torch.cat(
            [self.trees[surface_key(s)](rows, late.get(s)) for s, rows in zip(self.surfaces, pieces, strict=True)]
        )


class SharedTower(nn.Module):
    """The simpler rival: one tower for the rows of all surfaces; it cannot hold late-fused modules.

    Args:
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of the trunk.
        activation: after every layer of the trunk.
        dropout: probability in [0, 1).
        layer_norm: normalise before each activation.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tree = TowerTree(
            tasks=tasks, in_dim=in_dim, hidden=hidden, activation=activation, dropout=dropout, layer_norm=layer_norm
        )
        self.tasks = self.tree.tasks

    def forward(
        self, x: Tensor, candidates_per_surface: Sequence[int], late: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[C, T]. Raises ValueError where a surface brings late-fused vectors."""
        if late:
            raise ValueError(f"a SharedTower has no place for the late vectors of {sorted(late)}; use Towers")
        return self.tree(x)

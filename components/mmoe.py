"""Experts shared by all surfaces and tasks, mixed by a gate for each (surface, task).

Paper: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018.
Formula for a row x of surface s and for task t, with experts f_1..f_E:

    y_t = sum_e softmax(G_{s,t} x)_e f_e(x)

The first layers of all experts are one product, and so are the gates of a surface. Rows lie surface by surface, so
each gate reads a slice, and learns from its own surface's rows only.

Shape letters: C candidates, T tasks, E experts, X input width, D output width, S surfaces.

Example:
    >>> import torch
    >>> block = MMoE(surfaces=["hf", "sr"], tasks=["click"], in_dim=6, hidden=[8, 4], experts=3)
    >>> block(torch.ones(5, 6), [2, 3]).shape
    torch.Size([5, 1, 4])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.mlp import MLP, activation_layer
from components.names import check_at_least, check_names, surface_key, task_key
from components.ragged import split_surfaces


class GateLoad(NamedTuple):
    """How a set of rows uses the experts.

    Fields:
        utilisation: float [T, E], mean gate weight; rows sum to 1.
        entropy: float [T], mean entropy of a row's gate over log E: 1 = all experts alike, 0 = one expert.
    """

    utilisation: Tensor
    entropy: Tensor


def gate_load(gates_CTE: Tensor) -> GateLoad:
    """Load of gate weights [C, T, E]; no row at all gives zeros."""
    rows, experts = max(gates_CTE.shape[0], 1), gates_CTE.shape[2]
    entropy_CT = -torch.special.xlogy(gates_CTE, gates_CTE).sum(-1)
    scale = math.log(experts) if experts > 1 else 1.0
    return GateLoad(utilisation=gates_CTE.sum(0) / rows, entropy=entropy_CT.sum(0) / (rows * scale))


class ExpertLayer(nn.Module):
    """E dense layers, [C, X] (the same for all) or [C, E, X] to [C, E, D]: one product, or one batched product.

    Args:
        experts: E.
        in_dim: X.
        out_dim: D.
    """

    def __init__(self, *, experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(experts, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            # One product of width E * D; a batched one would also add up E gradients of the input.
            joined = F.linear(x, self.weight.transpose(1, 2).flatten(0, 1), self.bias.flatten())
            return joined.unflatten(1, self.bias.shape[::2])
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class MMoE(nn.Module):
    """Multi-gate mixture of experts, [C, X] to [C, T, D].

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of an expert's layers, at least one; the last is D.
        experts: E.
        activation: after every layer of an expert.

    Raises:
        ValueError: no or repeated names, no layer, a size below 1, an unknown activation.
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        experts: int,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        if not hidden:
            raise ValueError("hidden is empty; an expert needs at least 1 layer")
        check_at_least(1, in_dim=in_dim, experts=experts, **{f"hidden[{i}]": w for i, w in enumerate(hidden)})
        widths = [in_dim, *hidden]
        self.layers = nn.ModuleList(ExpertLayer(experts=experts, in_dim=a, out_dim=b) for a, b in pairwise(widths))
        self.activation = activation_layer(activation)
        self.gates = nn.ModuleDict(
            {
                surface_key(s): nn.ModuleDict({task_key(t): nn.Linear(in_dim, experts, bias=False) for t in self.tasks})
                for s in self.surfaces
            }
        )
        self.out_dim = hidden[-1]

    def gate_weights(self, x_CX: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        """Softmaxed gates, [C, T, E]; each row by the gates of its own surface."""
        pieces = split_surfaces(x_CX, candidates_per_surface, len(self.surfaces))
        return torch.cat(
            [
                F.linear(rows, self._gates(surface)).unflatten(1, (len(self.tasks), -1)).softmax(-1)
                for surface, rows in zip(self.surfaces, pieces, strict=True)
            ]
        )

    def _gates(self, surface: str) -> Tensor:
        """Weights of a surface's gates, [T * E, X]: its tasks are one product."""
        gates = self.gates[surface_key(surface)]
        assert isinstance(gates, nn.ModuleDict)
        return torch.cat([cast(nn.Linear, gates[task_key(task)]).weight for task in self.tasks])

    def forward(self, x_CX: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        experts_CED = x_CX
        for layer in self.layers:
            experts_CED = self.activation(layer(experts_CED))
        gates_CTE = self.gate_weights(x_CX, candidates_per_surface)
        return torch.bmm(gates_CTE.to(experts_CED.dtype), experts_CED)


class SharedBottom(nn.Module):
    """The simpler rival: one perceptron for every surface and task, [C, X] to [C, 1, D].

    The middle dimension is 1 because all tasks read the same vector; towers accept both.

    Args:
        in_dim: X.
        hidden: widths of the layers, at least one; the last is D.
        activation: after every layer.
        dropout: probability in [0, 1).

    Raises:
        ValueError: no layer, a size below 1, an unknown activation, a dropout outside [0, 1).
    """

    def __init__(self, *, in_dim: int, hidden: Sequence[int], activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden is empty; a SharedBottom needs at least 1 layer")
        self.mlp = MLP(in_dim=in_dim, hidden=hidden, activation=activation, dropout=dropout)
        self.out_dim = self.mlp.out_dim

    def forward(self, x_CX: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        return self.mlp(x_CX).unsqueeze(1)

"""Progressive layered extraction: experts of each surface's own beside experts that all surfaces share.

Paper: Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
Recommendations", RecSys 2020. The paper's groups of experts are tasks; here they are surfaces, and tasks differ by
their gates. A row goes through its own surface's experts and the shared ones, never through another surface's.
Formula of level l for a row of surface s, with own experts f, shared experts g and [f; g] all that the row has:

    x_s <- softmax(G_l,s x_s) . [f_l,s(x_s); g_l(x_0)]        what only the surface reads on
    x_0 <- softmax(G_l,0 x_0) . [f_l,s(x_s); g_l(x_0)]        what the shared experts read on
    y_t  = softmax(G_L,s,t x_s) . [f_L,s(x_s); g_L(x_0)]      last level, for task t

One level is the paper's CGC. Rows lie surface by surface.

Shape letters: C candidates, T tasks, E experts, X input width, D output width, S surfaces.

Example:
    >>> import torch
    >>> block = PLE(surfaces=["hf", "sr"], tasks=["click"], in_dim=6, hidden=[4], own=1, shared=2, levels=2)
    >>> block(torch.ones(5, 6), [2, 3]).shape
    torch.Size([5, 1, 4])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from components.mlp import activation_layer
from components.mmoe import ExpertLayer
from components.names import check_at_least, check_names, surface_key, task_key
from components.ragged import split_surfaces


class Experts(nn.Module):
    """E perceptrons over the same rows, [C, X] to [C, E, D].

    Args:
        experts: E.
        in_dim: X.
        hidden: widths of the layers; the last is D.
        activation: after every layer.
    """

    def __init__(self, *, experts: int, in_dim: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ExpertLayer(experts=experts, in_dim=a, out_dim=b) for a, b in pairwise([in_dim, *hidden])
        )
        self.activation = activation_layer(activation)

    def forward(self, x_CX: Tensor) -> Tensor:
        x_CED = x_CX
        for layer in self.layers:
            x_CED = self.activation(layer(x_CED))
        return x_CED


class ExtractionLevel(nn.Module):
    """Experts and gates of one level.

    Args:
        surfaces: names, in the order of rows.
        outputs: names of what each surface's rows are mixed into: the tasks, or one alone between levels.
        in_dim: X.
        hidden: widths of an expert's layers.
        own: experts of each surface.
        shared: experts of all surfaces.
        pass_shared: also mix what the next level's shared experts read.
        activation: of the experts.
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        outputs: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        own: int,
        shared: int,
        pass_shared: bool,
        activation: str,
    ) -> None:
        super().__init__()
        self.surfaces, self.outputs = tuple(surfaces), tuple(outputs)
        self.shared = Experts(experts=shared, in_dim=in_dim, hidden=hidden, activation=activation)
        self.own = nn.ModuleDict(
            {
                surface_key(s): Experts(experts=own, in_dim=in_dim, hidden=hidden, activation=activation)
                for s in self.surfaces
            }
        )
        self.gates = nn.ModuleDict(
            {
                surface_key(s): nn.ModuleDict({t: nn.Linear(in_dim, own + shared, bias=False) for t in self.outputs})
                for s in self.surfaces
            }
        )
        self.shared_gate = nn.Linear(in_dim, own + shared, bias=False) if pass_shared else None

    def forward(self, own_CX: Tensor, shared_CX: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What surfaces read on, [C, outputs, D], and what shared experts read on, [C, D] or None."""
        pieces = split_surfaces(own_CX, counts, len(self.surfaces))
        experts_CED = torch.cat(
            [
                torch.cat([self.own[surface_key(s)](rows) for s, rows in zip(self.surfaces, pieces, strict=True)]),
                self.shared(shared_CX),
            ],
            dim=1,
        )
        weights_COE = torch.cat(
            [
                torch.stack([gate(rows) for gate in self._gates(s)], dim=1)
                for s, rows in zip(self.surfaces, pieces, strict=True)
            ]
        ).softmax(-1)
        mixed_COD = torch.bmm(weights_COE, experts_CED)
        if self.shared_gate is None:
            return mixed_COD, None
        weights_CE = self.shared_gate(shared_CX).softmax(-1)
        return mixed_COD, torch.bmm(weights_CE.unsqueeze(1), experts_CED).squeeze(1)

    def _gates(self, surface: str) -> list[nn.Module]:
        gates = self.gates[surface_key(surface)]
        assert isinstance(gates, nn.ModuleDict)
        return [gates[name] for name in self.outputs]


class PLE(nn.Module):
    """Levels of own and shared experts, [C, X] to [C, T, D].

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of an expert's layers at every level, at least one; the last is D.
        own: experts of each surface at every level.
        shared: experts of all surfaces at every level.
        levels: number of levels; 1 is CGC.
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
        own: int = 1,
        shared: int = 2,
        levels: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        if not hidden:
            raise ValueError("hidden is empty; an expert needs at least 1 layer")
        widths = {f"hidden[{i}]": w for i, w in enumerate(hidden)}
        check_at_least(1, in_dim=in_dim, own=own, shared=shared, levels=levels, **widths)
        self.levels = nn.ModuleList(
            ExtractionLevel(
                surfaces=self.surfaces,
                outputs=[task_key(t) for t in self.tasks] if last else ["next"],
                in_dim=hidden[-1] if level else in_dim,
                hidden=hidden,
                own=own,
                shared=shared,
                pass_shared=not last,
                activation=activation,
            )
            for level, last in ((i, i == levels - 1) for i in range(levels))
        )
        self.out_dim = hidden[-1]

    def forward(self, x_CX: Tensor, candidates_per_surface: Sequence[int]) -> Tensor:
        own, shared = x_CX, x_CX
        for level in self.levels:
            mixed_COD, passed = level(own, shared, candidates_per_surface)
            if passed is None:
                return mixed_COD
            own, shared = mixed_COD.squeeze(1), passed
        raise AssertionError("the last level passes nothing on")

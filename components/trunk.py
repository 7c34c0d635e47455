"""The part that all surfaces share: explicit crossing beside a deep tower, on [request; candidate].

Formula, with optional gates g (`components.gating`), cross network K and deep tower H:

    x = g_r(request),  y = g_c(candidate),  out_c = [K([x_r(c); y_c]); H([x_r(c); y_c])]

The deep tower's first layer and the request gate run at R rows; only crossing needs the joint vector at C rows.

Shape letters: R requests, C candidates, X request width, Y candidate width (history included).

Example:
    >>> from components.mlp import SplitMLP
    >>> Trunk(cross=None, deep=SplitMLP(request_dim=3, candidate_dim=2, hidden=[8, 4])).out_dim
    4
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.cross import CrossProjection, DCNv2
from components.gating import EPNet
from components.inputs import ModelInputs
from components.mlp import SplitMLP, concat


class Trunk(nn.Module):
    """[R, X] and [C, Y] to [C, out_dim].

    Args:
        cross: [C, X + Y] to [C, its out_dim], or None.
        deep: the deep tower, or None.
        request_gate: gates [R, X], or None.
        candidate_gate: gates [C, Y], or None.

    Raises:
        ValueError: neither cross nor deep.
    """

    def __init__(
        self,
        *,
        cross: DCNv2 | CrossProjection | None,
        deep: SplitMLP | None,
        request_gate: EPNet | None = None,
        candidate_gate: EPNet | None = None,
    ) -> None:
        super().__init__()
        if cross is None and deep is None:
            raise ValueError("cross and deep are both None; a trunk needs at least one of them")
        self.cross, self.deep = cross, deep
        self.request_gate, self.candidate_gate = request_gate, candidate_gate
        self.out_dim = (cross.out_dim if cross is not None else 0) + (deep.out_dim if deep is not None else 0)

    def forward(self, request_RX: Tensor, candidate_CY: Tensor, inputs: ModelInputs) -> Tensor:
        owner = inputs.request_of_candidate
        if self.request_gate is not None:
            request_RX = self.request_gate(request_RX, inputs.surface_of_request)
        if self.candidate_gate is not None:
            candidate_CY = self.candidate_gate(candidate_CY, inputs.surface_of_request.index_select(0, owner))
        parts = []
        if self.cross is not None:
            parts.append(self.cross(torch.cat([request_RX.index_select(0, owner), candidate_CY], dim=1)))
        if self.deep is not None:
            parts.append(self.deep(request_RX, candidate_CY, owner))
        return concat(parts)

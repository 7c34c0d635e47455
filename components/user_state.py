"""A user's state as a sum over decaying, gated events: the cheap reader of long histories.

Papers: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", ICML 2023 (a diagonal linear
recurrence, here in continuous time and summed at once); Zhou et al., "Deep Interest Network", KDD 2018 (no softmax,
because it divides out how often and how much). Formula for events e = 1..n of a request and a query q:

    x_e = LayerNorm(W ids_e) * action[a_e] * surface[s_e] * own[s_e is the request's] * exp(-seconds_e / tau)
    z   = tanh(V asinh((x_1 + ... + x_n) / scale) + b),   out = [z; z * U q]

Each of the D dimensions has a time constant tau of its own, at first spread evenly in the logarithm from ten minutes
to two weeks. What an action means is a factor, not a summand: a sum of summands cannot tell a click on one topic and
a hide on another from the reverse. asinh, linear near 0 and a logarithm far from it, keeps sums over two weeks within
reach of those over ten minutes: without it the long memories of many events drown the short ones, and histories of 192
events taught less than those of 48 (docs/experiments.md). Costs O(H D) a batch and nothing per pair of candidate and
event.

Shape letters: R requests, C candidates, H events (sum over requests), L longest history, D width, Q query width.

Example:
    >>> block = UserState(sequences={"history_item": 4}, query_dim=6, width=8, actions=3, surface_codes=[1, 2])
    >>> block.out_dim
    16
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from components.cross import CrossProjection, LinearProjection
from components.inputs import ModelInputs
from components.mlp import concat
from components.names import check_at_least
from components.numeric import NumericFeatures
from components.ragged import one_hot, pad_rows

SHORTEST_S, LONGEST_S = 600.0, 14 * 24 * 3600.0


class UserState(nn.Module):
    """[C, Q] queries and a history to [C, out_dim]; an empty history gives tanh(b).

    Args:
        sequences: width of each history key of the shared tables, at least one.
        query_dim: Q.
        width: D.
        actions: number of action codes.
        surface_codes: for each surface of the model, its code in `history_surface`.
        all_surfaces: number of surface codes, the unknown one included; None for one more than the highest above.
        numeric: encoder of the events' numeric columns, or None to leave them out.
        scale: sums are divided by it; about the number of events that count at once.
        projection: of the output, or None to leave its width.

    Raises:
        ValueError: no sequence or surface, a code out of range, a size below 1 or a scale that is not above 0.
    """

    surface_codes: Tensor

    def __init__(
        self,
        *,
        sequences: Mapping[str, int],
        query_dim: int,
        width: int,
        actions: int,
        surface_codes: Sequence[int],
        all_surfaces: int | None = None,
        numeric: NumericFeatures | None = None,
        scale: float = 4.0,
        projection: CrossProjection | LinearProjection | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, query_dim=query_dim, width=width, actions=actions, **sequences)
        if not sequences or not surface_codes:
            raise ValueError(f"sequences are {list(sequences)} and surface_codes {list(surface_codes)}; give some")
        codes = max(surface_codes) + 1 if all_surfaces is None else all_surfaces
        if not 0 <= min(surface_codes) <= max(surface_codes) < codes:
            raise ValueError(f"surface_codes {list(surface_codes)} must lie in [0, {codes})")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; it must be above 0")
        self.keys = tuple(sequences)
        self.numeric = numeric if numeric is not None and numeric.out_dim else None
        self.scale = scale
        in_dim = sum(sequences.values()) + (self.numeric.out_dim if self.numeric is not None else 0)
        self.project = nn.Linear(in_dim, width)
        # Tables start small and numbers do not; the norm gives every event the same size from the first step on.
        self.norm = nn.LayerNorm(width)
        self.action = nn.Embedding(actions, width)
        self.surface = nn.Embedding(codes, width)
        self.own = nn.Embedding(2, width)
        for gate in (self.surface, self.own):
            nn.init.ones_(gate.weight)
        self.log_tau = nn.Parameter(torch.linspace(math.log(SHORTEST_S), math.log(LONGEST_S), width))
        self.state = nn.Linear(width, width)
        self.query = nn.Linear(query_dim, width)
        self.register_buffer("surface_codes", torch.tensor(list(surface_codes), dtype=torch.int64), persistent=False)
        self.projection = projection
        self.out_dim = 2 * width if projection is None else projection.out_dim

    def forward(self, query_CQ: Tensor, sequences: Mapping[str, JaggedTensor], inputs: ModelInputs) -> Tensor:
        """[C, out_dim]."""
        state_CD = self._state(sequences, inputs).index_select(0, inputs.request_of_candidate)
        read = torch.cat([state_CD, state_CD * self.query(query_CQ)], dim=1)
        return read if self.projection is None else self.projection(read)

    def _state(self, sequences: Mapping[str, JaggedTensor], inputs: ModelInputs) -> Tensor:
        """[R, D]."""
        parts = [sequences[key].values() for key in self.keys]
        if self.numeric is not None:
            parts.append(self.numeric(inputs.history_numeric))
        first = sequences[self.keys[0]]
        surface_H = inputs.history_surface
        events_HD = self.norm(self.project(concat(parts)))
        # As products: a look-up's backward pass adds up thousands of events in a handful of rows, one at a time.
        for gate, codes_H in ((self.action, inputs.history_action), (self.surface, surface_H)):
            events_HD = events_HD * (one_hot(codes_H, gate.num_embeddings, dtype=events_HD.dtype) @ gate.weight)
        events_HD = events_HD * torch.exp(-inputs.history_age.unsqueeze(1) * torch.exp(-self.log_tau))
        slots = inputs.history_slots.shape[0]
        events_RLD = pad_rows(events_HD, first.offsets(), slots)
        surface_RL = pad_rows(surface_H.to(events_HD.dtype).unsqueeze(1), first.offsets(), slots).squeeze(2)
        own_R = self.surface_codes.index_select(0, inputs.surface_of_request).to(events_HD.dtype)
        is_own_RL = (surface_RL == own_R.unsqueeze(1)).to(events_HD.dtype)
        # The gate has two values, so the gated sum is one of two sums: all events, and those of this surface.
        elsewhere_D, own_D = self.own.weight.unbind()
        of_own_RD = (is_own_RL.unsqueeze(1) @ events_RLD).squeeze(1)
        summed_RD = events_RLD.sum(1) * elsewhere_D + of_own_RD * (own_D - elsewhere_D)
        return torch.tanh(self.state(torch.asinh(summed_RD / self.scale)))

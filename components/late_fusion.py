"""What only one surface has, brought in late: in its own tower, past the part that all surfaces share.

Search has a query, Related Pins the pin that was looked at. Formula, for late request features u, late candidate
features v and the candidate's vector y:

    z = [n; n * (Y y); v],   n = LayerNorm(U u)

U and Y project to the same width and neither they nor the norm has a bias, so a request that lacks the feature adds
exactly nothing. Tables start small: the norm gives a query or related item its full size from the first step on, where
a product of two small vectors would learn late. Only the surface's own rows are computed, and U at its requests, not
its candidates.

Shape letters: R_s requests and C_s candidates of the surface, P late width, Z output width.

Example:
    >>> from components.features import RequestVector
    >>> LateFusion(request=RequestVector(bags={"query": 6}), candidate=None, candidate_dim=5, width=4).out_dim
    8
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.embeddings import Embedded
from components.features import CandidateVector, RequestVector
from components.inputs import ModelInputs
from components.names import check_at_least
from components.ragged import split_surfaces

# Keeps an absent feature at 0. Where tables start at 1 / sqrt(rows), U u has a variance of 1 / (9 rows), which is above
# it up to some 100,000 rows; ids of larger tables start smaller and come to size as they learn.
NORM_EPS = 1e-6


class LateFusion(nn.Module):
    """The late vector of one surface, [C_s, Z].

    Args:
        request: reads the surface's own request features, or None.
        candidate: reads its own candidate features, or None.
        candidate_dim: width of the candidate vector that the request features meet.
        width: P.

    Raises:
        ValueError: neither request nor candidate, or a size below 1.
    """

    def __init__(
        self,
        *,
        request: RequestVector | None,
        candidate: CandidateVector | None,
        candidate_dim: int,
        width: int,
    ) -> None:
        super().__init__()
        check_at_least(1, candidate_dim=candidate_dim, width=width)
        if request is None and candidate is None:
            raise ValueError("request and candidate are both None; late fusion needs at least one of them")
        self.request, self.candidate = request, candidate
        self.out_dim = candidate.out_dim if candidate is not None else 0
        if request is not None:
            self.project_request = nn.Linear(request.out_dim, width, bias=False)
            self.project_candidate = nn.Linear(candidate_dim, width, bias=False)
            self.out_dim += 2 * width

    @property
    def keys(self) -> frozenset[str]:
        """Every embedding key that the block reads."""
        read = [vector.keys for vector in (self.request, self.candidate) if vector is not None]
        return frozenset().union(*read)

    def forward(
        self, embedded: Embedded, inputs: ModelInputs, candidate_CY: Tensor, position: int, surfaces: int
    ) -> Tensor:
        """[C_s, Z].

        Args:
            embedded: what the tables gave.
            inputs: the batch.
            candidate_CY: candidate vectors of the whole batch.
            position: index of this surface in the model's surfaces.
            surfaces: number of surfaces, S.
        """
        counts = inputs.candidates_per_surface
        parts: list[Tensor] = []
        if self.request is not None:
            requests = split_surfaces(self.request(embedded, inputs), inputs.requests_per_surface, surfaces)[position]
            first = sum(inputs.requests_per_surface[:position])
            owner = split_surfaces(inputs.request_of_candidate, counts, surfaces)[position] - first
            projected = self.project_request(requests)
            late = F.layer_norm(projected, projected.shape[1:], eps=NORM_EPS).index_select(0, owner)
            rows = split_surfaces(candidate_CY, counts, surfaces)[position]
            parts += [late, late * self.project_candidate(rows)]
        if self.candidate is not None:
            parts.append(split_surfaces(self.candidate(embedded, inputs), counts, surfaces)[position])
        return torch.cat(parts, dim=1)

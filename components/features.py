"""From looked-up embeddings and numbers to one vector a request and one a candidate.

    request vector   [R, X] = [request bags; request ids of shared tables; numbers; surface embedding]
    candidate vector [C, Y] = [candidate bags; candidate ids of shared tables; numbers]

A feature that a row lacks is a zero vector (an empty bag, an empty list), which no id can give except by training.

Shape letters: R requests, C candidates, X and Y widths, S surfaces, D width of the surface embedding.

Example:
    >>> import torch
    >>> SurfaceEmbedding(surfaces=["hf", "sr"], dim=4)(torch.tensor([1, 0, 1])).shape
    torch.Size([3, 4])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from components.embeddings import Embedded
from components.inputs import ModelInputs
from components.mlp import concat
from components.names import check_at_least, check_names, surface_key
from components.numeric import NumericFeatures
from components.ragged import pad_rows


class SurfaceEmbedding(nn.Module):
    """One vector a surface, a parameter of its own each, so that a pruned model takes only its own.

    Args:
        surfaces: names, in the order of the model's surfaces.
        dim: D.

    Raises:
        ValueError: no surface, a name twice, or a width below 1.
    """

    def __init__(self, *, surfaces: Sequence[str], dim: int) -> None:
        super().__init__()
        self.surfaces = check_names("surfaces", surfaces)
        check_at_least(1, dim=dim)
        self.out_dim = dim
        self.vectors = nn.ParameterDict(
            {surface_key(s): nn.Parameter(torch.randn(dim) * dim**-0.5) for s in self.surfaces}
        )

    def forward(self, surface_of_row: Tensor) -> Tensor:
        """Int64 [rows], index of each row's surface, to [rows, D]."""
        table_SD = torch.stack([self.vectors[surface_key(s)] for s in self.surfaces])
        return table_SD.index_select(0, surface_of_row)


class FeatureVector(nn.Module):
    """Base of the vectors below: which keys they read, by name, and how wide each is.

    Args:
        bags: width of each key of the level's bag collection.
        sequences: width of each key of the level in the shared tables.
        numeric: encoder of the level's numeric columns, or None to leave them out.
        absent: keys among the above whose tables a pruned model no longer has; they read as zeros.

    Raises:
        ValueError: a width below 1, a key named twice, or an absent key that is not one of the vector's.
    """

    def __init__(
        self,
        *,
        bags: Mapping[str, int] | None = None,
        sequences: Mapping[str, int] | None = None,
        numeric: NumericFeatures | None = None,
        absent: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.bags, self.sequences = dict(bags or {}), dict(sequences or {})
        for key, width in [*self.bags.items(), *self.sequences.items()]:
            check_at_least(1, **{key: width})
        twice = sorted(self.bags.keys() & self.sequences.keys())
        if twice:
            raise ValueError(f"{twice} stand both in bags {list(self.bags)} and in sequences {list(self.sequences)}")
        stray = sorted(set(absent) - self.keys)
        if stray:
            raise ValueError(f"absent names {stray}, which are not among the keys {sorted(self.keys)}")
        self.absent = frozenset(absent)
        # An encoder without columns would add nothing but an empty tensor to every forward pass.
        self.numeric = numeric if numeric is not None and numeric.out_dim else None
        self.out_dim = sum(self.bags.values()) + sum(self.sequences.values())
        self.out_dim += self.numeric.out_dim if self.numeric is not None else 0

    @property
    def keys(self) -> frozenset[str]:
        """Every embedding key that the vector reads."""
        return frozenset(self.bags) | frozenset(self.sequences)

    def _bag_parts(self, pooled: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
        return [self._zeros(like, width) if key in self.absent else pooled[key] for key, width in self.bags.items()]

    def _zeros(self, like: Tensor, width: int) -> Tensor:
        return torch.zeros(like.shape[0], width, device=like.device)


def _jagged(embedded: Embedded, key: str) -> JaggedTensor:
    assert embedded.sequences is not None, f"{key} wants a sequence collection"
    return embedded.sequences[key]


class RequestVector(FeatureVector):
    """[R, X]. Arguments of `FeatureVector`, and `surface`, the surface embedding to append (or None)."""

    def __init__(
        self,
        *,
        bags: Mapping[str, int] | None = None,
        sequences: Mapping[str, int] | None = None,
        numeric: NumericFeatures | None = None,
        absent: Sequence[str] = (),
        surface: SurfaceEmbedding | None = None,
    ) -> None:
        super().__init__(bags=bags, sequences=sequences, numeric=numeric, absent=absent)
        self.surface = surface
        self.out_dim += surface.out_dim if surface is not None else 0
        check_at_least(1, **{"width of the request vector": self.out_dim})

    def forward(self, embedded: Embedded, inputs: ModelInputs) -> Tensor:
        """[R, X]. A shared-table key has at most one id a request; more than the first are not read."""
        counts = inputs.candidate_counts
        parts = self._bag_parts({} if embedded.request is None else embedded.request.to_dict(), counts)
        for key, width in self.sequences.items():
            if key in self.absent:
                parts.append(self._zeros(counts, width))
            else:
                jagged = _jagged(embedded, key)
                parts.append(pad_rows(jagged.values(), jagged.offsets(), 1).squeeze(1))
        if self.numeric is not None:
            parts.append(self.numeric(inputs.request_numeric))
        if self.surface is not None:
            parts.append(self.surface(inputs.surface_of_request))
        return concat(parts)


class CandidateVector(FeatureVector):
    """[C, Y]. Arguments of `FeatureVector`."""

    def __init__(
        self,
        *,
        bags: Mapping[str, int] | None = None,
        sequences: Mapping[str, int] | None = None,
        numeric: NumericFeatures | None = None,
        absent: Sequence[str] = (),
    ) -> None:
        super().__init__(bags=bags, sequences=sequences, numeric=numeric, absent=absent)
        check_at_least(1, **{"width of the candidate vector": self.out_dim})

    def forward(self, embedded: Embedded, inputs: ModelInputs) -> Tensor:
        """[C, Y]. A shared-table key has exactly one id a candidate, so its values are the rows."""
        rows = inputs.request_of_candidate
        parts = self._bag_parts({} if embedded.candidate is None else embedded.candidate.to_dict(), rows)
        for key, width in self.sequences.items():
            parts.append(self._zeros(rows, width) if key in self.absent else _jagged(embedded, key).values())
        if self.numeric is not None:
            parts.append(self.numeric(inputs.candidate_numeric))
        return concat(parts)

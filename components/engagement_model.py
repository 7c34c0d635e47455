"""The engagement model: tables, history, trunk, mixture, towers, calibration.

    history [R, L] -> encoder -> candidates attend [C, kD] -> cross projection [C, P]
    request vector [R, X], [candidate vector; P] [C, Y] -> trunk [C, D] -> mixture [C, T, D]
    -> own surface's tower (+ late fusion) [C, T] logits -> calibration on detached logits [C, T]

What belongs to a request is computed at R rows and broadcast to C as late as possible.

Pruning to one surface. Parameters of surface `hf` carry the name part `surface_hf` (`components.names`), all others
are shared. A body built for some of the surfaces, otherwise with the same arguments, loads exactly
`keep_surfaces(state, keep=[...])` of the whole body's state and gives the same outputs on those surfaces' rows.
Embedding keys whose tables were dropped, because the kept surfaces never fill them, are named as `absent` in the
vectors that read them. Numeric columns stay; NaN fills those that a surface lacks.

Shape letters: R requests, C candidates, L longest history, T tasks, S surfaces; X, Y, D, P widths.

Example:
    >>> from components.features import SurfaceEmbedding
    >>> from components.mlp import SplitMLP
    >>> from components.names import surface_of
    >>> surfaces, tasks = ("hf", "sr"), ("click",)
    >>> request = RequestVector(bags={"user": 4}, surface=SurfaceEmbedding(surfaces=surfaces, dim=4))
    >>> candidate = CandidateVector(bags={"item": 4})
    >>> deep = SplitMLP(request_dim=request.out_dim, candidate_dim=candidate.out_dim, hidden=[8])
    >>> body = EngagementBody(
    ...     surfaces=surfaces, tasks=tasks, request=request, candidate=candidate, trunk=Trunk(cross=None, deep=deep),
    ...     towers=Towers(surfaces=surfaces, tasks=tasks, in_dim=8, hidden=[4]),
    ...     calibration=SurfaceCalibration(surfaces=surfaces, tasks=tasks),
    ... )
    >>> sum(surface_of(name) == "hf" for name, _ in body.named_parameters())
    7
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchrec.sparse.jagged_tensor import KeyedTensor

from components.calibration import GlobalCalibration, IdentityCalibration, SurfaceCalibration
from components.embeddings import Embedded, EmbeddingLayer
from components.features import CandidateVector, RequestVector
from components.history import HistoryBlock
from components.inputs import ModelInputs
from components.late_fusion import LateFusion
from components.micro_batches import micro_batches
from components.mlp import check_dropout
from components.mmoe import MMoE, SharedBottom
from components.names import check_names, surface_key
from components.ple import PLE
from components.residual_towers import ResidualTowers
from components.star import StarTowers
from components.towers import SharedTower, Towers
from components.trunk import Trunk
from components.user_state import UserState

AnyTowers = Towers | ResidualTowers | StarTowers | SharedTower


class ModelOutputs(NamedTuple):
    """Logits of a batch, rows as in the inputs.

    Fields:
        logits: float [C, T], what ranks; the gradient reaches the whole model.
        calibrated: float [C, T], what sigmoid turns into a probability; the gradient reaches calibration only.
    """

    logits: Tensor
    calibrated: Tensor


class EngagementBody(nn.Module):
    """Everything but the tables.

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of columns.
        request: builds the request vector.
        candidate: builds the candidate vector, which is also what asks the history.
        trunk: shared part; its candidate width is that of candidate vector and history together.
        towers: per surface, shared, or both.
        calibration: per surface, shared or none.
        history: reads the history for each candidate, or None.
        mixture: experts or a shared perceptron between trunk and towers, or None.
        late: late fusion of the surfaces that have features of their own.
        embedding_dropout: probability in [0, 1) with which training drops a value of a pooled embedding; the events
            of the history keep all of theirs.

    Raises:
        ValueError: parts built for other surfaces or tasks, a late surface that is not among the surfaces or whose
            tower expects another width, a key both in the shared vectors and in a late one, a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        tasks: Sequence[str],
        request: RequestVector,
        candidate: CandidateVector,
        trunk: Trunk,
        towers: AnyTowers,
        calibration: SurfaceCalibration | GlobalCalibration | IdentityCalibration,
        history: HistoryBlock | UserState | None = None,
        mixture: MMoE | PLE | SharedBottom | None = None,
        late: Mapping[str, LateFusion] | None = None,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.surfaces, self.tasks = check_names("surfaces", surfaces), check_names("tasks", tasks)
        self.request, self.candidate, self.history = request, candidate, history
        self.trunk, self.mixture, self.towers, self.calibration = trunk, mixture, towers, calibration
        self.late = nn.ModuleDict({surface_key(s): block for s, block in (late or {}).items()})
        check_dropout(embedding_dropout)
        self.embedding_dropout = embedding_dropout
        # Runs of requests that training sends through one after another; see `components.micro_batches`.
        self.micro_batches = 1
        self._check_parts()
        self._check_late(dict(late or {}))

    def forward(self, embedded: Embedded, inputs: ModelInputs) -> ModelOutputs:
        if self.micro_batches == 1 or not self.training:
            return self._outputs(embedded, inputs)
        history_key = self.history.keys[0] if self.history is not None else None
        runs = micro_batches(embedded, inputs, parts=self.micro_batches, history_key=history_key)
        outputs = [checkpoint(self._outputs, *run, use_reentrant=False) for run in runs]
        logits, calibrated = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return ModelOutputs(logits=logits, calibrated=calibrated)

    def _outputs(self, embedded: Embedded, inputs: ModelInputs) -> ModelOutputs:
        counts = inputs.candidates_per_surface
        if self.training and self.embedding_dropout:
            embedded = embedded._replace(
                request=_dropped(embedded.request, self.embedding_dropout),
                candidate=_dropped(embedded.candidate, self.embedding_dropout),
            )
        request_RX = self.request(embedded, inputs)
        candidate_CY = self.candidate(embedded, inputs)
        asked_CZ = candidate_CY
        if self.history is not None:
            assert embedded.sequences is not None, "a history wants a sequence collection"
            asked_CZ = torch.cat([candidate_CY, self.history(candidate_CY, embedded.sequences, inputs)], dim=1)
        shared_CD = self.trunk(request_RX, asked_CZ, inputs)
        mixed_CTD = shared_CD.unsqueeze(1) if self.mixture is None else self.mixture(shared_CD, counts)
        logits_CT = self.towers(mixed_CTD, counts, self._late_vectors(embedded, inputs, candidate_CY))
        return ModelOutputs(logits=logits_CT, calibrated=self.calibration(logits_CT, counts))

    def _late_vectors(self, embedded: Embedded, inputs: ModelInputs, candidate_CY: Tensor) -> dict[str, Tensor]:
        return {
            surface: self.late[surface_key(surface)](embedded, inputs, candidate_CY, position, len(self.surfaces))
            for position, surface in enumerate(self.surfaces)
            if surface_key(surface) in self.late
        }

    def _check_parts(self) -> None:
        parts: dict[str, nn.Module | None] = {
            "request vector": self.request.surface,
            "request gate": self.trunk.request_gate,
            "candidate gate": self.trunk.candidate_gate,
            "mixture": self.mixture,
            "towers": self.towers,
            "calibration": self.calibration,
        }
        for name, part in parts.items():
            for what, mine in (("surfaces", self.surfaces), ("tasks", self.tasks)):
                theirs = getattr(part, what, mine)
                if theirs != mine:
                    raise ValueError(f"{name} was built for {what} {list(theirs)}, the body for {list(mine)}")

    def _check_late(self, late: dict[str, LateFusion]) -> None:
        stray = sorted(set(late) - set(self.surfaces))
        if stray:
            raise ValueError(f"late names surfaces {stray}, which are not among {list(self.surfaces)}")
        if late and not isinstance(self.towers, Towers | ResidualTowers):
            name = type(self.towers).__name__
            raise ValueError(f"late fusion of {sorted(late)} needs Towers; a {name} has no place for it")
        shared = self.request.keys | self.candidate.keys
        for surface, block in late.items():
            both = sorted(block.keys & shared)
            if both:
                raise ValueError(f"{both} stand both in the shared vectors and in the late fusion of {surface!r}")
        expected: dict[str, int] = getattr(self.towers, "late_dims", {})
        for surface in self.surfaces:
            wants = expected.get(surface, 0)
            gives = late[surface].out_dim if surface in late else 0
            if wants != gives:
                raise ValueError(
                    f"tower of {surface!r} was built for a late vector of width {wants}, its late fusion gives {gives}"
                )


def _dropped(pooled: KeyedTensor | None, probability: float) -> KeyedTensor | None:
    if pooled is None:
        return None
    return KeyedTensor(pooled.keys(), pooled.length_per_key(), F.dropout(pooled.values(), probability))


class EngagementModel(nn.Module):
    """Tables and body. TorchRec shards `embeddings`; `body` holds no collection and is one leaf to its pipeline.

    Args:
        embeddings: all tables.
        body: everything else.
    """

    def __init__(self, *, embeddings: EmbeddingLayer, body: EngagementBody) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.body = body

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return self.body(self.embeddings(inputs), inputs)

"""From a run's configuration to a single-device model: the one place where settings meet blocks."""

from __future__ import annotations

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from components.attention import CandidateAttention, MeanHistory, Reader, TargetAttention
from components.calibration import GlobalCalibration, IdentityCalibration, SurfaceCalibration
from components.cross import CrossProjection, DCNv2, LinearProjection
from components.embeddings import EmbeddingLayer
from components.engagement_model import AnyTowers, EngagementBody, EngagementModel
from components.features import CandidateVector, RequestVector, SurfaceEmbedding
from components.gating import EPNet
from components.history import EventEmbedding, HistoryBlock, HistoryEncoder
from components.late_fusion import LateFusion
from components.losses import MultiTaskLoss
from components.mlp import SplitMLP
from components.mmoe import MMoE, SharedBottom
from components.numeric import NumericFeatures
from components.ple import PLE
from components.residual_towers import ResidualTowers
from components.star import StarTowers
from components.towers import SharedTower, Towers
from components.trunk import Trunk
from components.user_state import UserState
from pipeline.schema import Level
from pipeline.train.model_plan import ModelPlan
from pipeline.train.task import Objective, TrainTask

# Knots of the monotone calibration, in logits: dense where most predictions lie.
CALIBRATION_KNOTS = (-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
LATE_WIDTH = 16
SURFACE_WIDTH = 8
GATE_HIDDEN = 32


def build_task(plan: ModelPlan, *, table_device: torch.device) -> TrainTask:
    """The model and its losses.

    Args:
        plan: what to build.
        table_device: where tables are made; "meta" makes none, for a sharder to make.
    """
    config = plan.config
    weights = [config.task_weights.get(t, 1.0) for t in config.tasks]
    loss = MultiTaskLoss(tasks=config.tasks, task_weights=weights)
    return TrainTask(model=build_model(plan, table_device=table_device), objective=Objective(loss=loss))


def build_model(plan: ModelPlan, *, table_device: torch.device) -> EngagementModel:
    """The model alone; dense parameters are drawn from torch's global generator."""
    return EngagementModel(embeddings=build_embeddings(plan, table_device), body=build_body(plan))


def build_embeddings(plan: ModelPlan, device: torch.device) -> EmbeddingLayer:
    """The tables of the kept features, one for each vocabulary."""
    layout = plan.layout

    def tables(names: tuple[str, ...]) -> dict[str, list[str]]:
        features: dict[str, list[str]] = {}
        for name in names:
            features.setdefault(layout.vocabularies[name], []).append(name)
        return features

    def bags(names: tuple[str, ...]) -> EmbeddingBagCollection | None:
        configs = [
            EmbeddingBagConfig(
                name=v, embedding_dim=_dim(plan, v), num_embeddings=plan.schema.vocabulary(v).size, feature_names=f
            )
            for v, f in tables(names).items()
        ]
        return EmbeddingBagCollection(tables=configs, device=device) if configs else None

    sequences = [
        EmbeddingConfig(
            name=v, embedding_dim=_dim(plan, v), num_embeddings=plan.schema.vocabulary(v).size, feature_names=f
        )
        for v, f in tables(layout.sequence_keys).items()
    ]
    return EmbeddingLayer(
        request_bags=bags(layout.request_bags),
        candidate_bags=bags(layout.candidate_bags),
        sequences=EmbeddingCollection(tables=sequences, device=device) if sequences else None,
    )


def _dim(plan: ModelPlan, vocabulary: str) -> int:
    return plan.config.model.table_dims.get(vocabulary, plan.config.model.embedding_dim)


class _Keys:
    """Where each embedding key of the whole model goes: the shared vectors, or one surface's late fusion."""

    def __init__(self, plan: ModelPlan) -> None:
        self.plan = plan
        self.full = plan.trained_layout
        self.present = plan.layout.features
        fuse = plan.config.model.late_fusion and plan.config.model.towers in ("per_surface", "residual")
        self.late = {
            n: plan.schema.feature(n).surfaces[0]
            for n in self.full.vocabularies
            if fuse
            and len(plan.schema.surfaces) > 1
            and len(plan.schema.feature(n).surfaces) == 1
            and plan.schema.feature(n).level is not Level.HISTORY
        }

    def widths(self, names: tuple[str, ...], surface: str | None) -> dict[str, int]:
        """Widths of the keys that go to a surface's late fusion, or with None to the shared vectors."""
        return {n: _dim(self.plan, self.full.vocabularies[n]) for n in names if self.late.get(n) == surface}

    def absent(self, names: dict[str, int]) -> list[str]:
        return [n for n in names if n not in self.present]

    def numeric(self, names: tuple[str, ...]) -> NumericFeatures | None:
        moments = [self.plan.moments[n] for n in names]
        return NumericFeatures(mean=[m for m, _ in moments], std=[s for _, s in moments]) if names else None

    def request(self, surface: str | None, embedding: SurfaceEmbedding | None) -> RequestVector | None:
        bags, sequences = (
            self.widths(self.full.request_bags, surface),
            self.widths(self.full.request_sequences, surface),
        )
        if surface is not None and not bags and not sequences:
            return None
        return RequestVector(
            bags=bags,
            sequences=sequences,
            numeric=self.numeric(self.full.request_numeric) if surface is None else None,
            absent=self.absent(bags | sequences),
            surface=embedding,
        )

    def candidate(self, surface: str | None) -> CandidateVector | None:
        bags, sequences = (
            self.widths(self.full.candidate_bags, surface),
            self.widths(self.full.candidate_sequences, surface),
        )
        if surface is not None and not bags and not sequences:
            return None
        return CandidateVector(
            bags=bags,
            sequences=sequences,
            numeric=self.numeric(self.full.candidate_numeric) if surface is None else None,
            absent=self.absent(bags | sequences),
        )


def build_body(plan: ModelPlan) -> EngagementBody:
    """Everything but the tables; see `components.engagement_model` for how the parts meet."""
    config, surfaces = plan.config, plan.keep
    keys = _Keys(plan)
    request = keys.request(None, SurfaceEmbedding(surfaces=surfaces, dim=SURFACE_WIDTH))
    candidate = keys.candidate(None)
    assert request is not None, "the shared request vector always has the surface embedding"
    assert candidate is not None, "only late vectors may be missing"
    history = _history(plan, candidate.out_dim)
    candidate_dim = candidate.out_dim + (history.out_dim if history is not None else 0)
    trunk = _trunk(plan, request.out_dim, candidate_dim)
    mixture = _mixture(plan, trunk.out_dim)
    late = {s: block for s in surfaces if (block := _late(keys, s, candidate.out_dim)) is not None}
    in_dim = trunk.out_dim if mixture is None else mixture.out_dim
    towers = _towers(plan, in_dim, {s: block.out_dim for s, block in late.items()})
    return EngagementBody(
        surfaces=surfaces,
        tasks=config.tasks,
        request=request,
        candidate=candidate,
        history=history,
        trunk=trunk,
        mixture=mixture,
        towers=towers,
        calibration=_calibration(plan),
        late=late,
        embedding_dropout=config.model.embedding_dropout,
    )


def _history(plan: ModelPlan, query_dim: int) -> HistoryBlock | UserState | None:
    settings, layout = plan.config.model.history, plan.trained_layout
    if settings.kind == "none" or not layout.has_history:
        return None
    names = layout.history_numeric
    moments = [plan.moments[n] for n in names]
    numeric = NumericFeatures(mean=[m for m, _ in moments], std=[s for _, s in moments]) if names else None
    sequences = dict.fromkeys(layout.history_sequences, plan.config.model.embedding_dim)
    surfaces = 1 + len(plan.schema.surfaces)
    if settings.kind == "state":
        return UserState(
            sequences=sequences,
            query_dim=query_dim,
            width=settings.width,
            actions=plan.schema.action_count,
            surface_codes=[1 + plan.schema.surfaces.index(s) for s in plan.keep],
            all_surfaces=surfaces,
            numeric=numeric,
            projection=_projection(plan, 2 * settings.width),
        )
    events = EventEmbedding(
        sequences=sequences,
        width=settings.width,
        actions=plan.schema.action_count,
        surfaces=surfaces,
        numeric=numeric,
    )
    encoder = None
    reader: Reader
    if settings.kind == "mean":
        reader = MeanHistory(width=settings.width)
    elif settings.kind in ("target", "din"):
        reader = TargetAttention(
            query_dim=query_dim,
            width=settings.width,
            hidden=settings.unit,
            activation=settings.unit_activation,
            softmax=settings.kind == "target",
        )
    else:
        if settings.kind == "transformer":
            encoder = HistoryEncoder(
                width=settings.width,
                layers=settings.layers,
                heads=settings.heads,
                max_length=plan.schema.history_length,
                causal=settings.causal,
                dropout=settings.dropout,
            )
        reader = CandidateAttention(
            query_dim=query_dim,
            width=settings.width,
            heads=settings.heads,
            few_candidates=settings.few_candidates,
        )
    return HistoryBlock(events=events, encoder=encoder, reader=reader, projection=_projection(plan, reader.out_dim))


def _projection(plan: ModelPlan, in_dim: int) -> CrossProjection | LinearProjection | None:
    settings = plan.config.model.projection
    if settings.kind == "none":
        return None
    if settings.kind == "linear":
        return LinearProjection(in_dim=in_dim, out_dim=settings.width)
    return CrossProjection(in_dim=in_dim, out_dim=settings.width, layers=settings.layers, rank=settings.rank)


def _trunk(plan: ModelPlan, request_dim: int, candidate_dim: int) -> Trunk:
    model = plan.config.model
    width = request_dim + candidate_dim
    cross = DCNv2(in_dim=width, layers=model.cross_layers, rank=model.cross_rank) if model.cross_layers else None
    deep = (
        SplitMLP(request_dim=request_dim, candidate_dim=candidate_dim, hidden=model.deep, dropout=model.dropout)
        if model.deep
        else None
    )
    gates = (
        [EPNet(surfaces=plan.keep, in_dim=d, hidden=GATE_HIDDEN) for d in (request_dim, candidate_dim)]
        if model.surface_gate
        else [None, None]
    )
    return Trunk(cross=cross, deep=deep, request_gate=gates[0], candidate_gate=gates[1])


def _towers(plan: ModelPlan, in_dim: int, late_dims: dict[str, int]) -> AnyTowers:
    model, surfaces, tasks, hidden = plan.config.model, plan.keep, plan.config.tasks, plan.config.model.tower_hidden
    if model.towers == "shared":
        return SharedTower(tasks=tasks, in_dim=in_dim, hidden=hidden, dropout=model.dropout)
    if model.towers == "star":
        return StarTowers(surfaces=surfaces, tasks=tasks, in_dim=in_dim, hidden=hidden)
    build = ResidualTowers if model.towers == "residual" else Towers
    return build(
        surfaces=surfaces, tasks=tasks, in_dim=in_dim, hidden=hidden, late_dims=late_dims, dropout=model.dropout
    )


def _mixture(plan: ModelPlan, in_dim: int) -> MMoE | PLE | SharedBottom | None:
    settings = plan.config.model.mixture
    if settings.kind == "mmoe":
        return MMoE(
            surfaces=plan.keep,
            tasks=plan.config.tasks,
            in_dim=in_dim,
            hidden=settings.hidden,
            experts=settings.experts,
        )
    if settings.kind == "ple":
        return PLE(
            surfaces=plan.keep,
            tasks=plan.config.tasks,
            in_dim=in_dim,
            hidden=settings.hidden,
            own=settings.own_experts,
            shared=settings.experts,
            levels=settings.levels,
        )
    if settings.kind == "shared_bottom":
        return SharedBottom(in_dim=in_dim, hidden=settings.hidden, dropout=plan.config.model.dropout)
    return None


def _late(keys: _Keys, surface: str, candidate_dim: int) -> LateFusion | None:
    request, candidate = keys.request(surface, None), keys.candidate(surface)
    if request is None and candidate is None:
        return None
    return LateFusion(request=request, candidate=candidate, candidate_dim=candidate_dim, width=LATE_WIDTH)


def _calibration(plan: ModelPlan) -> SurfaceCalibration | GlobalCalibration | IdentityCalibration:
    kind, tasks = plan.config.model.calibration, plan.config.tasks
    if kind == "global":
        return GlobalCalibration(tasks=tasks)
    if kind == "none":
        return IdentityCalibration()
    knots = CALIBRATION_KNOTS if kind == "monotone" else None
    return SurfaceCalibration(surfaces=plan.keep, tasks=tasks, knots=knots)

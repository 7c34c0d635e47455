"""The blocks of a model and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import with_config

from pipeline.config.strict import STRICT

IdMethod = Literal["index", "hash", "given", "managed"]


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """What becomes of a user's history."""

    kind: Literal["transformer", "attention", "target", "din", "state", "mean", "none"] = "attention"
    """Transformer encoder with candidates attending to it; the same attention over bare events; a small activation
    unit with softmax over bare events; DIN's unit as published; a state summed over gated, decaying events; the mean
    of the bare events; nothing."""
    width: int = 32
    """Width of an encoded event."""
    layers: int = 1
    """Transformer layers."""
    heads: int = 2
    """Attention heads of encoder and candidates."""
    few_candidates: bool = False
    """Candidates project their queries into the space of events and not events theirs into that of queries: the same
    sums in another order, faster while a request has fewer candidates than a head has dimensions (width / heads)."""
    unit: tuple[int, ...] = (36,)
    """Hidden layers of the activation unit (target and din); the default is that of DIN's paper."""
    unit_activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid"] = "relu"
    """After each of them."""
    causal: bool = False
    """Let an event attend only to earlier ones."""
    dropout: float = 0.0
    """Dropout in the encoder."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How the wide history output becomes narrow before crossing."""

    kind: Literal["dcn", "linear", "none"] = "dcn"
    """DCNv2 layers and a linear map; a linear map alone; or the full width."""
    width: int = 32
    """Projected width P."""
    layers: int = 1
    """Cross layers of the projection."""
    rank: int = 16
    """Rank of its cross layers."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What lies between the trunk and the towers."""

    kind: Literal["mmoe", "ple", "shared_bottom", "none"] = "mmoe"
    """Experts with gates per surface and task; own beside shared experts (PLE); one shared layer; nothing."""
    experts: int = 4
    """Experts of an MMoE; shared experts of a PLE."""
    own_experts: int = 1
    """Experts of each surface at each level of a PLE."""
    levels: int = 2
    """Levels of a PLE."""
    hidden: tuple[int, ...] = (64,)
    """Sizes of the layers of each expert."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The blocks of a model and their sizes. Blocks that paid neither on a real log nor on simulated ones
    (docs/experiments.md) are off by default: the mixture of experts, the projection and the gate by surface."""

    embedding_dim: int = 16
    """Dimension D of an embedding row; tables fed by sequences all share it."""
    table_scale: float | None = 0.05
    """Tables start uniform in [-scale, scale); none given is 1 / sqrt(rows) of each table (DLRM, Naumov et al. 2019),
    so that what few ids share is there from the start and what many ids hold must be learned."""
    table_dims: dict[str, int] = field(default_factory=dict)
    """Dimensions of single tables (vocabularies) that are only pooled in bags."""
    ids: dict[str, IdMethod] = field(default_factory=dict)
    """How the ids of a vocabulary must find their rows: by a stored list (index), by plain hash, as they came (given).
    The log was ingested one way, and another word here is an error. managed, TorchRec's managed collision with
    eviction, is refused: see docs/operations.md."""
    history: HistoryConfig = HistoryConfig()
    projection: ProjectionConfig = ProjectionConfig(kind="none")
    cross_layers: int = 2
    """DCNv2 layers beside the deep part; 0 leaves them out."""
    cross_rank: int = 32
    """Rank of the DCNv2 layers."""
    deep: tuple[int, ...] = (128, 64)
    """Sizes of the deep part's layers."""
    surface_gate: bool = False
    """Gate the trunk's input by surface (EPNet)."""
    mixture: MixtureConfig = MixtureConfig(kind="none")
    towers: Literal["per_surface", "residual", "star", "shared"] = "per_surface"
    """A tower tree for each surface; one for all plus a correction for each; STAR's network; one for all."""
    tower_hidden: tuple[int, ...] = (32,)
    """Sizes of a tower's layers."""
    late_fusion: bool = True
    """Feed features that only one surface has to its tower alone, not to the trunk."""
    calibration: Literal["per_surface", "monotone", "global", "none"] = "per_surface"
    """Affine per surface and task; monotone pieces per surface and task; one affine for all; none."""
    dropout: float = 0.0
    """Dropout in the deep part and the towers."""
    embedding_dropout: float = 0.0
    """Dropout of pooled embeddings, not of the history's events."""

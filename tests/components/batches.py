"""Small random batches and models for the tests of `components`, and the plain form of a grouped batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from components.attention import CandidateAttention, MeanHistory, Reader, TargetAttention
from components.calibration import SurfaceCalibration
from components.cross import CrossProjection, DCNv2
from components.embeddings import EmbeddingLayer
from components.engagement_model import EngagementBody, EngagementModel
from components.features import CandidateVector, RequestVector, SurfaceEmbedding
from components.gating import EPNet
from components.history import EventEmbedding, HistoryBlock, HistoryEncoder
from components.inputs import ModelInputs
from components.late_fusion import LateFusion
from components.mlp import SplitMLP
from components.mmoe import MMoE
from components.numeric import NumericFeatures
from components.towers import Towers
from components.trunk import Trunk

SURFACES = ("hf", "sr", "rp")
TASKS = ("click", "save")
REQUEST_BAGS = ("user", "device", "query")
CANDIDATE_BAGS = ("ad", "match")
HISTORY_KEYS = ("history_item", "history_author")
REQUEST_SEQUENCES = ("pin",)
CANDIDATE_SEQUENCES = ("item", "author")
IDS, DIM, WIDTH = 20, 4, 8
# What only one surface fills; the others leave it empty.
ONLY_ON = {"query": "sr", "pin": "rp", "match": "sr"}


def jagged(values: Tensor, lengths: Tensor) -> list[Tensor]:
    """The rows of jagged values."""
    return list(torch.split(values, lengths.tolist()))


def keyed(rows: dict[str, list[Tensor]]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor of the rows of each key."""
    lengths = [len(row) for key in rows for row in rows[key]]
    values = [row for key in rows for row in rows[key]]
    return KeyedJaggedTensor(
        keys=list(rows),
        values=torch.cat(values) if values else torch.zeros(0, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def make_inputs(
    *,
    candidates: Sequence[Sequence[int]] = ((2, 1), (3,), (1, 4)),
    histories: Sequence[int] = (3, 0, 5, 1, 2),
    seed: int = 0,
    padding: int = 0,
    surfaces: Sequence[str] = SURFACES,
) -> ModelInputs:
    """A batch of one list of candidate counts a surface, and one history length a request.

    `padding` lengthens the history and candidate slots beyond what the rows need.
    """
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> Tensor:
        return torch.randint(0, IDS, (n,), generator=g)

    counts = [c for of_surface in candidates for c in of_surface]
    names = [s for s, of_surface in zip(surfaces, candidates, strict=True) for _ in of_surface]
    rows, total = len(counts), sum(counts)
    histories = list(histories)[:rows]
    events = sum(histories)

    def some(key: str, surface: str, least: int = 0) -> Tensor:
        if ONLY_ON.get(key, surface) != surface:
            return ids(0)
        return ids(max(least, int(torch.randint(0, 3, (1,), generator=g))))

    candidate_names = [s for s, c in zip(names, counts, strict=True) for _ in range(c)]
    sequences = {key: [ids(n) for n in histories] for key in HISTORY_KEYS}
    sequences |= {key: [some(key, s, 1)[:1] for s in names] for key in REQUEST_SEQUENCES}
    sequences |= {key: [ids(c) for c in counts] for key in CANDIDATE_SEQUENCES}

    def numbers(n: int, columns: int) -> Tensor:
        x = torch.randn(n, columns, generator=g)
        return torch.where(torch.rand(n, columns, generator=g) < 0.3, torch.nan, x)

    return ModelInputs(
        request_ids=keyed({key: [some(key, s) for s in names] for key in REQUEST_BAGS}),
        candidate_ids=keyed({key: [some(key, s) for s in candidate_names] for key in CANDIDATE_BAGS}),
        sequence_ids=keyed(sequences),
        history_action=torch.randint(0, 5, (events,), generator=g),
        history_surface=torch.randint(0, 4, (events,), generator=g),
        history_age=torch.rand(events, generator=g) * 1e6 + 1.0,
        history_numeric=numbers(events, 2),
        request_numeric=numbers(rows, 2),
        candidate_numeric=numbers(total, 3),
        candidate_counts=torch.tensor(counts, dtype=torch.int64),
        request_of_candidate=torch.repeat_interleave(torch.arange(rows), torch.tensor(counts, dtype=torch.int64)),
        history_slots=torch.arange(max(histories, default=0) + padding),
        candidate_slots=torch.arange(max(counts, default=0) + padding),
        surface_of_request=torch.tensor([surfaces.index(s) for s in names], dtype=torch.int64),
        requests_per_surface=[len(of_surface) for of_surface in candidates],
        candidates_per_surface=[sum(of_surface) for of_surface in candidates],
    )


def expand(inputs: ModelInputs) -> ModelInputs:
    """The same candidates, each as a request of its own: what a system without broadcasting would be fed."""
    owner = inputs.request_of_candidate.tolist()
    history_lengths = inputs.sequence_ids[HISTORY_KEYS[0]].lengths()

    def repeat(rows: list[Tensor]) -> list[Tensor]:
        return [rows[r] for r in owner]

    def repeat_keyed(kjt: KeyedJaggedTensor) -> dict[str, list[Tensor]]:
        return {key: repeat(jagged(kjt[key].values(), kjt[key].lengths())) for key in kjt.keys()}  # noqa: SIM118

    def repeat_events(values: Tensor) -> Tensor:
        return torch.cat([values[:0], *repeat(jagged(values, history_lengths))])

    sequences = repeat_keyed(inputs.sequence_ids)
    for key in CANDIDATE_SEQUENCES:
        sequences[key] = list(inputs.sequence_ids[key].values().unsqueeze(1))
    ones = torch.ones(len(owner), dtype=torch.int64)
    return ModelInputs(
        request_ids=keyed(repeat_keyed(inputs.request_ids)),
        candidate_ids=inputs.candidate_ids,
        sequence_ids=keyed(sequences),
        history_action=repeat_events(inputs.history_action),
        history_surface=repeat_events(inputs.history_surface),
        history_age=repeat_events(inputs.history_age),
        history_numeric=repeat_events(inputs.history_numeric),
        request_numeric=inputs.request_numeric[owner],
        candidate_numeric=inputs.candidate_numeric,
        candidate_counts=ones,
        request_of_candidate=torch.arange(len(owner)),
        history_slots=inputs.history_slots,
        candidate_slots=torch.arange(min(len(owner), 1)),
        surface_of_request=inputs.surface_of_request[owner],
        requests_per_surface=list(inputs.candidates_per_surface),
        candidates_per_surface=list(inputs.candidates_per_surface),
    )


def take_surface(inputs: ModelInputs, position: int, *, drop: Sequence[str] = ()) -> ModelInputs:
    """The rows of one surface as a batch of a one-surface model, without the keys `drop`."""
    first = sum(inputs.requests_per_surface[:position])
    requests = slice(first, first + inputs.requests_per_surface[position])
    start = sum(inputs.candidates_per_surface[:position])
    candidates = slice(start, start + inputs.candidates_per_surface[position])
    history_lengths = inputs.sequence_ids[HISTORY_KEYS[0]].lengths()

    def cut(kjt: KeyedJaggedTensor, rows: slice) -> KeyedJaggedTensor:
        keys = [key for key in kjt.keys() if key not in drop]  # noqa: SIM118
        return keyed({key: jagged(kjt[key].values(), kjt[key].lengths())[rows] for key in keys})

    def cut_events(values: Tensor) -> Tensor:
        return torch.cat([values[:0], *jagged(values, history_lengths)[requests]])

    return ModelInputs(
        request_ids=cut(inputs.request_ids, requests),
        candidate_ids=cut(inputs.candidate_ids, candidates),
        sequence_ids=cut(inputs.sequence_ids, requests),
        history_action=cut_events(inputs.history_action),
        history_surface=cut_events(inputs.history_surface),
        history_age=cut_events(inputs.history_age),
        history_numeric=cut_events(inputs.history_numeric),
        request_numeric=inputs.request_numeric[requests],
        candidate_numeric=inputs.candidate_numeric[candidates],
        candidate_counts=inputs.candidate_counts[requests],
        request_of_candidate=inputs.request_of_candidate[candidates] - first,
        history_slots=inputs.history_slots,
        candidate_slots=inputs.candidate_slots,
        surface_of_request=torch.zeros_like(inputs.surface_of_request[requests]),
        requests_per_surface=[inputs.requests_per_surface[position]],
        candidates_per_surface=[inputs.candidates_per_surface[position]],
    )


def make_embeddings(*, drop: Sequence[str] = ()) -> EmbeddingLayer:
    """Tables of every key; history, related pin and candidates share `item`, authors share `author`."""

    def bags(keys: Sequence[str]) -> EmbeddingBagCollection:
        return EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=key, num_embeddings=IDS, embedding_dim=DIM, feature_names=[key])
                for key in keys
                if key not in drop
            ]
        )

    shared = {"item": ["history_item", "pin", "item"], "author": ["history_author", "author"]}
    return EmbeddingLayer(
        request_bags=bags(REQUEST_BAGS),
        candidate_bags=bags(CANDIDATE_BAGS),
        sequences=EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=name, num_embeddings=IDS, embedding_dim=DIM, feature_names=[k for k in keys if k not in drop]
                )
                for name, keys in shared.items()
            ]
        ),
    )


def make_reader(kind: str, query_dim: int) -> Reader:
    """A reader of width-8 events: attention, few candidates (the same, projecting queries), target or mean."""
    if kind in ("attention", "few candidates"):
        return CandidateAttention(query_dim=query_dim, width=WIDTH, heads=2, few_candidates=kind != "attention")
    if kind == "target":
        return TargetAttention(query_dim=query_dim, width=WIDTH, hidden=(4,))
    return MeanHistory(width=WIDTH)


def make_body(
    surfaces: Sequence[str] = SURFACES, *, absent: Sequence[str] = (), reader: str = "attention", causal: bool = True
) -> EngagementBody:
    """A body with every block: gates, crossing, experts, late fusion of `query`, `pin` and `match`."""

    def widths(keys: Sequence[str], late: bool = False) -> dict[str, int]:
        return {key: DIM for key in keys if (key in ONLY_ON) is late}

    request = RequestVector(
        bags=widths(REQUEST_BAGS),
        numeric=NumericFeatures(mean=[0.1, 0.2], std=[1.0, 2.0]),
        surface=SurfaceEmbedding(surfaces=surfaces, dim=3),
        absent=[key for key in absent if key in widths(REQUEST_BAGS)],
    )
    candidate = CandidateVector(
        bags=widths(CANDIDATE_BAGS),
        sequences=widths(CANDIDATE_SEQUENCES),
        numeric=NumericFeatures(mean=[0.0] * 3, std=[1.0] * 3),
    )
    read = make_reader(reader, candidate.out_dim)
    history = HistoryBlock(
        events=EventEmbedding(
            sequences=widths(HISTORY_KEYS),
            width=WIDTH,
            actions=5,
            surfaces=4,
            numeric=NumericFeatures(mean=[0.0] * 2, std=[1.0] * 2),
        ),
        encoder=HistoryEncoder(width=WIDTH, layers=2, heads=2, max_length=16, causal=causal),
        reader=read,
        projection=CrossProjection(in_dim=read.out_dim, out_dim=6, layers=1, rank=4),
    )
    x, y = request.out_dim, candidate.out_dim + history.out_dim
    trunk = Trunk(
        cross=DCNv2(in_dim=x + y, layers=2, rank=4),
        deep=SplitMLP(request_dim=x, candidate_dim=y, hidden=[12, 8]),
        request_gate=EPNet(surfaces=surfaces, in_dim=x, hidden=5),
        candidate_gate=EPNet(surfaces=surfaces, in_dim=y, hidden=5),
    )
    late = {
        "sr": LateFusion(
            request=RequestVector(bags={"query": DIM}),
            candidate=CandidateVector(bags={"match": DIM}),
            candidate_dim=candidate.out_dim,
            width=5,
        ),
        "rp": LateFusion(
            request=RequestVector(sequences={"pin": DIM}), candidate=None, candidate_dim=candidate.out_dim, width=5
        ),
    }
    late = {s: block for s, block in late.items() if s in surfaces}
    mixture = MMoE(surfaces=surfaces, tasks=TASKS, in_dim=trunk.out_dim, hidden=[10, 7], experts=3)
    return EngagementBody(
        surfaces=surfaces,
        tasks=TASKS,
        request=request,
        candidate=candidate,
        history=history,
        trunk=trunk,
        mixture=mixture,
        late=late,
        towers=Towers(
            surfaces=surfaces,
            tasks=TASKS,
            in_dim=mixture.out_dim,
            hidden=[6],
            late_dims={s: b.out_dim for s, b in late.items()},
        ),
        calibration=SurfaceCalibration(surfaces=surfaces, tasks=TASKS),
    )


def make_model(surfaces: Sequence[str] = SURFACES, *, seed: int = 0, **body: object) -> EngagementModel:
    """A model with every block, its parameters drawn from `seed`; calibration is moved off the identity."""
    torch.manual_seed(seed)
    absent = body.get("absent", ())
    model = EngagementModel(
        embeddings=make_embeddings(drop=absent if isinstance(absent, (list, tuple)) else ()),
        body=make_body(surfaces, **body),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".log_scale" in name or ".calibration" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model

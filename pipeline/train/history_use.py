"""Which events of a history candidates look at: attention by the age of the event.

An event that is looked at like all others of its history has the share 1 / n of the attention that events get. Lift is
the attention that the events of an age get over what they would get so: 1 = age tells nothing, 2 = twice as much.

Shape letters: C candidates, L longest history, B ages, U users.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.attention import CandidateAttention, TargetAttention
from components.inputs import ModelInputs
from components.ragged import offsets_of, pad_rows, row_mask, split_surfaces
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.evaluate.bootstrap import Estimate, UserBootstrap, estimate
from pipeline.train.task import TrainTask

# Upper ends of ages in seconds, and what people call them; the last has none.
AGES = {"1 h": 3600.0, "6 h": 6 * 3600.0, "1 d": 86400.0, "2 d": 2 * 86400.0, "4 d": 4 * 86400.0, "7 d": 7 * 86400.0}
OLDER = "older"


@dataclass(frozen=True, kw_only=True)
class AgeUse:
    """Use of the events of one age.

    Args:
        events: share of a history's events that are of this age, mean over candidates that have a history.
        attention: share of the attention to events that they get.
        lift: attention over what equal attention to all events would give, with an interval over users.
    """

    events: float
    attention: float
    lift: Estimate


@dataclass(frozen=True, kw_only=True)
class HistoryUse:
    """How the candidates of a surface read histories.

    Args:
        ages: by age, youngest first.
        nothing: share of attention that goes to no event at all; candidates without a history left out.
        candidates: with a history.
    """

    ages: dict[str, AgeUse]
    nothing: Estimate
    candidates: int


def attention_by_age(task: TrainTask, batches: Iterable[Batch], *, resamples: int = 500) -> dict[str, HistoryUse]:
    """By surface, how its candidates in the batches read histories.

    Args:
        task: a model on one device, unsharded.
        batches: to read.
        resamples: of users behind each interval.

    Raises:
        ConfigError: the model's history block does not weigh events, or there is none.
    """
    history = task.model.body.history
    reader = None if history is None else history.reader
    if not isinstance(reader, CandidateAttention | TargetAttention) or not getattr(reader, "softmax", True):
        raise ConfigError(
            "the model gives its events no shares of attention; set model.history.kind to transformer, attention or "
            "target"
        )
    surfaces = task.model.body.surfaces
    sums: dict[str, list[np.ndarray]] = {s: [] for s in surfaces}
    users: dict[str, list[np.ndarray]] = {s: [] for s in surfaces}
    read: list[Tensor] = []

    def look(module: CandidateAttention | TargetAttention, args: tuple[Tensor, Tensor, Tensor, ModelInputs]) -> None:
        read.append(_by_age(module.weights(*args), args[2], args[3]))

    handle = reader.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            for batch in batches:
                read.clear()
                task.model(batch.inputs)
                counts = batch.inputs.candidates_per_surface
                owner = batch.user_id[batch.inputs.request_of_candidate]
                for parts, of in ((sums, read[0]), (users, owner)):
                    for surface, rows in zip(surfaces, split_surfaces(of, counts, len(surfaces)), strict=True):
                        parts[surface].append(rows.cpu().numpy())
    finally:
        handle.remove()
    return {
        s: _use(np.concatenate(sums[s]).astype(np.float64), np.concatenate(users[s]), resamples)
        for s in surfaces
        if sums[s]
    }


def _by_age(weights_CL: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
    """Of each candidate, [C, 3 B + 1]: attention, equal attention and share of events by age, and attention to nothing;
    all 0 without a history."""
    slots, owner = inputs.history_slots, inputs.request_of_candidate
    age_RL = pad_rows(inputs.history_age.float().unsqueeze(1), offsets_of(lengths_R), slots.shape[0]).squeeze(2)
    edges = torch.tensor(list(AGES.values()), device=age_RL.device)
    bucket_RL = torch.bucketize(age_RL, edges)
    here_RL = row_mask(lengths_R, slots)
    here_RLB = torch.nn.functional.one_hot(bucket_RL, len(AGES) + 1).float() * here_RL.unsqueeze(2)
    events_CB = (here_RLB.sum(1) / lengths_R.clamp(min=1).unsqueeze(1)).index_select(0, owner)
    attention_CB = torch.einsum("cl,clb->cb", weights_CL[:, 1:], here_RLB.index_select(0, owner))
    nothing_C = weights_CL[:, :1] * (lengths_R > 0).index_select(0, owner).unsqueeze(1)
    equal_CB = events_CB * attention_CB.sum(1, keepdim=True)
    return torch.cat([attention_CB, equal_CB, events_CB, nothing_C], dim=1)


def _use(rows: np.ndarray, user: np.ndarray, resamples: int) -> HistoryUse:
    names: Sequence[str] = [*AGES, OLDER]
    count = len(names)
    bootstrap = UserBootstrap(user, resamples=resamples)
    local = np.searchsorted(bootstrap.users, user)
    known = (rows[:, 2 * count : 3 * count].sum(1) > 0).astype(np.float64)
    columns = [*rows.T, known]
    sums_UK = np.stack([np.bincount(local, weights=c, minlength=bootstrap.users.size) for c in columns], axis=1)
    totals = np.concatenate([counts @ sums_UK for counts in bootstrap.counts(sums_UK.shape[1])])
    attention, equal, events = (totals[:, i * count : (i + 1) * count] for i in range(3))
    nothing, candidates = totals[:, -2], totals[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        lift, idle = attention / equal, nothing / candidates
        share, seen = attention[0] / attention[0].sum(), events[0] / candidates[0]
    empty = "no candidate with a history"
    return HistoryUse(
        ages={
            name: AgeUse(
                events=float(seen[i]),
                attention=float(share[i]),
                lift=estimate(lift[:, i], reason="" if equal[0, i] > 0 else "no event of this age"),
            )
            for i, name in enumerate(names)
        },
        nothing=estimate(idle, reason="" if candidates[0] else empty),
        candidates=int(candidates[0]),
    )

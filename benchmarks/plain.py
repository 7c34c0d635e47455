"""The plain form of a grouped batch: every candidate a request of its own, with the request's data repeated.

What a system without request-level broadcasting would be fed: same candidates in the same order, same labels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from components.inputs import ModelInputs
from pipeline.data.batch import Batch


def expanded(batch: Batch, *, candidate_keys: Collection[str], history_key: str) -> Batch:
    """A batch of C requests with one candidate each.

    Args:
        batch: R requests.
        candidate_keys: keys of `sequence_ids` whose values are the candidates' ids.
        history_key: key of `sequence_ids` whose values are the history's items.
    """
    owner_C = batch.inputs.request_of_candidate
    return replace(
        batch,
        inputs=expanded_inputs(batch.inputs, candidate_keys=candidate_keys, history_key=history_key),
        request_id=batch.request_id[owner_C],
        user_id=batch.user_id[owner_C],
        timestamp_ms=batch.timestamp_ms[owner_C],
    )


def expanded_inputs(inputs: ModelInputs, *, candidate_keys: Collection[str], history_key: str) -> ModelInputs:
    """Inputs of C requests with one candidate each; see `expanded`."""
    owner_C = inputs.request_of_candidate
    candidates = owner_C.shape[0]
    ones = torch.ones(candidates, dtype=torch.int64)
    sequences = {}
    for key, jagged in inputs.sequence_ids.to_dict().items():
        sequences[key] = (
            JaggedTensor(values=jagged.values(), lengths=ones) if key in candidate_keys else _repeated(jagged, owner_C)
        )
    events = _places(inputs.sequence_ids[history_key], owner_C)
    return replace(
        inputs,
        request_ids=_keyed({k: _repeated(j, owner_C) for k, j in inputs.request_ids.to_dict().items()}),
        sequence_ids=_keyed(sequences),
        history_action=inputs.history_action[events],
        history_surface=inputs.history_surface[events],
        history_age=inputs.history_age[events],
        history_numeric=inputs.history_numeric[events],
        request_numeric=inputs.request_numeric[owner_C],
        candidate_counts=ones,
        request_of_candidate=torch.arange(candidates),
        candidate_slots=torch.arange(1),
        surface_of_request=inputs.surface_of_request[owner_C],
        requests_per_surface=list(inputs.candidates_per_surface),
    )


def _places(jagged: JaggedTensor, owner_C: Tensor) -> Tensor:
    """Where the values of each owner's row stand, row after row."""
    lengths_C, starts_C = jagged.lengths()[owner_C], jagged.offsets()[:-1][owner_C]
    within = torch.arange(int(lengths_C.sum())) - torch.repeat_interleave(lengths_C.cumsum(0) - lengths_C, lengths_C)
    return torch.repeat_interleave(starts_C, lengths_C) + within


def _repeated(jagged: JaggedTensor, owner_C: Tensor) -> JaggedTensor:
    return JaggedTensor(values=jagged.values()[_places(jagged, owner_C)], lengths=jagged.lengths()[owner_C])


def _keyed(rows: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(rows),
        values=torch.cat([j.values() for j in rows.values()]),
        lengths=torch.cat([j.lengths() for j in rows.values()]),
    )

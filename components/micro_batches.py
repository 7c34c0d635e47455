"""A batch cut into runs of requests that go through the dense part one after another.

The rows of a run stay in the order of the batch, so they lie surface by surface as before, and the outputs of the
runs joined are the outputs of the batch. With activations recomputed in the backward pass (Chen et al., "Training
Deep Nets with Sublinear Memory Cost", 2016) only those of one run are ever held, while tables are looked up, and every
parameter learns, once for the whole batch: the same step as without it.

Shape letters: R requests, C candidates, H events, S surfaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from components.embeddings import Embedded
from components.inputs import ModelInputs
from components.names import check_at_least
from components.ragged import offsets_of


def micro_batches(
    embedded: Embedded, inputs: ModelInputs, *, parts: int, history_key: str | None
) -> list[tuple[Embedded, ModelInputs]]:
    """The batch in at most `parts` runs of about as many requests each. Waits once for the device.

    The ids of the inputs stay whole: they were looked up.

    Args:
        embedded: what the tables gave for the batch.
        inputs: the batch.
        parts: number of runs, at least 1.
        history_key: a key of the history in `embedded.sequences`, or None without a history.

    Raises:
        ValueError: parts is below 1.
    """
    check_at_least(1, parts=parts)
    requests = inputs.candidate_counts.shape[0]
    bounds = sorted({round(i * requests / parts) for i in range(parts + 1)})
    surfaces = _running(inputs.requests_per_surface)
    points = sorted({*bounds, *surfaces})
    sequences = embedded.sequences
    keys = [] if sequences is None else inputs.sequence_ids.keys()
    offsets = [offsets_of(inputs.candidate_counts)]
    offsets += [] if sequences is None else [sequences[key].offsets() for key in keys]
    place = torch.tensor(points, device=offsets[0].device)
    # A sync point on CUDA: the cuts must be known to the host.
    cuts = [dict(zip(points, row, strict=True)) for row in torch.stack([o[place] for o in offsets]).tolist()]
    of_candidate, of_key = cuts[0], dict(zip(keys, cuts[1:], strict=True))
    runs = []
    for first, last in pairwise(bounds):
        rows, candidates = slice(first, last), slice(of_candidate[first], of_candidate[last])
        history = slice(None) if history_key is None else slice(of_key[history_key][first], of_key[history_key][last])
        inside = [(max(first, a), min(last, b)) for a, b in pairwise(surfaces)]
        run = replace(
            inputs,
            history_action=inputs.history_action[history],
            history_surface=inputs.history_surface[history],
            history_age=inputs.history_age[history],
            history_numeric=inputs.history_numeric[history],
            request_numeric=inputs.request_numeric[rows],
            candidate_numeric=inputs.candidate_numeric[candidates],
            candidate_counts=inputs.candidate_counts[rows],
            request_of_candidate=inputs.request_of_candidate[candidates] - first,
            surface_of_request=inputs.surface_of_request[rows],
            requests_per_surface=[max(b - a, 0) for a, b in inside],
            candidates_per_surface=[of_candidate[b] - of_candidate[a] if b > a else 0 for a, b in inside],
        )
        looked_up = Embedded(
            request=_rows(embedded.request, rows),
            candidate=_rows(embedded.candidate, candidates),
            sequences=None
            if sequences is None
            else {k: _values(sequences[k], rows, slice(of_key[k][first], of_key[k][last])) for k in keys},
        )
        runs.append((looked_up, run))
    return runs


def _running(counts: Sequence[int]) -> list[int]:
    total = [0]
    for count in counts:
        total.append(total[-1] + count)
    return total


def _rows(keyed: KeyedTensor | None, rows: slice) -> KeyedTensor | None:
    if keyed is None:
        return None
    return KeyedTensor(keys=keyed.keys(), length_per_key=keyed.length_per_key(), values=keyed.values()[rows])


def _values(jagged: JaggedTensor, rows: slice, values: slice) -> JaggedTensor:
    return JaggedTensor(values=jagged.values()[values], lengths=jagged.lengths()[rows])

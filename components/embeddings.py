"""The embedding tables of a model, looked up at the level at which ids live.

Request ids are looked up at R rows, candidate ids at C rows; ids that meet across levels (history items, candidate
ids, the related pin) share the tables of one EmbeddingCollection. TorchRec shards the three collections; this
module only calls them, so that TorchRec's train pipeline can trace it: attributes of the inputs, calls, nothing else.

Example:
    >>> import torch
    >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    >>> user = EmbeddingBagConfig(name="user", num_embeddings=10, embedding_dim=4, feature_names=["user_id"])
    >>> layer = EmbeddingLayer(request_bags=EmbeddingBagCollection(tables=[user]))
    >>> [name for name, _ in layer.named_parameters()]
    ['request_bags.embedding_bags.user.weight']
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from components.inputs import ModelInputs


class Embedded(NamedTuple):
    """What the tables gave. Read it by key, never by position: sharding changes the order of keys.

    Fields:
        request: pooled request features, R rows; None without request bags.
        candidate: pooled candidate features, C rows; None without candidate bags.
        sequences: jagged embeddings by key, one row a request; None without sequences.
    """

    request: KeyedTensor | None
    candidate: KeyedTensor | None
    sequences: dict[str, JaggedTensor] | None


class EmbeddingLayer(nn.Module):
    """All sparse parameters of a model, and nothing else.

    Args:
        request_bags: reads `ModelInputs.request_ids`.
        candidate_bags: reads `ModelInputs.candidate_ids`.
        sequences: reads `ModelInputs.sequence_ids`.
    """

    def __init__(
        self,
        *,
        request_bags: EmbeddingBagCollection | None = None,
        candidate_bags: EmbeddingBagCollection | None = None,
        sequences: EmbeddingCollection | None = None,
    ) -> None:
        super().__init__()
        self.request_bags = request_bags
        self.candidate_bags = candidate_bags
        self.sequences = sequences

    def forward(self, inputs: ModelInputs) -> Embedded:
        return Embedded(
            request=None if self.request_bags is None else self.request_bags(inputs.request_ids),
            candidate=None if self.candidate_bags is None else self.candidate_bags(inputs.candidate_ids),
            sequences=None if self.sequences is None else self.sequences(inputs.sequence_ids),
        )

"""A user's history: events as vectors, an encoder over them, and the block that reads them for candidates.

Papers: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Xiong et al., "On Layer Normalization in the
Transformer Architecture", ICML 2020 (pre-norm). Formula of an event e and of an encoder layer:

    x_e = W [id embeddings; numbers]_e + action[a_e] + surface[s_e] + age[bucket(log(1 + seconds_e))]
    x   = x + Attention(LayerNorm(x));  x = x + FeedForward(LayerNorm(x))

Events are oldest first, so padding lies behind them. Positions count from the newest event, so that truncation of
old events shifts nothing. All of it is computed once per request, never once per candidate, and all dense layers on
the H events that there are: only attention itself sees rows padded to the longest history.

Shape letters: R requests, C candidates, H events (sum over requests), L longest history, D width, Q query width.

Example:
    >>> import torch
    >>> encoder = HistoryEncoder(width=8, layers=1, heads=2, max_length=16)
    >>> encoder(torch.ones(7, 8), torch.tensor([5, 0, 2]), torch.arange(5)).shape
    torch.Size([7, 8])
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from components.attention import Reader
from components.cross import CrossProjection, LinearProjection
from components.inputs import ModelInputs
from components.mlp import check_dropout, concat
from components.names import check_at_least
from components.numeric import NumericFeatures
from components.ragged import JaggedRows, one_hot, pad_rows, row_mask

MAX_AGE_SECONDS = 2 * 365 * 24 * 3600.0


class EventEmbedding(nn.Module):
    """One vector an event, [H, D].

    Args:
        sequences: width of each history key of the shared tables (item, author, ...), at least one.
        width: D.
        actions: number of action codes.
        surfaces: number of surface codes, the unknown one included.
        age_buckets: number of buckets of the logarithm of age; the last holds two years and more.
        numeric: encoder of the events' numeric columns, or None to leave them out.

    Raises:
        ValueError: no sequence, or a size below 1.
    """

    def __init__(
        self,
        *,
        sequences: Mapping[str, int],
        width: int,
        actions: int,
        surfaces: int,
        age_buckets: int = 32,
        numeric: NumericFeatures | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, actions=actions, surfaces=surfaces, age_buckets=age_buckets, **sequences)
        if not sequences:
            raise ValueError("sequences is empty; a history needs at least 1 key of ids")
        self.keys = tuple(sequences)
        self.numeric = numeric if numeric is not None and numeric.out_dim else None
        in_dim = sum(sequences.values()) + (self.numeric.out_dim if self.numeric is not None else 0)
        self.project = nn.Linear(in_dim, width)
        self.action = nn.Embedding(actions, width)
        self.surface = nn.Embedding(surfaces, width)
        self.age = nn.Embedding(age_buckets, width)
        for table in (self.action, self.surface, self.age):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.out_dim = width

    def age_bucket(self, age_H: Tensor) -> Tensor:
        """Bucket of an age in seconds; equal steps of log(1 + age), future and zero ages in the first."""
        last = self.age.num_embeddings - 1
        share = torch.log1p(age_H.clamp(min=0.0)) / math.log1p(MAX_AGE_SECONDS)
        return (share * last).long().clamp(0, last)

    def forward(self, sequences: Mapping[str, JaggedTensor], inputs: ModelInputs) -> Tensor:
        """Events [H, D], request by request."""
        parts = [sequences[key].values() for key in self.keys]
        if self.numeric is not None:
            parts.append(self.numeric(inputs.history_numeric))
        # Tables of a few rows are further columns of the projection: one product in place of three look-ups, whose
        # backward pass adds up thousands of events in a handful of rows, one at a time.
        codes = (inputs.history_action, inputs.history_surface, self.age_bucket(inputs.history_age))
        weights = [self.project.weight]
        for table, codes_H in zip((self.action, self.surface, self.age), codes, strict=True):
            parts.append(one_hot(codes_H, table.num_embeddings, dtype=parts[0].dtype))
            weights.append(table.weight.t())
        return F.linear(concat(parts), torch.cat(weights, dim=1), self.project.bias)


class FeedForward(nn.Sequential):
    """[*, D] to [*, D] through a hidden layer of 4 D.

    Args:
        width: D.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, [H, D] to [H, D].

    Args:
        width: D, a multiple of `heads`.
        heads: attention heads.
        causal: an event sees itself and older ones only.
        dropout: probability in [0, 1), on both residual branches.
    """

    def __init__(self, *, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = FeedForward(width=width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_HD: Tensor, rows: JaggedRows, visible: Tensor | None) -> Tensor:
        """`rows` says whose events these are; `visible`, bool [R, 1, 1, L], which keys any query may see (unused
        when causal)."""
        x_HD = x_HD + self.dropout(self._attend(self.norm_attention(x_HD), rows, visible))
        return x_HD + self.dropout(self.feed(self.norm_feed(x_HD)))

    def _attend(self, x_HD: Tensor, rows: JaggedRows, visible: Tensor | None) -> Tensor:
        qkv_RLA = rows.pad(self.qkv(x_HD))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv_RLA.chunk(3, dim=-1))
        # Causal needs no mask: padding lies behind the events, where no event looks.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=self.causal)
        return self.out(rows.unpad(attended.transpose(1, 2).flatten(2)))


class HistoryEncoder(nn.Module):
    """Transformer over the events of every request, [H, D] to [H, D].

    Args:
        width: D, a multiple of `heads`.
        layers: number of layers, at least 1.
        heads: attention heads.
        max_length: number of learned positions, counted from the newest event; older events share the last.
        causal: whether an event sees itself and older ones only, or all events.
        dropout: probability in [0, 1).

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int = 2,
        heads: int = 4,
        max_length: int = 1024,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, width=width, layers=layers, heads=heads, max_length=max_length)
        check_dropout(dropout)
        if width % heads:
            raise ValueError(f"width is {width} and heads is {heads}; the width must be a multiple of the heads")
        self.causal = causal
        self.position = nn.Embedding(max_length, width)
        nn.init.normal_(self.position.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            EncoderLayer(width=width, heads=heads, causal=causal, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out_dim = width

    def forward(self, events_HD: Tensor, lengths_R: Tensor, slots_L: Tensor) -> Tensor:
        """[H, D] to [H, D]; `lengths_R` events of each request, adding up to H, `slots_L` int64 0..L-1."""
        rows = JaggedRows(lengths_R, values=events_HD.shape[0], slots=slots_L.shape[0])
        from_newest_H = rows.from_last().clamp(max=self.position.num_embeddings - 1)
        x_HD = events_HD + self.position(from_newest_H)
        # An empty history sees its first padding slot: a softmax over nothing would be NaN.
        visible = None if self.causal else row_mask(lengths_R.clamp(min=1), slots_L)[:, None, None, :]
        for layer in self.layers:
            x_HD = layer(x_HD, rows, visible)
        return self.norm(x_HD)


class HistoryBlock(nn.Module):
    """Events, then an optional encoder, then one of the readers of `components.attention`: [C, out_dim].

    Transformer: `HistoryEncoder` and `CandidateAttention`. Its simpler rivals: no encoder and `TargetAttention`
    or `CandidateAttention`; no encoder and `MeanHistory`.

    Args:
        events: embeds the events.
        encoder: [H, D] to [H, D], or None to read the bare events.
        reader: reads the history for each candidate.
        projection: [C, reader width] to [C, P], or None to leave the width.
    """

    def __init__(
        self,
        *,
        events: EventEmbedding,
        encoder: HistoryEncoder | None,
        reader: Reader,
        projection: CrossProjection | LinearProjection | None = None,
    ) -> None:
        super().__init__()
        self.events, self.encoder, self.reader, self.projection = events, encoder, reader, projection
        self.out_dim = reader.out_dim if projection is None else projection.out_dim

    @property
    def keys(self) -> tuple[str, ...]:
        """The sequences that it reads, the items' first."""
        return self.events.keys

    def forward(self, query_CQ: Tensor, sequences: Mapping[str, JaggedTensor], inputs: ModelInputs) -> Tensor:
        """[C, out_dim]."""
        events_HD = self.events(sequences, inputs)
        of_history = sequences[self.events.keys[0]]
        lengths_R = of_history.lengths()
        if self.encoder is not None:
            events_HD = self.encoder(events_HD, lengths_R, inputs.history_slots)
        events_RLD = pad_rows(events_HD, of_history.offsets(), inputs.history_slots.shape[0])
        read = self.reader(query_CQ, events_RLD, lengths_R, inputs)
        return read if self.projection is None else self.projection(read)

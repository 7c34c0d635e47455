"""How candidates read a history: by attention, by DIN's activation unit, or not at all (its mean).

Papers: Vaswani et al., NeurIPS 2017 (`CandidateAttention`, multi-head, candidates as queries);
Zhou et al., "Deep Interest Network", KDD 2018 (`TargetAttention`). Formulas, for query q and events x_1..x_n:

    CandidateAttention  a = sum_l softmax_l([0, q_h . K_h x_l / sqrt(d)]) V_h x_l, heads joined
    TargetAttention     a = sum_l w_l x_l,  w = softmax or plain unit(q, x_l, q - x_l, q * x_l)
    MeanHistory         a = (x_1 + ... + x_n) / n

The leading 0 is an empty slot with value 0: a candidate may attend to nothing, and an empty history gives exactly
0, never NaN. Keys and values are computed once per request; candidates are padded to [R, M] only as queries.

Shape letters: R requests, C candidates, M most candidates of one request, L longest history, D width of events,
Q query width, A = heads * head width.
All readers: (query [C, Q], events [R, L, D], lengths [R], inputs) to [C, out_dim].

Example:
    >>> CandidateAttention(query_dim=6, width=8, heads=2, head_dim=4).out_dim
    24
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.inputs import ModelInputs
from components.mlp import MLP, activation_layer
from components.names import check_at_least
from components.ragged import offsets_of, pad_rows, row_mask, unpad_rows


def mean_events(events_RLD: Tensor, lengths_R: Tensor) -> Tensor:
    """Mean over each row's events, [R, D]; 0 for an empty history. Padding must be 0."""
    return events_RLD.sum(1) / lengths_R.clamp(min=1).unsqueeze(1)


class CandidateAttention(nn.Module):
    """Multi-head attention of candidates over a history, [C, out_dim].

    The output joins the attended vector [A], its product with the query's projection [A] (the match itself, which a
    dense layer could only learn slowly) and the mean of the history [D] (what the user likes whatever the candidate).

    With `few_candidates` the queries are projected into the space of events and the weighted events out of it
    (q . K x = K' q . x and sum w V x = V sum w x): the same sums in another order, at 2 M Q' D + 2 M L D a head for
    2 L D Q' + 2 M L Q' operations, Q' the head's width. It pays while a request has fewer candidates than that.

    Args:
        query_dim: Q.
        width: D.
        heads: attention heads.
        head_dim: width of a head; None for D / heads.
        few_candidates: project queries, not events.
        with_product: append the product.
        with_mean: append the mean.

    Raises:
        ValueError: a size below 1, or no head_dim and a width that the heads do not divide.
    """

    def __init__(
        self,
        *,
        query_dim: int,
        width: int,
        heads: int = 4,
        head_dim: int | None = None,
        few_candidates: bool = False,
        with_product: bool = True,
        with_mean: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(1, query_dim=query_dim, width=width, heads=heads)
        if head_dim is None:
            if width % heads:
                raise ValueError(f"width is {width} and heads is {heads}; give head_dim, or a multiple of the heads")
            head_dim = width // heads
        check_at_least(1, head_dim=head_dim)
        inner = heads * head_dim
        self.heads, self.few_candidates = heads, few_candidates
        self.with_product, self.with_mean = with_product, with_mean
        self.query = nn.Linear(query_dim, inner)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out_dim = inner * (2 if with_product else 1) + (width if with_mean else 0)

    def forward(self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        query_CA = self.query(query_CQ)
        attended_CA = self._attend(query_CA, events_RLD, lengths_R, inputs)
        parts = [attended_CA]
        if self.with_product:
            parts.append(query_CA * attended_CA)
        if self.with_mean:
            parts.append(mean_events(events_RLD, lengths_R).index_select(0, inputs.request_of_candidate))
        return torch.cat(parts, dim=1)

    def weights(self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        """Share of its attention that each candidate gives the empty slot and each event, mean over heads, [C, 1 + L].

        For study: it holds the [R, heads, M, 1 + L] weights that `forward` never has.
        """
        q, k, _, visible, offsets = self._heads(self.query(query_CQ), events_RLD, lengths_R, inputs)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights_RML = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).mean(1)
        return unpad_rows(weights_RML, offsets, inputs.request_of_candidate)

    def _attend(self, query_CA: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        if self.few_candidates:
            return self._attend_by_query(query_CA, events_RLD, lengths_R, inputs)
        q, k, v, visible, offsets = self._heads(query_CA, events_RLD, lengths_R, inputs)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        return unpad_rows(attended, offsets, inputs.request_of_candidate)

    def _attend_by_query(self, query_CA: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        """As `_attend`: h stands for heads, d for the width of one, N for M x h."""
        key_hdD, value_hdD = (w.unflatten(0, (self.heads, -1)) for w in self.key_value.weight.chunk(2))
        query_Chd = query_CA.unflatten(1, (self.heads, -1))
        query_ChD = torch.einsum("chd,hdD->chD", query_Chd, key_hdD) * query_Chd.shape[-1] ** -0.5
        offsets = offsets_of(inputs.candidate_counts)
        slots = inputs.candidate_slots.shape[0]
        query_RND = pad_rows(query_ChD.flatten(1), offsets, slots).unflatten(2, (self.heads, -1)).flatten(1, 2)
        scores_RNL = query_RND @ events_RLD.transpose(1, 2)
        visible_R1L = row_mask(lengths_R, inputs.history_slots).unsqueeze(1)
        # The empty slot's score is 0, and so is what it gives.
        scores_RNL = F.pad(scores_RNL.masked_fill(~visible_R1L, -torch.inf), (1, 0))
        read_RND = torch.softmax(scores_RNL, dim=-1)[..., 1:] @ events_RLD
        read_RMhD = read_RND.unflatten(1, (-1, self.heads))
        read_ChD = unpad_rows(read_RMhD.flatten(2), offsets, inputs.request_of_candidate).unflatten(1, (self.heads, -1))
        return torch.einsum("chD,hdD->chd", read_ChD, value_hdD).flatten(1)

    def _heads(
        self, query_CA: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries [R, heads, M, A / heads], keys and values [R, heads, 1 + L, A / heads], which keys may be seen,
        and offsets of the candidates."""
        offsets = offsets_of(inputs.candidate_counts)
        query_RMA = pad_rows(query_CA, offsets, inputs.candidate_slots.shape[0])
        # The empty slot stands first; key and value have no bias, so that it projects to 0.
        with_empty = F.pad(events_RLD, (0, 0, 1, 0))
        slots = inputs.history_slots
        visible = F.pad(row_mask(lengths_R, slots), (1, 0), value=True)[:, None, None, :]
        keys_values = self.key_value(with_empty).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query_RMA, *keys_values))
        return q, k, v, visible, offsets


class TargetAttention(nn.Module):
    """DIN: a small network weighs every event for every candidate, [C, D].

    The unit's first layer on [q; x; q - x; q * x] is split exactly into a part of q, a part of x and one product, so
    that no [R, M, L, D] tensor ever exists; the largest is [R, M, L, hidden].

    Args:
        query_dim: Q; the query is first projected to D.
        width: D.
        hidden: widths of the unit's hidden layers, at least one.
        activation: after each of them, one of `components.mlp.ACTIVATIONS`.
        softmax: weights sum to 1; else they are used as they come, as in the paper.

    Raises:
        ValueError: a size below 1, no hidden layer, or an unknown activation.
    """

    def __init__(
        self,
        *,
        query_dim: int,
        width: int,
        hidden: Sequence[int] = (16,),
        activation: str = "relu",
        softmax: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(1, query_dim=query_dim, width=width, **{f"hidden[{i}]": n for i, n in enumerate(hidden)})
        if not hidden:
            raise ValueError("hidden is empty; the unit needs at least 1 hidden layer")
        self.softmax = softmax
        self.query = nn.Linear(query_dim, width)
        self.unit_in = nn.Linear(4 * width, hidden[0])
        self.activation = activation_layer(activation)
        self.unit_deep = MLP(in_dim=hidden[0], hidden=hidden[1:], activation=activation)
        self.unit_out = nn.Linear(hidden[-1], 1)
        self.out_dim = width

    def forward(self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        weights_RML, offsets = self._weigh(query_CQ, events_RLD, lengths_R, inputs)
        return unpad_rows(weights_RML @ events_RLD, offsets, inputs.request_of_candidate)

    def weights(self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        """Weight of each event for each candidate, [C, 1 + L]; this reader has no empty slot, so the first is 0."""
        weights_RML, offsets = self._weigh(query_CQ, events_RLD, lengths_R, inputs)
        return F.pad(unpad_rows(weights_RML, offsets, inputs.request_of_candidate), (1, 0))

    def _weigh(
        self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor]:
        """Weights [R, M, L], 0 where there is no event, and offsets of the candidates."""
        offsets = offsets_of(inputs.candidate_counts)
        query_RMD = pad_rows(self.query(query_CQ), offsets, inputs.candidate_slots.shape[0])
        scores_RML = self._scores(query_RMD, events_RLD)
        visible_RML = row_mask(lengths_R, inputs.history_slots).unsqueeze(1)
        if self.softmax:
            # Not -inf: a row without events would be NaN. Its weights are masked to 0 below instead.
            floor = torch.finfo(scores_RML.dtype).min
            scores_RML = torch.softmax(scores_RML.masked_fill(~visible_RML, floor), dim=-1)
        return scores_RML * visible_RML, offsets

    def _scores(self, query_RMD: Tensor, events_RLD: Tensor) -> Tensor:
        of_query, of_event, of_difference, of_product = self.unit_in.weight.chunk(4, dim=1)
        query_RMh = F.linear(query_RMD, of_query + of_difference, self.unit_in.bias)
        event_RLh = F.linear(events_RLD, of_event - of_difference)
        product_RMhL = (query_RMD.unsqueeze(2) * of_product) @ events_RLD.transpose(1, 2).unsqueeze(1)
        hidden = query_RMh.unsqueeze(2) + event_RLh.unsqueeze(1) + product_RMhL.transpose(2, 3)
        return self.unit_out(self.unit_deep(self.activation(hidden))).squeeze(-1)


class MeanHistory(nn.Module):
    """The mean of the history, the same for all candidates of a request, [C, D].

    Args:
        width: D.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        check_at_least(1, width=width)
        self.out_dim = width

    def forward(self, query_CQ: Tensor, events_RLD: Tensor, lengths_R: Tensor, inputs: ModelInputs) -> Tensor:
        return mean_events(events_RLD, lengths_R).index_select(0, inputs.request_of_candidate)


Reader = CandidateAttention | TargetAttention | MeanHistory

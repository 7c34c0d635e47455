"""Dense layers: a plain perceptron, and one whose request part is computed once per request.

Formula of `SplitLinear`, exact and not an approximation, for candidate c of request r(c):

    W [x_r(c); y_c] + b  =  (W_r x_r + b)[r(c)] + W_c y_c

The left product costs C rows of width X + Y, the right one R rows of X and C rows of Y.

Shape letters: R requests, C candidates, X request width, Y candidate width, D output width.

Example:
    >>> import torch
    >>> layer = SplitLinear(request_dim=3, candidate_dim=2, out_dim=4)
    >>> layer(torch.ones(2, 3), torch.ones(5, 2), torch.tensor([0, 0, 0, 1, 1])).shape
    torch.Size([5, 4])
    >>> MLP(in_dim=3, hidden=[8, 2])(torch.ones(5, 3)).shape
    torch.Size([5, 2])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.names import check_at_least

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def activation_layer(name: str) -> nn.Module:
    """A fresh activation. Raises ValueError for a name that is not one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class MLP(nn.Module):
    """Linear, optional layer norm, activation, dropout for each hidden size; input [*, X], output [*, out_dim].

    Args:
        in_dim: X.
        hidden: widths of the layers; none makes it the identity.
        activation: one of `ACTIVATIONS`.
        dropout: probability in [0, 1).
        layer_norm: normalise before the activation.

    Raises:
        ValueError: a width below 1, a dropout outside [0, 1) or an unknown activation.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        hidden: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, in_dim=in_dim, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        check_dropout(dropout)
        layers: list[nn.Module] = []
        width = in_dim
        for out in hidden:
            layers.append(nn.Linear(width, out))
            layers += _after_linear(out, activation, dropout, layer_norm)
            width = out
        self.layers = nn.Sequential(*layers)
        self.out_dim = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def check_dropout(dropout: float) -> None:
    """Raise ValueError for a probability outside [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")


def _after_linear(width: int, activation: str, dropout: float, layer_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.LayerNorm(width)] if layer_norm else []
    layers.append(activation_layer(activation))
    if dropout:
        layers.append(nn.Dropout(dropout))
    return layers


class SplitLinear(nn.Module):
    """A dense layer on [request; candidate] whose request product is computed at R rows.

    Args:
        request_dim: X.
        candidate_dim: Y.
        out_dim: D.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, *, request_dim: int, candidate_dim: int, out_dim: int) -> None:
        super().__init__()
        check_at_least(1, request_dim=request_dim, candidate_dim=candidate_dim, out_dim=out_dim)
        self.request = nn.Linear(request_dim, out_dim)
        self.candidate = nn.Linear(candidate_dim, out_dim, bias=False)
        self.out_dim = out_dim
        # The two halves start as one layer of their joint width would.
        bound = (request_dim + candidate_dim) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, request_RX: Tensor, candidate_CY: Tensor, request_of_candidate: Tensor) -> Tensor:
        """[C, D]; `request_of_candidate` is int64 [C]."""
        return self.request(request_RX).index_select(0, request_of_candidate) + self.candidate(candidate_CY)


class SplitMLP(nn.Module):
    """An MLP on [request; candidate] whose first layer is a `SplitLinear`; output [C, out_dim].

    Args:
        request_dim: X.
        candidate_dim: Y.
        hidden: widths of the layers, at least one.
        activation: one of `ACTIVATIONS`.
        dropout: probability in [0, 1).
        layer_norm: normalise before each activation.

    Raises:
        ValueError: no layer, a width below 1, a dropout outside [0, 1) or an unknown activation.
    """

    def __init__(
        self,
        *,
        request_dim: int,
        candidate_dim: int,
        hidden: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden is empty; a SplitMLP needs at least 1 layer")
        check_dropout(dropout)
        self.first = SplitLinear(request_dim=request_dim, candidate_dim=candidate_dim, out_dim=hidden[0])
        self.after_first = nn.Sequential(*_after_linear(hidden[0], activation, dropout, layer_norm))
        self.rest = MLP(
            in_dim=hidden[0], hidden=hidden[1:], activation=activation, dropout=dropout, layer_norm=layer_norm
        )
        self.out_dim = self.rest.out_dim

    def forward(self, request_RX: Tensor, candidate_CY: Tensor, request_of_candidate: Tensor) -> Tensor:
        """[C, out_dim]; `request_of_candidate` is int64 [C]."""
        return self.rest(self.after_first(self.first(request_RX, candidate_CY, request_of_candidate)))


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Join along the last dimension; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)

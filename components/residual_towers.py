"""One tower for all surfaces, and for each surface a tower of its own that only corrects it.

The additive half of adapting a shared network to a domain (compare Rebuffi et al., "Learning multiple visual domains
with residual adapters", NeurIPS 2017). Formula for a row x of surface s:

    logit_t = shared_t(x) + own_s,t([x; z])

The heads of the own towers start at 0: every surface starts as the merged baseline, rows of all surfaces train the
shared tower, and a surface departs from it as far as its own rows pay for.

Shape letters: C candidates, T tasks, X input width, Z late width. Input [C, T or 1, X], output [C, T].

Example:
    >>> import torch
    >>> towers = ResidualTowers(surfaces=["hf", "sr"], tasks=["click"], in_dim=4, hidden=[8])
    >>> x = torch.randn(5, 1, 4)
    >>> bool((towers(x, [2, 3]) == towers.shared(x, [2, 3])).all())
    True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from components.towers import SharedTower, Towers, TowerTree


class ResidualTowers(nn.Module):
    """Shared tower plus own towers, [C, T or 1, X] to [C, T].

    Args:
        surfaces: names, in the order of rows.
        tasks: names, in the order of the output.
        in_dim: X.
        hidden: widths of every tower's trunk.
        late_dims: Z of the surfaces that have modules of their own.
        dropout: probability in [0, 1).

    Raises:
        ValueError: no or repeated names, a late surface that is not among `surfaces`, a size below its least.
    """

    def __init__(
        self,
        *,
        surfaces: Sequence[str],
        tasks: Sequence[str],
        in_dim: int,
        hidden: Sequence[int],
        late_dims: Mapping[str, int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shared = SharedTower(tasks=tasks, in_dim=in_dim, hidden=hidden, dropout=dropout)
        self.own = Towers(
            surfaces=surfaces, tasks=tasks, in_dim=in_dim, hidden=hidden, late_dims=late_dims, dropout=dropout
        )
        for tree in self.own.trees.values():
            assert isinstance(tree, TowerTree)
            for head in tree.heads.values():
                assert isinstance(head, nn.Linear)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        self.surfaces, self.tasks, self.late_dims = self.own.surfaces, self.own.tasks, self.own.late_dims

    def forward(
        self, x: Tensor, candidates_per_surface: Sequence[int], late: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[C, T]. `late` holds [C_s, Z_s] of each surface that was built with one."""
        return self.shared(x, candidates_per_surface) + self.own(x, candidates_per_surface, late)

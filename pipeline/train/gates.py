"""Who uses which expert of an MMoE: its gates, read while batches pass.

Shape letters: C candidates, X input width, T tasks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.mmoe import GateLoad, MMoE, gate_load
from components.ragged import split_surfaces


class GateWatch:
    """How rows used the experts of an MMoE, by surface, over the batches that pass while `watching` is true.

    Args:
        mixture: whose gates to watch, until `close`.
    """

    def __init__(self, mixture: MMoE) -> None:
        self.mixture = mixture
        self.watching = False
        self._gates: dict[str, list[Tensor]] = {}
        self._handle = mixture.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, arguments: tuple[Tensor, Sequence[int]]) -> None:
        if not self.watching:
            return
        rows_CX, counts = arguments
        with torch.no_grad():
            gates_CTE = self.mixture.gate_weights(rows_CX.detach(), counts).float()
        pieces = split_surfaces(gates_CTE, counts, len(self.mixture.surfaces))
        for surface, rows in zip(self.mixture.surfaces, pieces, strict=True):
            if rows.shape[0]:
                self._gates.setdefault(surface, []).append(rows)

    def take(self) -> dict[str, GateLoad]:
        """Loads by surface of what was seen since the last taking; surfaces without a row are left out."""
        gates, self._gates = self._gates, {}
        return {surface: gate_load(torch.cat(rows)) for surface, rows in gates.items()}

    def metrics(self) -> dict[str, float]:
        """What `take` gives as metrics: by surface and task, each expert's share and the entropy."""
        found: dict[str, float] = {}
        for surface, load in self.take().items():
            shares, entropy = load.utilisation.cpu(), load.entropy.cpu()
            for t, task in enumerate(self.mixture.tasks):
                name = f"train/gates/{surface}/{task}"
                found |= {f"{name}/expert_{e}": float(v) for e, v in enumerate(shares[t])}
                found[f"{name}/entropy"] = float(entropy[t])
        return found

    def close(self) -> None:
        """Look no more."""
        self._handle.remove()

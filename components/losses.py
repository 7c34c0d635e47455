"""The loss of several binary tasks of which a row may have observed some.

Formula for task t, over the rows with an observed label (mask m), of weight w and surface weight v:

    loss_t = task_weight_t * sum_c m_ct w_c v_s(c) BCE(z_ct, y_ct) / normalizer_t

The normalizer is given and not counted here, so that a distributed run can divide by the mean over ranks and get the
loss of one process. With the total weight of the observed labels it is the weighted mean.

Shape letters: C candidates, T tasks, S surfaces.

Example:
    >>> import torch
    >>> loss = MultiTaskLoss(tasks=["click", "save"], task_weights=[1.0, 0.5])
    >>> z, y, m = torch.zeros(4, 2), torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bool)
    >>> [round(v, 4) for v in loss(z, y, m, torch.ones(4), torch.tensor([4.0, 4.0]), [4]).tolist()]
    [0.6931, 0.3466]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.names import check_at_least, check_names
from components.ragged import split_surfaces


def masked_bce(
    logits_CT: Tensor, labels_CT: Tensor, mask_CT: Tensor, weights_C: Tensor, normalizer_T: Tensor
) -> Tensor:
    """Weighted binary cross-entropy over observed labels, by task: float32 [T].

    What stands in unobserved labels, NaN included, has no influence. A task without observed label gives 0, also
    where its normalizer is 0. Computed in float32 whatever the logits are.
    """
    labels = torch.where(mask_CT, labels_CT, 0.0)
    loss_CT = F.binary_cross_entropy_with_logits(logits_CT.float(), labels.float(), reduction="none")
    total_T = (loss_CT * weights_C.unsqueeze(1) * mask_CT).sum(0)
    return total_T / torch.where(normalizer_T > 0, normalizer_T, 1.0)


class MultiTaskLoss(nn.Module):
    """Losses by task, [T]; their sum is what is minimised.

    Args:
        tasks: names, in the order of columns.
        task_weights: T weights, none negative; None for 1 each.
        surface_weights: S weights, none negative, in the order of rows; None for 1 each.

    Raises:
        ValueError: no or repeated tasks, weights of another number than the tasks, a negative weight.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        task_weights: Sequence[float] | None = None,
        surface_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = check_names("tasks", tasks)
        weights = list(task_weights) if task_weights is not None else [1.0] * len(self.tasks)
        if len(weights) != len(self.tasks):
            raise ValueError(f"got {len(weights)} task weights for {len(self.tasks)} tasks")
        self.surface_weights = None if surface_weights is None else tuple(surface_weights)
        check_at_least(0, **{f"weight of task {t}": w for t, w in zip(self.tasks, weights, strict=True)})
        check_at_least(0, **{f"surface_weights[{s}]": w for s, w in enumerate(self.surface_weights or ())})
        self.register_buffer("task_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    task_weights: Tensor

    def forward(
        self,
        logits_CT: Tensor,
        labels_CT: Tensor,
        mask_CT: Tensor,
        weights_C: Tensor,
        normalizer_T: Tensor,
        candidates_per_surface: Sequence[int],
    ) -> Tensor:
        """Float32 [T]. Labels in [0, 1], mask bool, weights [C], normalizer [T], rows surface by surface."""
        if self.surface_weights is not None:
            pieces = split_surfaces(weights_C, candidates_per_surface, len(self.surface_weights))
            weights_C = torch.cat([w * v for w, v in zip(pieces, self.surface_weights, strict=True)])
        return self.task_weights * masked_bce(logits_CT, labels_CT, mask_CT, weights_C, normalizer_T)

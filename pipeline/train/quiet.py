"""What our dependencies say that no user of ours can act on, each silenced by name with the reason."""

from __future__ import annotations

import logging
import warnings

# Loggers that speak of TorchRec's own internals at every start.
_LOGGERS = (
    "torchrec",  # planner hints and events for Meta's own infrastructure
    "torch.fx._symbolic_trace",  # a note to library authors, printed at import
    "torch.distributed.elastic",  # redirect notes
    "mlflow.pyfunc",  # says that it validates the input example
)
# (category, pattern of the message)
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # TorchRec 1.8 wraps DDP with an argument that torch 2.13 renamed.
    (FutureWarning, "`broadcast_buffers` is deprecated"),
    # TorchRec 1.8 state dicts are ShardedTensors.
    (FutureWarning, "Please use DTensor instead"),
    # torch.distributed.checkpoint warns of its own call when it plans ShardedTensors.
    (FutureWarning, ".*_all_gather_base.*|.*_reduce_scatter_base.*"),
    # Saving and loading without a process group is what we ask for.
    (UserWarning, "torch.distributed is (disabled, unavailable|unavailable|disabled)"),
    (UserWarning, ".*no_dist.*"),
    # torch.compile asks every tensor that enters the dense part for a gradient, tables' rows too.
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf"),
    # FBGEMM tells of a choice it makes for Blackwell, on every other GPU too.
    (UserWarning, "TBE B200 optimization"),
    # FBGEMM's ops on CPU have no Autograd registration; gradients are tested against dense ones.
    (UserWarning, ".*an autograd kernel was not registered to the Autograd key"),
)


def quiet_dependencies() -> None:
    """Silence the above in this process. Call once, before the libraries speak."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)

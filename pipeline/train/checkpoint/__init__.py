"""Checkpoints: torch.distributed.checkpoint beside two JSON files that say what it is and that it is whole.

    CHECKPOINT/rank-R.safetensors    tensors that a rank wrote
    CHECKPOINT/.metadata             DCP's index: where each tensor, or part of a table, lies
    CHECKPOINT/state.json            run, schema, moments, data set, epoch, step
    CHECKPOINT/metrics.json          what the model scored, where it is known
    CHECKPOINT/manifest.json         size and SHA-256 of every other file but metrics.json; written last

Written in the background beside its place, read back, then renamed, so a folder of that name is always whole.
Loads at any number of ranks and under any plan; `load_unsharded` reads plain tensors without a process group.
Nothing in it is ever run as code: the index, a pickle by DCP's choice, may name the classes of an index alone.

    state      what a checkpoint is
    files      checksums, durable writing
    shards     DCP's storage: plain tensors, the index without code
    shelf      a run's folder of checkpoints: which there are, which are kept
    writer     saving, while training goes on
    reading    resuming and plain loading
    unshard    one file of plain tensors
    warm       starting from another recipe's checkpoint
"""

from pipeline.train.checkpoint.files import verify
from pipeline.train.checkpoint.reading import load_task, load_unsharded, resume
from pipeline.train.checkpoint.shelf import Shelf, newest
from pipeline.train.checkpoint.state import CheckpointState, read_metrics, read_state, record_metrics
from pipeline.train.checkpoint.unshard import unshard
from pipeline.train.checkpoint.warm import WarmStart, warm_start
from pipeline.train.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointState",
    "CheckpointWriter",
    "Shelf",
    "WarmStart",
    "load_task",
    "load_unsharded",
    "newest",
    "read_metrics",
    "read_state",
    "record_metrics",
    "resume",
    "unshard",
    "verify",
    "warm_start",
]

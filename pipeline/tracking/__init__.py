"""MLflow behind one small door.

A run is first a journal on disk (`journal`), written by the caller in microseconds; a thread (`tracker`) sends
what is new to MLflow (`sender`). A server that is refused, hangs or dies in mid-run costs the caller nothing and
loses nothing: `sync` sends later what is still on disk, and sending twice changes nothing.

Importing this package does not import MLflow.
"""

from pipeline.tracking.names import metric_name
from pipeline.tracking.sender import Sent, sync
from pipeline.tracking.store import connect, tracking_uri
from pipeline.tracking.tracker import NullTracker, Tracker

__all__ = ["NullTracker", "Sent", "Tracker", "connect", "metric_name", "sync", "tracking_uri"]

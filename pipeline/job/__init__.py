"""The main job, one level above the parts it is made of: `main.py` is a run in one page."""

from pipeline.job.console import ConsoleReporter, precision
from pipeline.job.main import JobResult, go_on, register, run, start_warm, summary
from pipeline.job.membership import is_first, is_worker, member, write_status
from pipeline.job.record import code_version, experiment_of, start_tracker

__all__ = [
    "ConsoleReporter",
    "JobResult",
    "code_version",
    "experiment_of",
    "go_on",
    "is_first",
    "is_worker",
    "member",
    "precision",
    "register",
    "run",
    "start_tracker",
    "start_warm",
    "summary",
    "write_status",
]

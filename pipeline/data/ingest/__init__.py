"""Flat impression logs to the request-grouped log, by a spec. See docs/data.md."""

from pipeline.data.ingest.leaks import find_leaks, refuse_leaks
from pipeline.data.ingest.load import load_spec, shipped_specs
from pipeline.data.ingest.run import ingest
from pipeline.data.ingest.spec import IngestSpec

__all__ = ["IngestSpec", "find_leaks", "ingest", "load_spec", "refuse_leaks", "shipped_specs"]

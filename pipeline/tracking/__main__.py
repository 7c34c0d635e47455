"""Send later what runs could not send: `python -m pipeline.tracking RUN_DIR...`."""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import TrefoilError
from pipeline.tracking.sender import sync


def main(argv: list[str] | None = None) -> int:
    """Sync each folder; 0 if all arrived, 1 with a line on standard error for each that did not."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="a run's folder, or its tracking/ folder")
    parser.add_argument("--uri", help="address of MLflow; by default MLFLOW_TRACKING_URI, else the run's own")
    given = parser.parse_args(argv)
    failed = 0
    for folder in given.run_dir:
        try:
            sent = sync(folder, uri=given.uri)
            print(f"{folder}: {sent.entries} entries sent, {sent.rejected} rejected, run {sent.run_id}")
        except TrefoilError as error:
            failed = 1
            print(f"{folder}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())

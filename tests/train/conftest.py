"""The log that tests of training share; who damages it damages a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.logs import write_log


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log") / "data"
    write_log(root, {"hf": 60, "sr": 30, "rp": 12})
    return root

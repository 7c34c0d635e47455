"""The spec that docs/data.md shows is one that works."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from pipeline.data.ingest import ingest
from pipeline.data.ingest.spec import IngestSpec
from tests.data.ingest_logs import rows

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documented_spec_ingests(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "shop.yaml").write_text(found[1])
    pl.DataFrame(
        {
            "request_id": ["r1", "r1", "r2"],
            "user_id": ["u", "u", "u"],
            "item_id": [1, 2, 1],
            "ts": [1_700_000_000, 1_700_000_000, 1_700_000_000 + 8 * 86_400],
            "page": ["home", "home", "search"],
            "clicked": [1, 0, 0],
            "bought_within_7d": [0, 0, None],
        }
    ).write_csv(tmp_path / "impressions-1.csv")
    pl.DataFrame({"id": [1, 2], "brand": ["x", "y"], "price": [3.5, None]}).write_csv(tmp_path / "items.csv")
    dataset = ingest(tmp_path / "shop.yaml", tmp_path / "out", {"root": str(tmp_path)})
    first, second = rows(dataset)
    assert first["click"] == [1.0, 0.0]
    assert second["history_item"] == [1, 2]
    assert second["user_brand_count"][0] > 0
    assert dataset.schema.label_delay_ms == 7 * 86_400_000


def test_the_reference_names_every_field() -> None:
    text = DOCS.read_text()
    for name in IngestSpec.model_fields:
        if name not in ("name", "description"):
            assert f"`{name}" in text, f"docs/data.md does not name the field {name}"

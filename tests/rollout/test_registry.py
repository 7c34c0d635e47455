from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RegistryError
from pipeline.rollout.registry import Registry
from pipeline.tracking import Tracker

MODEL = """
import mlflow
import pandas as pd
class Constant(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame):
        return [0.5] * len(model_input)
mlflow.models.set_model(Constant())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def model_uri(root: Path) -> str:
    """A pyfunc model, written as code, among the artifacts of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RANK", raising=False)
        tracker = Tracker.start("export", run_dir=root / "run", root=root)
        import mlflow.pyfunc

        (root / "model.py").write_text(MODEL)
        mlflow.pyfunc.save_model(root / "pyfunc", python_model=str(root / "model.py"), pip_requirements=[])
        tracker.log_artifact(root / "pyfunc", to="model")
        assert tracker.finish()
    return f"runs:/{tracker.run_id}/model"


@pytest.fixture
def registry(root: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(root)


def test_a_version_goes_the_whole_way(registry: Registry, model_uri: str) -> None:
    first = registry.register("hf", model_uri, tags={"wave": "1"})
    assert (first.surface, first.tags) == ("hf", {"wave": "1"})
    assert f"runs:/{first.run_id}/model" == model_uri
    assert (Path(first.source) / "MLmodel").exists()
    assert registry.get("hf", "challenger") == first
    assert registry.get("hf", "champion") is None
    assert registry.promote("hf") == first
    second = registry.register("hf", model_uri)
    assert registry.aliases("hf") == {"champion": first.version, "challenger": second.version}
    registry.promote("hf")
    assert registry.aliases("hf") == {"champion": second.version, "previous": first.version}
    assert registry.rollback("hf") == first
    assert registry.aliases("hf") == {"champion": first.version}
    with pytest.raises(RegistryError, match="no previous version"):
        registry.rollback("hf")


def test_surfaces_do_not_touch_each_other(registry: Registry, model_uri: str) -> None:
    registry.register("sr", model_uri)
    before = registry.aliases("sr")
    registry.register("rp", model_uri)
    registry.promote("rp")
    assert registry.aliases("sr") == before


@pytest.mark.parametrize(
    "address", ["runs:/0123456789abcdef0123456789abcdef/model", "file:///tmp/model", "models:/m-0"]
)
def test_no_model_no_version(registry: Registry, address: str) -> None:
    with pytest.raises(RegistryError, match=r"could not register|no model's address"):
        registry.register("empty", address)
    assert registry.aliases("empty") == {}


def test_a_run_without_the_model_is_named(registry: Registry, model_uri: str) -> None:
    with pytest.raises(RegistryError, match="no MLmodel file"):
        registry.register("empty", model_uri + "s")


def test_names_are_checked(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no challenger"):
        registry.promote("never")
    with pytest.raises(RegistryError, match="did you mean 'champion'"):
        registry.get("hf", "champoin")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_promotion_that_fails_midway_is_undone(
    registry: Registry, model_uri: str, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever of the three moves of a promotion fails, before or after it took effect, nothing has changed."""
    surface = f"frail{failing}"
    registry.register(surface, model_uri)
    registry.promote(surface)
    registry.register(surface, model_uri)
    before = registry.aliases(surface)
    client: Any = registry._client
    calls = 0

    def fails(real: Any) -> Any:
        def call(*args: Any) -> None:
            nonlocal calls
            calls += 1
            real(*args)
            if calls == failing:
                raise OSError("the line went dead")

        return call

    for name in ("set_registered_model_alias", "delete_registered_model_alias"):
        monkeypatch.setattr(client, name, fails(getattr(client, name)))
    with pytest.raises(RegistryError, match=r"could not promote.*went dead"):
        registry.promote(surface)
    assert registry.aliases(surface) == before


def test_a_store_that_is_away_is_a_registry_error(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="could not look up"):
        Registry(tmp_path, uri="http://127.0.0.1:1").get("hf", "champion")

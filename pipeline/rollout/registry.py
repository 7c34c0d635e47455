"""Which version of each surface's model serves: MLflow's registry with three aliases.

`challenger` has passed its gates and waits, `champion` serves, `previous` served before it. The model of a
surface is registered as `trefoil-<surface>`. MLflow moves one alias at a time and checks nothing, so each change
here ends in the one move that matters, of `champion`, and is undone as a whole if any part of it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import RegistryError, unknown
from pipeline.tracking.store import connect, locked, prepare_environment, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
ALIASES = (CHALLENGER, CHAMPION, PREVIOUS)
_T = TypeVar("_T")


def model_name(surface: str) -> str:
    """The registered name of a surface's model.

    >>> model_name("hf")
    'trefoil-hf'
    """
    return f"trefoil-{surface}"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version of a surface's model.

    Args:
        surface: the surface that it serves.
        version: MLflow's number, counting from 1.
        source: where its files lie.
        run_id: MLflow's id of the run that made it; empty if none is known.
        tags: as given at registration.
    """

    surface: str
    version: int
    source: str
    run_id: str
    tags: Mapping[str, str]


class Registry:
    """The registry of one MLflow store. Every method raises RegistryError where MLflow fails.

    Args:
        root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server.
        uri: address of the store; by default `pipeline.tracking.tracking_uri(root)`.
    """

    def __init__(self, root: str | os.PathLike[str], *, uri: str | None = None) -> None:
        self._root = Path(root)
        self._uri = uri or tracking_uri(root)
        self._client: MlflowClient | None = None

    def register(self, surface: str, model_uri: str, *, tags: Mapping[str, str] | None = None) -> Version:
        """Register a logged pyfunc model as the surface's new `challenger`, in the place of any other.

        Args:
            surface: the surface that it serves.
            model_uri: `runs:/RUN_ID/PATH` of a model among a run's artifacts, or `models:/m-...` of a logged model.
            tags: kept with the version.

        Raises:
            RegistryError: there is no model at the address, or MLflow fails; no version and no alias is added.
        """

        def change(client: MlflowClient) -> Version:
            run_id, source, model_id = _locate(client, model_uri)
            name = model_name(surface)
            if not client.search_registered_models(filter_string=f"name = '{name}'"):
                client.create_registered_model(name)
            created = client.create_model_version(
                name, source, run_id=run_id, tags=dict(tags or {}), model_id=model_id, await_creation_for=30
            )
            try:
                self._set(client, surface, {CHALLENGER: int(created.version)})
            except Exception:
                client.delete_model_version(name, created.version)
                raise
            return _version(surface, created)

        return self._do(f"register {model_uri} for surface {surface!r}", change)

    def get(self, surface: str, alias: str) -> Version | None:
        """The version that bears `alias`; None if none does.

        Raises:
            RegistryError: there is no such alias, or MLflow fails.
        """
        if alias not in ALIASES:
            raise RegistryError(unknown("alias", alias, ALIASES))

        def read(client: MlflowClient) -> Version | None:
            number = _aliases(client, surface).get(alias)
            if number is None:
                return None
            return _version(surface, client.get_model_version(model_name(surface), str(number)))

        return self._do(f"look up the {alias} of surface {surface!r}", read, lock=False)

    def aliases(self, surface: str) -> dict[str, int]:
        """Version number by alias, of the aliases that are set."""
        return self._do(f"read the aliases of surface {surface!r}", lambda c: _aliases(c, surface), lock=False)

    def promote(self, surface: str) -> Version:
        """Make the challenger champion and the champion previous; returns the new champion.

        Raises:
            RegistryError: there is no challenger, or MLflow fails; the aliases are as they were.
        """

        def change(client: MlflowClient) -> Version:
            now = _aliases(client, surface)
            if CHALLENGER not in now:
                raise RegistryError(f"surface {surface!r} has no challenger to promote; register a version first")
            moves: dict[str, int | None] = {PREVIOUS: now[CHAMPION]} if CHAMPION in now else {}
            self._set(client, surface, moves | {CHAMPION: now[CHALLENGER], CHALLENGER: None})
            return _version(surface, client.get_model_version(model_name(surface), str(now[CHALLENGER])))

        return self._do(f"promote the challenger of surface {surface!r}", change)

    def rollback(self, surface: str) -> Version:
        """Make the previous version champion again, in one move; returns it. The alias `previous` is free then.

        Raises:
            RegistryError: there is no previous version, or MLflow fails; the aliases are as they were.
        """

        def change(client: MlflowClient) -> Version:
            now = _aliases(client, surface)
            if PREVIOUS not in now or now[PREVIOUS] == now.get(CHAMPION):
                raise RegistryError(f"surface {surface!r} has no previous version to go back to")
            self._set(client, surface, {CHAMPION: now[PREVIOUS], PREVIOUS: None})
            return _version(surface, client.get_model_version(model_name(surface), str(now[PREVIOUS])))

        return self._do(f"roll back surface {surface!r}", change)

    def _do(self, what: str, action: Callable[[MlflowClient], _T], *, lock: bool = True) -> _T:
        """Run one action on the store, changes one at a time among the processes of this machine."""
        prepare_environment()
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._client is None:
                self._client = connect(self._root, uri=self._uri)
            if not lock:
                return action(self._client)
            with locked(self._root / ".registry.lock"):
                return action(self._client)
        except (MlflowException, SQLAlchemyError, OSError) as cause:
            raise RegistryError(f"could not {what}: {cause}") from cause

    def _set(self, client: MlflowClient, surface: str, moves: Mapping[str, int | None]) -> None:
        """Move aliases in the given order (None frees one); if one cannot be moved, move those before it back."""
        before = _aliases(client, surface)
        done: list[str] = []
        try:
            for alias, number in moves.items():
                done.append(alias)
                _move(client, surface, alias, number)
        except Exception as cause:
            try:
                for alias in reversed(done):
                    _move(client, surface, alias, before.get(alias))
            except Exception as second:  # noqa: BLE001  # whatever it was, the user must hear of the half-made change
                wanted = ", ".join(f"{alias}={number}" for alias, number in sorted(before.items())) or "none"
                raise RegistryError(
                    f"an alias of {model_name(surface)} could not be moved ({cause}), nor could those before it be "
                    f"moved back ({second}); set them by hand to: {wanted}"
                ) from cause
            raise


def _move(client: MlflowClient, surface: str, alias: str, number: int | None) -> None:
    if number is None:
        client.delete_registered_model_alias(model_name(surface), alias)
    else:
        client.set_registered_model_alias(model_name(surface), alias, str(number))


def _aliases(client: MlflowClient, surface: str) -> dict[str, int]:
    found = client.search_registered_models(filter_string=f"name = '{model_name(surface)}'")
    if not found:
        return {}
    # The search leaves aliases out on some stores; the single model has them on all.
    aliases = client.get_registered_model(model_name(surface)).aliases
    return {alias: int(number) for alias, number in aliases.items() if alias in ALIASES}


def _locate(client: MlflowClient, model_uri: str) -> tuple[str | None, str, str | None]:
    """Run, source and logged-model id of a model's address, none of them taken from MLflow's global settings."""
    if model_uri.startswith("models:/m-"):
        model_id = model_uri.removeprefix("models:/")
        return client.get_logged_model(model_id).source_run_id, model_uri, model_id
    if not model_uri.startswith("runs:/"):
        raise RegistryError(f"{model_uri!r} is no model's address; give runs:/RUN_ID/PATH or models:/m-...")
    run_id, _, path = model_uri.removeprefix("runs:/").partition("/")
    artifacts = client.list_artifacts(run_id, path)
    if not path or f"{path}/MLmodel" not in [found.path for found in artifacts]:
        raise RegistryError(f"run {run_id} has no model at {path!r}: there is no MLmodel file")
    return run_id, f"{client.get_run(run_id).info.artifact_uri}/{path}", None


def _version(surface: str, of: ModelVersion) -> Version:
    return Version(
        surface=surface,
        version=int(of.version),
        source=of.source or "",
        run_id=of.run_id or "",
        tags=dict(of.tags or {}),
    )

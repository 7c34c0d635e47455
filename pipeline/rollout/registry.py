"""Which version of each surface's model serves: MLflow's registry with three aliases.

`challenger` has passed its gates and waits, `champion` serves, `previous` served before it. The model of a surface is
registered as `trefoil-<surface>`. A surface's changes are made one at a time, each as a whole (see `changes`).

The lock is a file of the store's folder: actors on several machines must share that folder. An intent that another
machine wrote less than a minute ago is respected all the same.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import RegistryError, unknown
from pipeline.rollout import audit
from pipeline.rollout.audit import Evidence, Record
from pipeline.rollout.changes import (
    ALIASES,
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Aliases,
    aliases_of,
    make,
    model_name,
    recover,
    tags_of,
)
from pipeline.tracking.store import connect, prepare_environment, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LOCK_PATIENCE_S = 30.0
_T = TypeVar("_T")


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

    @property
    def evidence(self) -> Evidence | None:
        """What the gates found, if they have seen it."""
        text = self.tags.get(audit.EVIDENCE)
        where = f"{audit.EVIDENCE} of version {self.version} of {model_name(self.surface)}"
        return None if text is None else audit.load_evidence(text, where=where)


class Registry:
    """The registry of one MLflow store. Every method raises RegistryError where MLflow fails.

    Args:
        root: folder of the embedded store, where `MLFLOW_TRACKING_URI` names no server; the locks lie there too.
        uri: address of the store; by default `pipeline.tracking.tracking_uri(root)`.
    """

    def __init__(self, root: str | os.PathLike[str], *, uri: str | None = None) -> None:
        self._root = Path(root)
        self._uri = uri or tracking_uri(root)
        self._client: MlflowClient | None = None

    def register(
        self,
        surface: str,
        model_uri: str,
        *,
        tags: Mapping[str, str] | None = None,
        challenger: bool = True,
        actor: str | None = None,
    ) -> Version:
        """Register a logged pyfunc model as a new version of the surface's model.

        Args:
            surface: the surface that it serves.
            model_uri: `runs:/RUN_ID/PATH` of a model among a run's artifacts, or `models:/m-...` of a logged model.
            tags: kept with the version; `digest` (of the artifact) and `dataset` (that it was trained on) are what
                evidence is held against.
            challenger: make it the challenger at once, in the place of any other; the gates have not seen it then.
            actor: who asks; by default the user of this process.

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
            if challenger:
                now = aliases_of(client, surface)
                after = now | {CHALLENGER: int(created.version)}
                record = audit.begin("register", surface, now, after, actor=actor, evidence=None, reason="")
                try:
                    make(client, record)
                except Exception:
                    client.delete_model_version(name, created.version)
                    raise
            return _version(surface, created)

        return self._do(f"register {model_uri} for surface {surface!r}", change, locking=surface)

    def nominate(self, surface: str, version: int, evidence: Evidence, *, actor: str | None = None) -> Version:
        """Make a version that passed its gates the challenger, and keep the evidence with it.

        Raises:
            RegistryError: the evidence does not pass, or is not of this version, log or champion; or MLflow fails.
        """

        def change(client: MlflowClient) -> Version:
            now = aliases_of(client, surface)
            of = _version(surface, client.get_model_version(model_name(surface), str(version)))
            check_evidence(of, evidence, champion=now.get(CHAMPION))
            client.set_model_version_tag(model_name(surface), str(version), audit.EVIDENCE, audit.dump(evidence))
            after = now | {CHALLENGER: version}
            make(client, audit.begin("nominate", surface, now, after, actor=actor, evidence=evidence, reason=""))
            return _version(surface, client.get_model_version(model_name(surface), str(version)))

        return self._do(f"nominate version {version} of surface {surface!r}", change, locking=surface)

    def promote(
        self, surface: str, *, dataset: str | None = None, actor: str | None = None, reason: str = ""
    ) -> Version:
        """Make the challenger champion and the champion previous; returns the new champion.

        Args:
            surface: whose challenger.
            dataset: fingerprint of the log that the evidence must come from, beside the one it was trained on.
            actor: who asks; by default the user of this process.
            reason: in words, for the record.

        Raises:
            RegistryError: there is no challenger; it has no evidence, or evidence that does not pass, is of another
                artifact or log, or compared it with another champion; or MLflow fails. The aliases are as they were.
        """

        def change(client: MlflowClient) -> Version:
            now = aliases_of(client, surface)
            if CHALLENGER not in now:
                raise RegistryError(
                    f"surface {surface!r} has no challenger to promote; `trefoil rollout run` makes one of what passes"
                )
            of = _version(surface, client.get_model_version(model_name(surface), str(now[CHALLENGER])))
            evidence = check_evidence(of, of.evidence, champion=now.get(CHAMPION), dataset=dataset)
            after = {CHAMPION: now[CHALLENGER]} | ({PREVIOUS: now[CHAMPION]} if CHAMPION in now else {})
            make(client, audit.begin("promote", surface, now, after, actor=actor, evidence=evidence, reason=reason))
            return of

        return self._do(f"promote the challenger of surface {surface!r}", change, locking=surface)

    def rollback(self, surface: str, *, actor: str | None = None, reason: str = "") -> Version:
        """Make the previous version champion again, in one move; returns it. The alias `previous` is free then.

        Raises:
            RegistryError: there is no previous version, or MLflow fails; the aliases are as they were.
        """

        def change(client: MlflowClient) -> Version:
            now = aliases_of(client, surface)
            if PREVIOUS not in now or now[PREVIOUS] == now.get(CHAMPION):
                raise RegistryError(f"surface {surface!r} has no previous version to go back to")
            after = {a: n for a, n in now.items() if a != PREVIOUS} | {CHAMPION: now[PREVIOUS]}
            make(client, audit.begin("rollback", surface, now, after, actor=actor, evidence=None, reason=reason))
            return _version(surface, client.get_model_version(model_name(surface), str(now[PREVIOUS])))

        return self._do(f"roll back surface {surface!r}", change, locking=surface)

    def withdraw(self, surface: str, *, actor: str | None = None, reason: str = "") -> None:
        """Take the alias from the challenger, whose version stays.

        Raises:
            RegistryError: there is no challenger, or MLflow fails.
        """

        def change(client: MlflowClient) -> None:
            now = aliases_of(client, surface)
            if CHALLENGER not in now:
                raise RegistryError(f"surface {surface!r} has no challenger to withdraw")
            after = {a: n for a, n in now.items() if a != CHALLENGER}
            make(client, audit.begin("withdraw", surface, now, after, actor=actor, evidence=None, reason=reason))

        self._do(f"withdraw the challenger of surface {surface!r}", change, locking=surface)

    def recover(self, surface: str) -> Record | None:
        """Finish or undo what a process that died has left half made; None if there is nothing.

        Every change does this first; `status` of the command line calls it for every surface.

        Raises:
            RegistryError: another machine is in the middle of a change, or MLflow fails.
        """
        return self._do(f"recover surface {surface!r}", lambda c: recover(c, surface), locking=surface)

    def history(self, surface: str) -> list[Record]:
        """Every change of the surface's aliases, oldest first."""
        return self._do(f"read the history of surface {surface!r}", lambda c: audit.records(tags_of(c, surface)))

    def get(self, surface: str, alias: str) -> Version | None:
        """The version that bears `alias`; None if none does.

        Raises:
            RegistryError: there is no such alias, or MLflow fails.
        """
        if alias not in ALIASES:
            raise RegistryError(unknown("alias", alias, ALIASES))

        def read(client: MlflowClient) -> Version | None:
            number = aliases_of(client, surface).get(alias)
            if number is None:
                return None
            return _version(surface, client.get_model_version(model_name(surface), str(number)))

        return self._do(f"look up the {alias} of surface {surface!r}", read)

    def aliases(self, surface: str) -> Aliases:
        """Version number by alias, of the aliases that are set."""
        return self._do(f"read the aliases of surface {surface!r}", lambda c: aliases_of(c, surface))

    def surfaces(self) -> tuple[str, ...]:
        """Surfaces that have a registered model, sorted."""
        prefix = model_name("")
        return self._do(
            "list the registered models",
            lambda c: tuple(
                sorted(m.name.removeprefix(prefix) for m in c.search_registered_models() if m.name.startswith(prefix))
            ),
        )

    def _do(self, what: str, action: Callable[[MlflowClient], _T], *, locking: str | None = None) -> _T:
        """Run one action on the store; a change recovers first, and one at a time for each surface."""
        prepare_environment()
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._client is None:
                self._client = connect(self._root, uri=self._uri)
            if locking is None:
                return action(self._client)
            with _locked(self._root / f".registry-{locking}.lock", locking):
                if not what.startswith("recover"):
                    recover(self._client, locking)
                return action(self._client)
        except (MlflowException, SQLAlchemyError, OSError) as cause:
            raise RegistryError(f"could not {what}: {cause}") from cause


def check_evidence(
    version: Version, evidence: Evidence | None, *, champion: int | None, dataset: str | None = None
) -> Evidence:
    """Hold evidence against what it is said to be of; returns it.

    Args:
        version: that it shall justify.
        evidence: to check.
        champion: version that serves now.
        dataset: fingerprint that it must come from, beside the one of the version's training.

    Raises:
        RegistryError: there is none, it does not pass, or it is of another surface, artifact, log or champion.
    """
    name = f"version {version.version} of {model_name(version.surface)}"
    again = "; measure it with `trefoil rollout run`"
    if evidence is None:
        raise RegistryError(f"{name} has no evidence: the gates have not seen it{again}")
    if not evidence.passed:
        raise RegistryError(f"{name} did not pass its gates (run {evidence.run}); see its report for the reasons")
    for what, want, have in (
        ("surface", version.surface, evidence.surface),
        ("artifact", version.tags.get("digest"), evidence.artifact),
        ("data set", version.tags.get("dataset"), evidence.dataset),
        ("data set", dataset or evidence.dataset, evidence.dataset),
    ):
        if want != have:
            raise RegistryError(f"the evidence for {name} is of another {what}: {have}, not {want or 'unknown'}{again}")
    if evidence.champion != champion:
        raise RegistryError(
            f"the evidence for {name} compares it with champion {evidence.champion or 'none'}, and "
            f"{champion or 'none'} serves now{again}"
        )
    return evidence


@contextmanager
def _locked(path: Path, surface: str) -> Iterator[None]:
    """Hold the surface's lock; the kernel frees it when the process dies.

    Raises:
        RegistryError: another process has held it for too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + _LOCK_PATIENCE_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RegistryError(
                        f"someone else has been changing surface {surface!r} for {_LOCK_PATIENCE_S:g} s; nothing was "
                        "changed, try again"
                    ) from None
                time.sleep(0.02)
        yield


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

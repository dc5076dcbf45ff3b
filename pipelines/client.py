"""The one client of Kubeflow Pipelines: upload a pipeline, run it once, run it by the clock.

Everything there bears ``run.name``: the pipeline, its experiment, its runs and its schedule. A version of the pipeline
is named by our code, the config and the YAML's own digest, so the same YAML is found again instead of uploaded again.

Kubeflow has no call that changes a schedule, so it is replaced in four steps: the new one is created disabled, the old
one is disabled, the new one is enabled, the old one is deleted. So no two are ever enabled together, and after a
failure in any step the same command completes the replacement. What a schedule was made of is a digest in its
description, because the API does not return all of it.

This uses KFP's generated API client, ``kfp_server_api``. ``kfp.Client``, which wraps it, prints to the terminal,
retries for half a minute, waits without limit for a host that does not answer, and keeps a file in the home folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import kfp_server_api as api
from urllib3.exceptions import HTTPError

from des_core.config import Config
from des_core.errors import DesError, UserError
from des_core.release.registry import lineage
from pipelines.trigger import Trigger

MARK = "des schedule: "
"""Begins the description of every schedule of ours; others are never touched."""

ANSWER_S = 60
"""Seconds that an answer may take."""

PAGE = 100


class Version(NamedTuple):
    """A pipeline's version in Kubeflow."""

    pipeline_id: str
    version_id: str
    name: str
    uploaded: bool
    """Whether it was not there before."""


class Schedule(NamedTuple):
    """A recurring run of ours."""

    id: str
    name: str
    enabled: bool
    about: str
    """Its description, without the mark."""


@dataclass(frozen=True)
class Kubeflow:
    """Kubeflow Pipelines at one address."""

    host: str
    namespace: str | None
    client: api.ApiClient

    def upload(self, config: Config, package: str) -> Version:
        """The version of ``config``'s pipeline that is the YAML at ``package``, uploaded unless it is there.

        Raises:
            DesError: as every method here: Kubeflow cannot be reached, refuses or fails.
        """
        code = lineage.code_version()
        digest = hashlib.sha256(Path(package).read_bytes()).hexdigest()
        short = code.replace("+", "-") if len(code) < 40 else code[:12] + code[40:].replace("+", "-")
        name = f"{short}-{config.digest[:10]}-{digest[:10]}"
        pipelines = api.PipelineServiceApi(self.client)
        pipeline, _ = self._ensure(
            partial(self._named, "pipelines", pipelines.pipeline_service_list_pipelines, config.run.name),
            "create a pipeline",
            pipelines.pipeline_service_create_pipeline,
            api.V2beta1Pipeline(display_name=config.run.name, namespace=self.namespace),
        )
        versions = partial(pipelines.pipeline_service_list_pipeline_versions, pipeline.pipeline_id)
        version, uploaded = self._ensure(
            partial(self._named, "pipeline_versions", versions, name),
            "upload the pipeline",
            api.PipelineUploadServiceApi(self.client).upload_pipeline_version,
            package,
            name=name,
            pipelineid=pipeline.pipeline_id,
            description=f"code {code}, config {config.digest}, YAML {digest}",
        )
        return Version(pipeline.pipeline_id, version.pipeline_version_id, name, uploaded)

    def experiment(self, name: str) -> str:
        """Id of the experiment of this name, made unless it is there."""
        experiments = api.ExperimentServiceApi(self.client)
        found, _ = self._ensure(
            partial(self._named, "experiments", experiments.experiment_service_list_experiments, name),
            "create an experiment",
            experiments.experiment_service_create_experiment,
            api.V2beta1Experiment(display_name=name, namespace=self.namespace),
        )
        return str(found.experiment_id)

    def run(self, name: str, version: Version, experiment: str, as_of: str) -> str:
        """Id of a run that was just started."""
        wanted = api.V2beta1Run(
            display_name=f"{name} {as_of}".rstrip(),
            experiment_id=experiment,
            pipeline_version_reference=_reference(version),
            runtime_config=api.V2beta1RuntimeConfig(parameters={"as_of": as_of}),
        )
        return str(self._call("start a run", api.RunServiceApi(self.client).run_service_create_run, wanted).run_id)

    def schedule(
        self, name: str, version: Version, experiment: str, as_of: str, trigger: Trigger
    ) -> tuple[Schedule, str]:
        """The one enabled schedule of this name, and what was done: made, replaced, resumed or unchanged.

        Runs never overlap, and a missed run is not repeated: the next one's window begins where the champion's ended.
        """
        wanted = api.V2beta1RecurringRun(
            display_name=name,
            experiment_id=experiment,
            pipeline_version_reference=_reference(version),
            runtime_config=api.V2beta1RuntimeConfig(parameters={"as_of": as_of}),
            trigger=_trigger(trigger),
            max_concurrency="1",
            no_catchup=True,
            mode=api.RecurringRunMode.DISABLE,
        )
        content = json.dumps(self.client.sanitize_for_serialization(wanted), sort_keys=True)
        about = f"{trigger}, version {version.name}, digest {hashlib.sha256(content.encode()).hexdigest()[:16]}"
        before = self.schedules(name)
        same = sorted((one for one in before if one.about == about), key=lambda one: not one.enabled)
        kept = same[0] if same else self._make(wanted, about)
        others = [one for one in before if one != kept]
        for other in others:
            if other.enabled:
                self._set("disable", other)
        if not kept.enabled:
            try:
                self._set("enable", kept)
            except DesError as error:
                raise DesError(f"{error}; schedule {name} is disabled until the same command succeeds") from None
        for other in others:
            self._set("delete", other)
        done = "made" if not before else "replaced" if not same else "unchanged" if kept.enabled else "resumed"
        return kept._replace(enabled=True), done

    def schedules(self, name: str | None = None) -> list[Schedule]:
        """Schedules of ours, of this name or all."""
        lists = api.RecurringRunServiceApi(self.client).recurring_run_service_list_recurring_runs
        found = (
            Schedule(one.recurring_run_id, one.display_name, one.mode == "ENABLE", one.description[len(MARK) :])
            for one in self._all("recurring_runs", "list schedules", lists, namespace=self.namespace)
            if (one.description or "").startswith(MARK)
        )
        return sorted((one for one in found if name in (None, one.name)), key=lambda one: (one.name, one.id))

    def change(self, verb: str, name: str) -> None:
        """``disable``, ``enable`` or ``delete`` the schedule of this name.

        Raises:
            UserError: there is none, or it was left half replaced.
        """
        found = self.schedules(name)
        if not found:
            known = ", ".join(sorted({one.name for one in self.schedules()})) or "none"
            raise UserError(f"no schedule {name} at {self.host}; there are: {known}")
        if verb == "enable" and len(found) > 1:
            raise UserError(
                f"schedule {name} was left half replaced: a des schedule create was interrupted; "
                "run the same des schedule create command again"
            )
        for one in found:
            self._set(verb, one)

    def ui(self, kind: str, identity: str) -> str:
        """Address of a page."""
        return f"{self.host}/#/{kind}/details/{identity}"

    def _named(self, kind: str, lists: Callable[..., Any], name: str) -> Any:
        """The one of this name, or None."""
        named = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        # A version's namespace is its pipeline's.
        namespace = {} if kind == "pipeline_versions" else {"namespace": self.namespace}
        found = self._all(kind, f"list {kind}", lists, filter=json.dumps(named), **namespace)
        return next((one for one in found if one.display_name == name), None)

    def _ensure(
        self, find: Callable[[], Any], what: str, create: Callable[..., Any], *words: Any, **options: Any
    ) -> tuple[Any, bool]:
        """What is there or is made now, and whether it was made."""
        found = find()
        if found is not None:
            return found, False
        try:
            return self._call(what, create, *words, **options), True
        except _Conflict:
            # Somebody else has just made it.
            found = find()
            if found is None:
                raise
            return found, False

    def _make(self, wanted: Any, about: str) -> Schedule:
        wanted.description = MARK + about
        create = api.RecurringRunServiceApi(self.client).recurring_run_service_create_recurring_run
        made = self._call("create a schedule", create, wanted)
        return Schedule(made.recurring_run_id, made.display_name, False, about)

    def _set(self, verb: str, schedule: Schedule) -> None:
        call = getattr(api.RecurringRunServiceApi(self.client), f"recurring_run_service_{verb}_recurring_run")
        try:
            self._call(f"{verb} schedule {schedule.name}", call, schedule.id)
        except _Missing:
            # Somebody else has deleted it, which is an error only for the one that is to be enabled.
            if verb == "enable":
                raise

    def _all(self, kind: str, what: str, lists: Callable[..., Any], **options: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(what, lists, page_token=token, page_size=PAGE, **options)
            yield from getattr(page, kind) or []
            token = page.next_page_token
            if not token:
                return

    def _call(self, what: str, function: Callable[..., Any], *words: Any, **options: Any) -> Any:
        given = {key: value for key, value in options.items() if value is not None}
        try:
            result = function(*words, **given, _request_timeout=ANSWER_S)
        except api.ApiException as error:
            raise self._refusal(what, error.status, _reason(error)) from None
        except HTTPError as error:
            raise self._away(error) from None
        except AttributeError as error:
            # Where TLS fails, the generated client's own error handling fails: it decodes a body that is not there.
            if not isinstance(error.__context__, api.ApiException):
                raise
            raise self._away(error.__context__.reason) from None
        if not self.client.last_response.data.lstrip().startswith("{"):
            # The generated client takes a login page for an empty answer.
            raise UserError(
                f"{self.host} does not answer as Kubeflow Pipelines does (a login page?); "
                "check --host, and give a token in KFP_TOKEN"
            )
        return result

    def _away(self, reason: object) -> DesError:
        said = " ".join(str(reason).split()).rpartition("object at 0x")[2].partition(": ")[2] or str(reason)
        return DesError(
            f"Kubeflow at {self.host} cannot be reached: {' '.join(said.split())[:300]}; "
            "check --host or KFP_HOST, KFP_CA, and whether a port-forward still runs"
        )

    def _refusal(self, what: str, status: int, reason: str) -> DesError:
        where = f"Kubeflow at {self.host}"
        namespace = self.namespace or "none given"
        if status == 401 or 300 <= status < 400:
            return UserError(f"{where} does not know who asks to {what} ({status}); give a valid token in KFP_TOKEN")
        if status == 403:
            return UserError(
                f"{where} does not let this account {what} (403, namespace {namespace}): {reason}; "
                "ask for the right, or name another namespace with --namespace or KFP_NAMESPACE"
            )
        if status == 404:
            return _Missing(f"{where} found nothing there to {what} (404): {reason}; check --host and --namespace")
        # An upload under a taken name is a 500.
        if status == 409 or "already exist" in reason:
            return _Conflict(f"{where} could not {what}, another was quicker (409): {reason}; run this again")
        if 400 <= status < 500:
            return UserError(f"{where} refuses to {what} ({status}, namespace {namespace}): {reason}")
        return DesError(f"{where} failed to {what} ({status}): {reason}; run this again, or see its ml-pipeline log")


class _Missing(UserError):
    """404."""


class _Conflict(DesError):
    """409."""


def connect(host: str | None, namespace: str | None) -> Kubeflow:
    """Kubeflow Pipelines at ``host``, or else at KFP_HOST, with the token of KFP_TOKEN.

    Raises:
        UserError: no address, not an address, or no file at KFP_CA.
    """
    host = (host or os.environ.get("KFP_HOST") or "").rstrip("/")
    if not host:
        raise UserError("where is Kubeflow Pipelines? give --host http://localhost:8080, or export KFP_HOST")
    if not host.startswith(("http://", "https://")) or "@" in host:
        raise UserError(f"--host {host.rpartition('@')[2]}: write it like https://kubeflow.example/pipeline")
    settings = api.Configuration(host=host)
    # Retries of the layer below print warnings, and it would follow a redirect to a login page.
    settings.retries = False
    certificate = os.environ.get("KFP_CA")
    if certificate and not Path(certificate).is_file():
        raise UserError(f"KFP_CA = {certificate}: no such file; name the certificate that signed Kubeflow's")
    settings.ssl_ca_cert = certificate or None
    token = os.environ.get("KFP_TOKEN")
    if token:
        settings.api_key["authorization"] = token.strip()
        settings.api_key_prefix["authorization"] = "Bearer"
    return Kubeflow(host, namespace or os.environ.get("KFP_NAMESPACE") or None, api.ApiClient(settings))


def _reference(version: Version) -> Any:
    return api.V2beta1PipelineVersionReference(pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id)


def _trigger(trigger: Trigger) -> Any:
    if trigger.cron:
        return api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=trigger.cron))
    periodic = api.V2beta1PeriodicSchedule(interval_second=str(trigger.interval_s))
    return api.V2beta1Trigger(periodic_schedule=periodic)


def _reason(error: Any) -> str:
    """The server's message, on one line."""
    try:
        body = json.loads(error.body)
        text = next(body[key] for key in ("message", "error_message", "error") if body.get(key))
    except (TypeError, ValueError, AttributeError, StopIteration):
        text = error.body or error.reason or "no reason given"
    return " ".join(str(text).split())[:300]

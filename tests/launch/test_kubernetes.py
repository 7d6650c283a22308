"""launch/kubernetes: manifests against the schemas of the API, and against what the product does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoglm_elastic.agent import flags
from autoglm_elastic.coordination import authority
from autoglm_elastic.errors import ExitCode
from autoglm_elastic.settings import fields

validate = pytest.importorskip("kubernetes_validate")

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "kubernetes"
VERSION = "1.33"
"""The oldest that the page names."""

Manifest = dict[str, Any]


def read(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job_of(name: str) -> Manifest:
    """The Job, be it that of a JobSet."""
    (document,) = read(name)
    if document["kind"] == "JobSet":
        (replicated,) = document["spec"]["replicatedJobs"]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            **replicated["template"],
        }
    return document


def everything() -> list[Manifest]:
    return [*read("etcd.yaml"), *read("run.yaml"), job_of("job.yaml"), job_of("jobset.yaml")]


JOBS = pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])


@pytest.mark.parametrize(
    "manifest", everything(), ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['name']}"
)
def test_the_api_takes_it(manifest: Manifest) -> None:
    validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize(
    ("field", "value"), [("parallelism", "four"), ("successPolicies", {}), ("podFailurePolicy", {"rules": 3})]
)
def test_what_is_wrong_is_found(field: str, value: object) -> None:
    wrong = copy.deepcopy(job_of("job.yaml"))
    wrong["spec"][field] = value
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, VERSION, strict=True)


def test_both_ways_start_the_same_pods() -> None:
    ours, theirs = (copy.deepcopy(job_of(name)["spec"]) for name in ("job.yaml", "jobset.yaml"))
    for spec in (ours, theirs):
        (agent,) = spec["template"]["spec"]["containers"]
        (run_id,) = (entry for entry in agent["env"] if entry["name"] == "RUN_ID")
        assert "-name" in run_id.pop("valueFrom")["fieldRef"]["fieldPath"]
    assert ours == theirs


@JOBS
def test_the_command_line_is_one_of_ours(name: str) -> None:
    (agent,) = job_of(name)["spec"]["template"]["spec"]["containers"]
    assert agent["command"] == ["autoglm-run"]
    command = flags.parse(["--print-config", *agent["args"]], {})
    assert command.args.training_script == "/app/train.py"
    spec = job_of(name)["spec"]
    assert flags.nodes(command.args)[1] == spec["parallelism"] == spec["completions"]
    assert str(command.args.nproc_per_node) == agent["resources"]["limits"]["nvidia.com/gpu"]
    grace_s = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert command.args.shutdown_timeout < grace_s, "the workers' time must end before the pod's"
    named = {entry["name"] for entry in agent["env"]}
    used = {part.partition(")")[0] for argument in agent["args"] for part in argument.split("$(")[1:] if part}
    assert used <= named


@JOBS
def test_exit_codes_are_judged(name: str) -> None:
    rules = job_of(name)["spec"]["podFailurePolicy"]["rules"]
    actions: dict[object, str] = {}
    for rule in rules:
        for value in rule.get("onExitCodes", {}).get("values", []):
            actions.setdefault(value, rule["action"])
        for condition in rule.get("onPodConditions", []):
            actions.setdefault(condition["type"], rule["action"])
    assert actions == {
        ExitCode.DO_NOT_RESTART: "FailJob",
        ExitCode.USAGE: "FailJob",
        ExitCode.REQUEUE: "Ignore",
        "DisruptionTarget": "Ignore",
    }


def test_names_and_labels_meet() -> None:
    manifests = {(item["kind"], item["metadata"]["name"]): item for item in everything()}
    pod = job_of("job.yaml")["spec"]["template"]
    etcd = manifests["StatefulSet", "autoglm-etcd"]["spec"]
    for name, template in (("autoglm", pod), ("autoglm-etcd", etcd["template"])):
        labels = template["metadata"]["labels"].items()
        assert manifests["Service", name]["spec"]["selector"].items() <= labels
        for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            assert manifests[kind, name]["spec"][field]["matchLabels"].items() <= labels
    assert ("Service", pod["spec"]["subdomain"]) in manifests
    assert ("Service", etcd["serviceName"]) in manifests
    claims = [
        volume["persistentVolumeClaim"]
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert all(("PersistentVolumeClaim", claim["claimName"]) in manifests for claim in claims)
    (store,) = (
        argument for argument in pod["spec"]["containers"][0]["args"] if argument.startswith("--store=")
    )
    for member in range(etcd["replicas"]):
        assert f"autoglm-etcd-{member}.autoglm-etcd:2379" in store


@JOBS
def test_etcd_and_agents_show_each_other_certificates(name: str) -> None:
    manifests = {(item["kind"], item["metadata"]["name"]): item for item in everything()}
    etcd = manifests["StatefulSet", "autoglm-etcd"]["spec"]["template"]["spec"]
    arguments = etcd["containers"][0]["args"]
    assert {"--client-cert-auth", "--peer-client-cert-auth"} <= set(arguments)
    plain = [each for each in arguments if "http://" in each]
    assert [each.partition("=")[0] for each in plain] == ["--listen-metrics-urls"]
    job = job_of(name)["spec"]["template"]["spec"]
    given = {each["name"]: each.get("value") for each in job["containers"][0]["env"]}
    for pod in (etcd, job):
        (secret,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "tls")
        assert (secret["secretName"], secret["defaultMode"]) == ("autoglm-tls", 0o440)
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    known = {field.variable for field in fields()}
    for variable, file in (("CA", authority.CA), ("CERT", authority.CERT), ("KEY", authority.KEY)):
        assert given[f"AUTOGLM_TLS_{variable}"] == f"/tls/{file}"
        assert f"AUTOGLM_TLS_{variable}" in known
        assert any(argument.endswith(f"-file=/tls/{file}") for argument in arguments)


def test_nothing_runs_as_root() -> None:
    for template in (
        job_of("job.yaml")["spec"]["template"],
        read("etcd.yaml")[1]["spec"]["template"],
    ):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_kustomization_names_files_that_exist() -> None:
    (document,) = read("kustomization.yaml")
    assert [name for name in document["resources"] if not (FOLDER / name).is_file()] == []

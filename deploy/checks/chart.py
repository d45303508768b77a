"""Checks of the Helm chart that need no cluster: `make deploy-check` runs them and sums up what was and was not checked.

Renders each value set with Helm, then: Kubernetes' own schemas, the CRDs of KEDA, Strimzi and the Prometheus operator,
Checkov's policies, our own rules, the program's options, the program's topics, and values that must be refused. It runs in an
environment of its own (.build/deploy-venv); what needs the program asks it in the project's (options.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "tldr-stream"
BUILD = ROOT / ".build"
RENDERED = BUILD / "deploy" / "rendered"
CRDS = BUILD / "deploy" / "crds"
# The oldest version that Chart.yaml allows, and the newest whose schemas are at hand.
KUBERNETES = ("1.27", "1.37")

# Checkov's policies that we do not follow, and why.
NOT_FOLLOWED = {
    "CKV_K8S_11": "CPU limits: they throttle a worker that decodes in bursts, and requests reserve its cores",
    "CKV_K8S_15": "imagePullPolicy Always: the image is named by digest or version, and a restart must not need the registry",
    "CKV_K8S_21": "the default namespace: the release's namespace is given on Helm's command line",
    "CKV_K8S_43": "images by digest: image.digest does it; the other value sets show a version",
    "CKV_K8S_31": "seccomp RuntimeDefault: the locked-down value set names a profile of its own, which is stricter",
}

# What must be refused: one wrong value each, on top of the minimal set.
NONSENSE = {
    "a misspelt value": "worker.replica=3",
    "a negative number of workers": "worker.replicas=-1",
    "more workers than partitions": "worker.replicas=9",
    "a text for a number": "stream.partitions=many",
    "no partitions": "stream.partitions=0",
    "brokers without a port": "kafka.bootstrapServers=kafka",
    "an image called latest": "image.tag=latest",
    "half a digest": "image.digest=sha256:abc",
    "a ratio that is none": "stream.ratio=lots",
    "a rule that nobody knows": "stream.rule=best",
    "a rule and a ratio": "stream.rule=paper",
    "a root user": "security.runAsUser=0",
    "no seccomp profile": "security.seccompType=Unconfined",
    "a bundle outside its volume": "bundle.name=../etc",
    "a secret in the environment": "worker.env.PASSWORD.valueFrom.secretKeyRef.name=x",
    "an option that has a value of its own": "worker.options.seed=1",
    "no time to drain": "worker.terminationGracePeriodSeconds=1",
    "a pre-stop that takes all of it": "worker.preStopSleepSeconds=90",
    "a drain that its commits do not fit in": "worker.options.transaction-timeout-s=60",
    "a network policy that shuts the brokers out": "networkPolicy.enabled=true,kafka.port=9093",
    "more replicas in sync than there are": "topics.minInsyncReplicas=4",
    "Strimzi without a cluster": "topics.create=strimzi",
    "more parts of a snapshot than partitions": "snapshot.parts=9",
    "more KEDA workers than partitions": "keda.maxReplicas=9",
    "at least more KEDA workers than partitions": "keda.enabled=true,keda.minReplicas=9",
    "a size that is none": "worker.storage.size=big",
    "a session shorter than the brokers allow": "worker.sessionTimeoutSeconds=1",
    "no resources": "worker.resources=null",
    "a localhost profile without a name": "security.seccompType=Localhost",
    "new bundles for workers that are held to one": "bundle.name=first,recluster.enabled=true",
    "a schedule that is none": "snapshot.schedule=nightly",
}


class Report:
    """What was checked, what was not, and what is wrong."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.unchecked: list[str] = []
        self.wrong: list[str] = []


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BUILD / "bin" / "helm"), *arguments], capture_output=True, text=True, check=False)


def render(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The documents of each value set, also written below .build/deploy/rendered."""
    RENDERED.mkdir(parents=True, exist_ok=True)
    sets = {}
    for path in sorted((CHART / "ci").glob("*-values.yaml")):
        name = path.name.removesuffix("-values.yaml")
        for command in (("lint", "--strict", "--quiet"), ("template", "crawl", "--namespace", "tldr")):
            done = helm(command[0], *command[1:], str(CHART), "--values", str(path))
            if done.returncode:
                report.wrong.append(f"{name}: helm {command[0]}: {(done.stderr or done.stdout).strip()}")
        (RENDERED / f"{name}.yaml").write_text(done.stdout)
        sets[name] = [document for document in yaml.safe_load_all(done.stdout) if document]
    kinds = Counter(document["kind"] for documents in sets.values() for document in documents)
    report.checked.append(f"rendered and linted: {', '.join(sets)}; {kinds.total()} resources of {len(kinds)} kinds")
    return sets


def schemas(report: Report, sets: dict[str, list[dict[str, Any]]]) -> None:
    """Kubernetes' own schemas, unknown fields refused, and the CRDs for the rest."""
    crds = {kind: schema for path in sorted(CRDS.glob("*.yaml")) for kind, schema in crd_schemas(path)}
    native: Counter[str] = Counter()
    custom: Counter[str] = Counter()
    unknown: set[str] = set()
    for name, documents in sets.items():
        for document in documents:
            api, kind = document["apiVersion"], document["kind"]
            where = f"{name}: {kind} {document['metadata']['name']}"
            if "." not in api.split("/")[0] or api.split("/")[0].endswith(".k8s.io"):
                for version in KUBERNETES:
                    try:
                        kubernetes_validate.validate(document, version, strict=True)
                    except kubernetes_validate.ValidationError as error:
                        report.wrong.append(f"{where}, Kubernetes {version}: {error.message}")
                native[kind] += 1
            elif (api, kind) in crds:
                for error in jsonschema.Draft7Validator(crds[api, kind]).iter_errors(document):
                    report.wrong.append(f"{where}: {error.json_path}: {error.message}")
                custom[kind] += 1
            else:
                unknown.add(f"{api} {kind}")
    report.checked.append(f"Kubernetes {' and '.join(KUBERNETES)} schemas, strict: {counted(native)}")
    report.checked.append(f"CRD schemas, unknown fields refused: {counted(custom)}")
    report.unchecked += [f"{kind}: no CRD at hand" for kind in sorted(unknown)]


def counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def crd_schemas(path: Path) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for crd in yaml.safe_load_all(path.read_text()):
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            yield (f"{spec['group']}/{version['name']}", spec["names"]["kind"]), schema


def closed(schema: Any) -> Any:
    """A structural schema in which a field that is not described is an error: the API server would silently drop it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
    properties = out.get("properties")
    free = out.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in out
    if isinstance(properties, dict) and out.get("type") == "object" and not free:
        out["additionalProperties"] = False
    return out


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, pod spec) of every workload."""
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        if kind in ("StatefulSet", "Job"):
            yield kind, spec["template"]["spec"]
        elif kind == "CronJob":
            yield kind, spec["jobTemplate"]["spec"]["template"]["spec"]


def own_rules(report: Report, sets: dict[str, list[dict[str, Any]]]) -> None:
    """What the design promises and no policy set asks for."""
    seen = 0
    for name, documents in sets.items():
        for kind, pod in pods(documents):
            seen += 1
            where = f"{name}: {kind}"
            container = pod["containers"][0]
            for env in container["env"]:
                if "secretKeyRef" in json.dumps(env):
                    report.wrong.append(f"{where}: {env['name']} is a secret in the environment")
            if any("secret" in volume for volume in pod["volumes"]) != any(
                "properties" in mount["name"] for mount in container["volumeMounts"]
            ):
                report.wrong.append(f"{where}: secrets and mounts do not agree")
            if kind == "StatefulSet":
                probes = {
                    p: container[p]["httpGet"]["path"] for p in ("startupProbe", "livenessProbe", "readinessProbe")
                }
                if probes != {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}:
                    report.wrong.append(f"{where}: probes {probes}")
                if "$(POD_NAME)" not in container["args"]:
                    report.wrong.append(f"{where}: the instance id is not the pod's name")
                gpus = [v for k, v in container["resources"]["limits"].items() if k.startswith("nvidia.com/")]
                if gpus not in ([], [1]):
                    report.wrong.append(f"{where}: {gpus} GPUs")
        names = [(d["kind"], d["metadata"]["name"]) for d in documents]
        if len(names) != len(set(names)):
            report.wrong.append(f"{name}: two resources of one name")
        if any(len(resource) > 63 for kind, resource in names if kind != "KafkaTopic"):
            report.wrong.append(f"{name}: a name over 63 characters")
        for document in documents:
            for claim in document.get("spec", {}).get("volumeClaimTemplates", []):
                if claim["spec"]["accessModes"] != ["ReadWriteOnce"]:
                    report.wrong.append(f"{name}: a store's volume is not ReadWriteOnce")
    report.checked.append(f"own rules (secrets are files, probes, instance id, one GPU, ReadWriteOnce) on {seen} pods")


def policies(report: Report) -> None:
    """Checkov's Kubernetes policies on what was rendered."""
    done = subprocess.run(
        [str(BUILD / "deploy-venv" / "bin" / "checkov"), "--directory", ".", "--framework", "kubernetes",
         "--output", "json", "--quiet", "--compact", "--skip-download"],
        capture_output=True, text=True, check=False, cwd=RENDERED,
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)
        results, summary = found["results"], found["summary"]
    except (ValueError, KeyError, TypeError):
        report.wrong.append(f"checkov gave no answer: {done.stderr.strip()[-300:]}")
        return
    excused: Counter[str] = Counter()
    for failed in results["failed_checks"]:
        check, resource = failed["check_id"], failed["resource"]
        if check in NOT_FOLLOWED:
            excused[check] += 1
        else:
            report.wrong.append(f"{Path(failed['file_path']).stem}: {resource}: {check} {failed['check_name']}")
    report.checked.append(
        f"Checkov's Kubernetes policies: {summary['passed']} passed, {len(excused)} policies not followed "
        f"({', '.join(sorted(excused))})"
    )
    report.wrong += [
        f"chart.py excuses {check}, which nothing needs" for check in sorted(NOT_FOLLOWED.keys() - excused.keys())
    ]


def program(report: Report, sets: dict[str, list[dict[str, Any]]]) -> None:
    """Every command line and every configured option is one that the program has; topics are those that it makes."""
    asked = []
    for name, documents in sets.items():
        config = next(
            d["data"]["tldr-stream.toml"]
            for d in documents
            if d["kind"] == "ConfigMap" and "tldr-stream.toml" in d["data"]
        )
        topics = {d["spec"]["topicName"]: d["spec"] for d in documents if d["kind"] == "KafkaTopic"}
        for kind, pod in pods(documents):
            container = pod["containers"][0]
            asked.append({"where": f"{name}: {kind}", "args": container["args"], "config": config})
        if topics:
            asked.append({"where": f"{name}: KafkaTopic", "topics": topics})
    done = subprocess.run(
        [str(ROOT / ".venv" / "bin" / "python"), str(Path(__file__).parent / "options.py")],
        input=json.dumps(asked), capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        report.wrong.append(f"the program could not be asked: {done.stderr.strip()[-500:]}")
        return
    answer = json.loads(done.stdout)
    report.wrong += answer["wrong"]
    report.checked.append(answer["checked"])


def scripts(report: Report, sets: dict[str, list[dict[str, Any]]]) -> None:
    """What stands around the program in the Jobs, run with a program that does nothing but leave with a status."""
    jobs = {kind: pod["containers"][0] for kind, pod in pods(sets["gpu"]) if "command" in pod["containers"][0]}
    bootstrap = next(c for c in jobs.values() if c["name"] == "bootstrap")
    recluster = next(c for c in jobs.values() if c["name"] == "recluster")
    cases = 0
    for status, wanted in ((0, 0), (9, 0), (3, 3)):
        with tempfile.TemporaryDirectory() as folder:
            found, _ = run(recluster, Path(folder), status)
        cases += 1
        if found != wanted:
            report.wrong.append(f"recluster left with {status} and its Job with {found}, not {wanted}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, mark = folder / "bundle", folder / "bundle.announced"
        for what, status, wanted in (
            ("a bootstrap that fails", 2, (2, "bootstrap", False)),
            ("a bootstrap", 0, (0, "bootstrap", True)),
            ("one that was done before", 0, (0, "", True)),
            ("a bundle that was made and not announced", 0, (0, "bundle announce", True)),
        ):
            if what.startswith("a bundle"):
                mark.unlink()
                bundle.mkdir()
                (bundle / "manifest.json").touch()
            code, called = run(bootstrap, folder, status, BUNDLE=str(bundle))
            cases += 1
            if (
                (code, mark.exists()) != (wanted[0], wanted[2])
                or not called.startswith(wanted[1])
                or (called and not wanted[1])
            ):
                report.wrong.append(f"{what}: status {code}, called `{called}`, mark {mark.exists()}")
    report.checked.append(f"the scripts around recluster and bootstrap, in {cases} cases")


def run(container: dict[str, Any], folder: Path, status: int, **environment: str) -> tuple[int, str]:
    """The container's script with a stub for the program: its status, and what the program was called with."""
    calls = folder / "calls"
    calls.write_text("")
    stub = folder / "bin" / "tldr-stream"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexit {status}\n')
    stub.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]], check=False, capture_output=True,
        env={"PATH": f"{stub.parent}:{os.environ['PATH']}", **environment},
    )  # fmt: skip
    return done.returncode, calls.read_text().strip()


def nonsense(report: Report) -> None:
    minimal = str(CHART / "ci" / "minimal-values.yaml")
    for what, setting in NONSENSE.items():
        if helm("template", "crawl", str(CHART), "--values", minimal, "--set", setting).returncode == 0:
            report.wrong.append(f"{what} ({setting}) was not refused")
    report.checked.append(f"{len(NONSENSE)} kinds of nonsense refused")


def main() -> int:
    report = Report()
    sets = render(report)
    schemas(report, sets)
    own_rules(report, sets)
    policies(report)
    program(report, sets)
    scripts(report, sets)
    nonsense(report)
    report.unchecked.append("a real cluster: nothing was installed, scheduled, bound or scaled")
    for title, lines in (("checked", report.checked), ("not checked", report.unchecked), ("WRONG", report.wrong)):
        print(*(f"  {title}: {line}" for line in lines), sep="\n")
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())

"""Checks of the image and the compose file that need no container engine; `make deploy-check` runs them.

Lints the Dockerfile and install.sh, reads the compose file, and, with --install, does what the image's build does: copies what
the Dockerfile copies into a clean directory, runs install.sh there as the image's user, and lets what came of it work on a real
Kafka: as that user, without capabilities, on a read-only root file system (where it runs as root and may mount).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stream.broker import local_broker

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".build" / "deploy-venv" / "bin"
USER = 10001
INSTALL_TIMEOUT_S, RUN_TIMEOUT_S = 1500.0, 240.0
# Read-only root, the state alone writable, no capabilities: what the chart's pods get.
LOCKED = (
    'mount --bind "$1" "$1" && mount -o remount,ro,bind / && mount -t tmpfs tmpfs /tmp && shift && '
    f"exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --bounding-set=-all "
    '--inh-caps=-all -- "$@"'
)


class Report:
    def __init__(self) -> None:
        self.checked: list[str] = []
        self.unchecked: list[str] = []
        self.wrong: list[str] = []


def lint(report: Report) -> None:
    for tool, file in (("hadolint", "deploy/Dockerfile"), ("shellcheck", "deploy/install.sh")):
        done = subprocess.run([str(TOOLS / tool), file], capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            report.wrong.append(f"{tool}: {done.stdout.strip() or done.stderr.strip()}")
    report.checked.append("Dockerfile by hadolint, install.sh by shellcheck")


def dockerfile(report: Report) -> None:
    """What a linter does not know: who runs it, and that nothing is inside that must not be."""
    text = (DEPLOY / "Dockerfile").read_text()
    stages = {part.split()[2]: part for part in text.split("\nFROM ")[1:] if len(part.split()) > 2}
    for name in ("cpu", "gpu"):
        if f"USER {USER}:{USER}" not in stages[name]:
            report.wrong.append(f"Dockerfile: stage {name} does not run as {USER}")
    for copied in copies():
        if copied.split("/")[0] in ("bundles", "corpus", ".", "tests"):
            report.wrong.append(f"Dockerfile: copies {copied}")
        if not (ROOT / copied).exists():
            report.wrong.append(f"Dockerfile: copies {copied}, which is not there")
    for line in text.splitlines():
        if line.startswith("ARG BASE") and ("latest" in line or ":" not in line):
            report.wrong.append(f"Dockerfile: {line} names no version")
    report.checked.append(
        f"Dockerfile: user {USER} in both variants, bases by tag, {len(list(copies()))} sources, no bundle"
    )


def copies() -> Iterator[str]:
    """What the Dockerfile takes from the repository."""
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            yield from words[1:-1]


def compose(report: Report) -> None:
    """The compose specification's schema, and what it cannot know: that what is named exists, and what is open."""
    path = DEPLOY / "compose.yaml"
    program = "import sys, compose_spec; compose_spec.PyCompose.from_yaml(sys.stdin.read()).validate()"
    merged = yaml.safe_dump(yaml.safe_load(path.read_text()))  # the schema knows no YAML merges
    done = subprocess.run(
        [str(TOOLS / "python"), "-c", program], input=merged, capture_output=True, text=True, check=False
    )
    if done.returncode:
        report.wrong.append(f"compose.yaml: {done.stderr.strip().splitlines()[-1]}")
    services: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    asked = []
    for name, service in services.items():
        if ":" not in service["image"] or service["image"].endswith(":latest"):
            report.wrong.append(f"compose.yaml: {name}: {service['image']} names no version")
        if any(not port.startswith("127.0.0.1:") for port in service.get("ports", [])):
            report.wrong.append(f"compose.yaml: {name}: a port is open to the world")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".") and not (DEPLOY / source).resolve().is_dir():
                report.unchecked.append(f"compose.yaml: {name} mounts {source}, which is not there")
        if service["image"].startswith("tldr-stream:") and "command" in service:
            asked.append(
                {"where": f"compose.yaml: {name}", "args": service["command"], "config": 'topic = "raw-pairs"\n'}
            )
            if not service.get("read_only") or service.get("user") != f"{USER}:{USER}":
                report.wrong.append(f"compose.yaml: {name} is not locked down")
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "checks" / "options.py")],
        input=json.dumps(asked), capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    report.wrong += answer["wrong"]
    report.checked.append(f"compose.yaml by the compose specification; {len(services)} services; {answer['checked']}")


def install(report: Report) -> None:
    """The image's own steps in a clean directory, and what they made at work."""
    with tempfile.TemporaryDirectory(prefix="tldr-image-", dir="/var/tmp") as folder:  # /tmp is replaced below
        clean = Path(folder)
        for copied in copies():
            target = clean / "source" / copied
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / copied).is_dir():
                shutil.copytree(ROOT / copied, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / copied, target)
        cache = ROOT / ".build" / "deploy" / "pip-cache"
        for made in (cache, clean / "state", clean / "home"):
            made.mkdir(parents=True, exist_ok=True)
        privileged = os.geteuid() == 0
        if privileged:
            for path in (clean, cache):
                subprocess.run(["chown", "-R", f"{USER}:{USER}", str(path)], check=True)
        environment = {
            **{key: value for key, value in os.environ.items() if key.startswith("PIP_") or key == "SSL_CERT_FILE"},
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(clean / "home"),
            "PIP_CACHE_DIR": str(cache),
            "PYTHON": "/usr/bin/python3" if privileged else sys.executable,
        }
        drop = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--"] if privileged else []
        began = time.monotonic()
        done = subprocess.run(
            [*drop, str(clean / "source" / "deploy" / "install.sh"), str(clean / "source"), str(clean / "app"), "cpu"],
            env=environment, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S, cwd=clean,
        )  # fmt: skip
        if done.returncode:
            report.wrong.append(f"install.sh: {(done.stdout + done.stderr).strip()[-600:]}")
            return
        took = time.monotonic() - began
        shutil.rmtree(clean / "source")  # the image has only what was installed
        inside = [path.name for path in (clean / "app").rglob("*.safetensors")]
        if inside:
            report.wrong.append(f"the installed files hold weights: {inside[:3]}")
        size = int(
            subprocess.run(
                ["du", "-sm", str(clean / "app")], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
        version = subprocess.run(
            [str(clean / "app/bin/python"), "-V"], capture_output=True, text=True, check=True
        ).stdout.strip()
        report.checked.append(
            f"install.sh (cpu) as user {USER if privileged else os.geteuid()} in a clean directory: {took:.0f} s, "
            f"{size:,} MB, {version}"
        )
        at_work(report, clean, environment, privileged)


def at_work(report: Report, clean: Path, environment: dict[str, str], privileged: bool) -> None:
    """The installed program reduces a topic: ingest, worker, snapshot in two parts, verify."""
    state = clean / "state"
    environment = {**environment, "HOME": "/tmp", "MPLCONFIGDIR": "/tmp/matplotlib", "HF_HUB_OFFLINE": "1",  # noqa: S108
                   "XDG_STATE_HOME": str(state), "PYTHONDONTWRITEBYTECODE": "1", "TLDR_TOPIC": "raw-pairs"}  # fmt: skip
    with tempfile.TemporaryDirectory() as data, local_broker(Path(data) / "kafka") as broker:
        environment["TLDR_BOOTSTRAP_SERVERS"] = broker.bootstrap_servers
        steps = [
            ["topics", "--partitions", "2"],
            ["ingest", str(ROOT / "corpus" / "sample" / "sample-000000.tar")],
            ["bundle", "announce", str(ROOT / "bundles" / "sample")],
            [
                "consume",
                "--state-dir",
                f"{state}/worker",
                "--instance-id",
                "crawl-0",
                "--stop-at-end",
                "--metrics-port",
                "0",
            ],
            ["snapshot", f"{state}/snapshot", "--part", "0/2", "--scratch", f"{state}/scratch"],
            ["snapshot", f"{state}/snapshot", "--part", "1/2", "--scratch", f"{state}/scratch"],
            ["verify"],
        ]
        for step in steps:
            command = [str(clean / "app" / "bin" / "tldr-stream"), *step]
            if privileged:
                command = [
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                    "sh",
                    "-c",
                    LOCKED,
                    "sh",
                    str(state),
                    *command,
                ]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S, cwd="/"
            )
            if done.returncode:
                report.wrong.append(f"tldr-stream {shlex.join(step)}: {(done.stderr or done.stdout).strip()[-400:]}")
                return
    how = (
        f"as user {USER}, no capabilities, read-only root" if privileged else "as this user, root file system as it is"
    )
    report.checked.append(f"the installed program on a real Kafka ({how}): {', '.join(step[0] for step in steps)}")
    said = [" ".join(line.split()) for line in done.stdout.splitlines() if "missing" in line]
    report.checked.append(f"  verify said: {'; '.join(said)}")


def main() -> int:
    report = Report()
    lint(report)
    dockerfile(report)
    compose(report)
    if "--install" in sys.argv:
        install(report)
        report.unchecked.append("the GPU variant's installation (faiss-gpu), and the image's own Python 3.12")
    else:
        report.unchecked.append(
            "the image's install steps: `make deploy-check-install` runs them (several GB, minutes)"
        )
    report.unchecked.append("docker build and docker compose up: no container engine here")
    for title, lines in (("checked", report.checked), ("not checked", report.unchecked), ("WRONG", report.wrong)):
        for line in lines:
            print(f"  {title}: {line}")
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())

"""A right that Kafka's ACLs give, and the line that names the ACL to add where one is missing.

Must not know which command needs which right (stream/rights.py does).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Where nothing in the settings tells whom the broker takes us for.
UNKNOWN_PRINCIPAL = "User:YOUR-PRINCIPAL"
CERTIFICATE_PRINCIPAL = "User:SUBJECT-OF-YOUR-CERTIFICATE"


class Right(NamedTuple):
    """One operation on one resource, both by the names that kafka-acls.sh has for them."""

    operation: str
    resource: str
    name: str


def principal_of(settings: Mapping[str, str]) -> str:
    """Whom the broker takes a client with these librdkafka settings for."""
    protocol = settings.get("security.protocol", "plaintext").lower()
    if protocol == "plaintext":
        return "User:ANONYMOUS"
    if protocol == "ssl":
        # The broker may map the subject to another name (ssl.principal.mapping.rules), so that it is not read here.
        return CERTIFICATE_PRINCIPAL if _has_certificate(settings) else "User:ANONYMOUS"
    return f"User:{settings['sasl.username']}" if "sasl.username" in settings else UNKNOWN_PRINCIPAL


def _has_certificate(settings: Mapping[str, str]) -> bool:
    return any(key.startswith(("ssl.keystore", "ssl.certificate")) for key in settings)


def missing_line(bootstrap_servers: str, principal: str, rights: Iterable[Right]) -> str:
    """What is missing and the commands that add it, one for each resource, ready to be pasted."""
    by_resource: dict[tuple[str, str], list[str]] = {}
    for right in dict.fromkeys(rights):
        by_resource.setdefault((right.resource, right.name), []).append(right.operation)
    said = [f"{', '.join(ops)} on {resource} {name}" for (resource, name), ops in by_resource.items()]
    commands = []
    for (resource, name), operations in by_resource.items():
        words = ["kafka-acls.sh", "--bootstrap-server", bootstrap_servers, "--add", "--allow-principal", principal]
        for operation in operations:
            words += ["--operation", operation]
        commands.append(f"`{shlex.join([*words, f'--{resource}', name])}`")
    return f"{principal} has no right to {'; '.join(said)}: an administrator adds it with {' and '.join(commands)}"

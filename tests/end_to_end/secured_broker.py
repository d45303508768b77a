"""A local Kafka that lets nobody in without TLS, and nobody do anything without an ACL.

Three doors: SASL_SSL with SCRAM-SHA-512, SSL with client certificates, and PLAINTEXT for the stand itself, a super user. The
certificates are made by the JDK's keytool.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

from stream.acl import Right
from stream.broker import LocalBroker, free_port
from stream.kafka import Connection
from tests.end_to_end.worker_process import until

# Nothing else in a log or a topic looks like these, so that grepping for them proves something.
PASSWORD = "scram-jK7pQ2xW9zR4"
STORE_PASSWORD = "store-vN3mT8yB5cL6"
REAUTHENTICATE_MS = 2500  # KIP-368: so often a client has to say again who it is
ROUNDS = 4096  # the fewest that Kafka allows

KINDS = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
}


class Authority:
    """A certificate authority of our own. `certificate` is what clients and servers trust."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._store, self.certificate = folder, folder / "authority.p12", folder / "authority.pem"
        _keytool("genkeypair", self._store, "-alias", "authority", *_subject("authority"), "-ext", "bc:c")
        _keytool("exportcert", self._store, "-rfc", "-alias", "authority", "-file", str(self.certificate))

    def issue(self, name: str, *more: str) -> Path:
        """A key store (PKCS #12) with a key and a certificate for CN=`name`."""
        store = self.folder / f"{name}.p12"
        shutil.copy(self._store, store)
        _keytool("genkeypair", store, "-alias", name, *_subject(name), "-signer", "authority", *more)
        _keytool("delete", store, "-alias", "authority")
        return store

    def trust_store(self) -> Path:
        store = self.folder / "trust.p12"
        _keytool("importcert", store, "-noprompt", "-alias", "authority", "-file", str(self.certificate))
        return store


@dataclass
class SecuredBroker:
    """The running server, who may come in, and what they may do."""

    server: LocalBroker
    authority: Authority
    scram_port: int
    tls_port: int

    @functools.cached_property
    def everything(self) -> Connection:
        """The stand's own door, behind which everything is allowed."""
        return Connection(self.server.bootstrap_servers)

    def over_scram(self, user: str, *, password: str = PASSWORD, **more: str) -> Connection:
        return Connection(
            f"127.0.0.1:{self.scram_port}",
            {
                "security.protocol": "SASL_SSL",
                "ssl.ca.location": str(self.authority.certificate),
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": user,
                "sasl.password": password,
                **{key.replace("_", "."): value for key, value in more.items()},
            },
        )

    def over_tls(self, store: Path | None, **more: str) -> Connection:
        mine = {} if store is None else {"ssl.keystore.location": str(store), "ssl.keystore.password": STORE_PASSWORD}
        return Connection(
            f"127.0.0.1:{self.tls_port}",
            {
                "security.protocol": "SSL",
                "ssl.ca.location": str(self.authority.certificate),
                **mine,
                **{key.replace("_", "."): value for key, value in more.items()},
            },
        )

    def add_user(self, name: str) -> None:
        """A SCRAM user with the stand's password."""
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, ROUNDS)
        asked = UserScramCredentialUpsertion(name, info, PASSWORD.encode())
        for done in self.everything.admin.alter_user_scram_credentials([asked]).values():
            done.result()

    def remove_user(self, name: str) -> None:
        asked = UserScramCredentialDeletion(name, ScramMechanism.SCRAM_SHA_512)
        for done in self.everything.admin.alter_user_scram_credentials([asked]).values():
            done.result()

    def grant(self, user: str, rights: Collection[Right]) -> None:
        """Returns when the broker knows of it."""
        bindings = [AclBinding(*_parts(user, right)) for right in dict.fromkeys(rights)]
        for done in self.everything.admin.create_acls(bindings).values():
            done.result()
        wanted = [AclBindingFilter(*_parts(user, right)) for right in rights]
        until(lambda: all(map(self._known, wanted)), "the broker knows the ACLs")

    def take_away(self, user: str, right: Right | None = None) -> None:
        """Returns when the broker has forgotten it. right None: all that the user has."""
        everything = (
            ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{user}", None, AclOperation.ANY,
            AclPermissionType.ANY,
        )  # fmt: skip
        wanted = AclBindingFilter(*(everything if right is None else _parts(user, right)))
        assert self.everything.admin.delete_acls([wanted])[wanted].result()
        until(lambda: not self._known(wanted), "the broker has forgotten the ACLs")

    def _known(self, acl: AclBindingFilter) -> bool:
        return bool(self.everything.admin.describe_acls(acl).result())


@contextmanager
def secured_broker(folder: Path) -> Iterator[SecuredBroker]:
    """A running one, with an authority of its own."""
    authority = Authority(folder / "authority")
    plain, scram, tls, controller = (free_port() for _ in range(4))
    doors = f"PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{scram},SSL://127.0.0.1:{tls}"
    server = LocalBroker(
        folder / "kafka",
        plain,
        properties={
            "listeners": f"{doors},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": doors,
            "listener.security.protocol.map": ("PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT"),
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "false",
            "super.users": "User:ANONYMOUS",  # whoever comes through PLAINTEXT: the server itself, and the stand
            "listener.name.sasl_ssl.connections.max.reauth.ms": str(REAUTHENTICATE_MS),
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.keystore.type": "PKCS12",
            "ssl.keystore.location": str(authority.issue("broker", "-ext", "san=ip:127.0.0.1")),
            "ssl.keystore.password": STORE_PASSWORD,
            "ssl.truststore.type": "PKCS12",
            "ssl.truststore.location": str(authority.trust_store()),
            "ssl.truststore.password": STORE_PASSWORD,
        },
    )
    server.start()
    try:
        yield SecuredBroker(server, authority, scram, tls)
    finally:
        server.kill()


def properties_file(connection: Connection, file: Path) -> Path:
    """The connection's settings as a user keeps them: in a file that nobody else reads."""
    file.touch(0o600)
    file.write_text("".join(f"{key}={value}\n" for key, value in connection.settings.items()))
    return file


def _parts(user: str, right: Right) -> tuple[object, ...]:
    return (
        KINDS[right.resource], right.name, ResourcePatternType.LITERAL, f"User:{user}", "*",
        AclOperation[re.sub("(?<!^)(?=[A-Z])", "_", right.operation).upper()], AclPermissionType.ALLOW,
    )  # fmt: skip


def _subject(name: str) -> list[str]:
    return ["-dname", f"CN={name}", "-keyalg", "EC", "-validity", "3650"]


def _keytool(what: str, store: Path, *arguments: str) -> None:
    # The JVM's start is most of what a call takes.
    words = ["keytool", "-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", f"-{what}", "-keystore", str(store)]
    subprocess.run(
        [*words, "-storepass", STORE_PASSWORD, "-storetype", "PKCS12", *arguments], check=True, capture_output=True
    )

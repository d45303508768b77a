"""The line for a missing right: whom the broker takes us for, and commands that a shell takes as they stand."""

from __future__ import annotations

import re
import shlex

import pytest

from stream.acl import Right, missing_line, principal_of


@pytest.mark.parametrize(
    ("settings", "principal"),
    [
        ({}, "User:ANONYMOUS"),
        ({"security.protocol": "ssl"}, "User:ANONYMOUS"),
        ({"security.protocol": "SSL", "ssl.keystore.location": "mine.p12"}, "User:SUBJECT-OF-YOUR-CERTIFICATE"),
        ({"security.protocol": "SASL_SSL", "sasl.username": "reducer"}, "User:reducer"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "User:YOUR-PRINCIPAL"),
    ],
)
def test_the_principal_is_the_one_that_the_settings_tell(settings: dict[str, str], principal: str) -> None:
    assert principal_of(settings) == principal


def test_operations_on_one_resource_are_one_command_and_each_resource_has_its_own() -> None:
    rights = [Right("Read", "topic", "a"), Right("Write", "topic", "a"), Right("Read", "group", "g"),
              Right("Read", "topic", "a")]  # fmt: skip

    line = missing_line("host:1", "User:me", rights)

    assert line.startswith("User:me has no right to Read, Write on topic a; Read on group g: ")
    assert re.findall("`([^`]*)`", line) == [
        "kafka-acls.sh --bootstrap-server host:1 --add --allow-principal User:me --operation Read --operation Write --topic a",
        "kafka-acls.sh --bootstrap-server host:1 --add --allow-principal User:me --operation Read --group g",
    ]


def test_a_name_with_blanks_and_quotes_reaches_the_command_whole() -> None:
    principal = "User:CN=O'Hara, O=Some Company"

    line = missing_line("host:1", principal, [Right("Read", "topic", "a")])

    (command,) = re.findall("`([^`]*)`", line)
    assert principal in shlex.split(command)

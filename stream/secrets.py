"""What is a secret: names of settings and parts of URLs that must stand in no process list, log or message."""

from __future__ import annotations

import contextlib
import re
from urllib.parse import urlsplit

# librdkafka's: sasl.password, ssl.key.password, ssl.key.pem, ssl.keystore.password, sasl.oauthbearer.client.secret,
# sasl.oauthbearer.config (may hold one), sasl.oauthbearer.assertion.private.key.passphrase and .pem, …
_SECRET = re.compile(r"password|passphrase|secret|key[._]pem|oauthbearer\.config|jaas|user\.info")


def is_secret(setting: str) -> bool:
    """Whether the value of a Kafka setting of this name must not be shown."""
    return _SECRET.search(setting) is not None


def has_password(url: str) -> bool:
    """Whether one of several URLs (with commas between them) carries a password."""
    for part in url.split(","):
        with contextlib.suppress(ValueError):
            if urlsplit(part.strip()).password is not None:
                return True
    return False

"""A small HTTP server that speaks the part of the Schema Registry's REST API which Confluent's client asks for."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RegistryServer(ThreadingHTTPServer):
    """Schemas by number and subjects by name, in memory; `user` as user:password where it wants credentials."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[str, list[int]] = {}
        self.user: str | None = None
        self.failing = 0  # answers 500 so many times

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, schema: Any, kind: str = "AVRO") -> int:
        number = len(self.schemas) + 1
        self.schemas[number] = {"schema": json.dumps(schema), "schemaType": kind}
        return number


@contextlib.contextmanager
def registry_server() -> Iterator[RegistryServer]:
    server = RegistryServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: RegistryServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if not self._may():
            return
        if parts == ["schemas", "types"]:
            self._answer(200, ["AVRO", "JSON"])
        elif parts[:2] == ["schemas", "ids"] and int(parts[2]) in self.server.schemas:
            self._answer(200, self.server.schemas[int(parts[2])])
        else:
            self._answer(404, {"error_code": 40403, "message": "Schema not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        subject = self.path.partition("?")[0].strip("/").split("/")[1]
        if not self._may():
            return
        versions = self.server.subjects.setdefault(subject, [])
        for number in versions:
            if self.server.schemas[number]["schema"] == body["schema"]:
                self._answer(200, {"id": number, "subject": subject, "version": 1, **body})
                return
        if versions and "incompatible" in body["schema"]:
            self._answer(409, {"error_code": 409, "message": "Schema being registered is incompatible"})
            return
        number = self.server.add(json.loads(body["schema"]))
        versions.append(number)
        self._answer(200, {"id": number})

    def _may(self) -> bool:
        if self.server.failing:
            self.server.failing -= 1
            self._answer(500, {"error_code": 50001, "message": "Error in the backend datastore"})
            return False
        user = self.server.user
        if user is None or self.headers.get("Authorization") == "Basic " + base64.b64encode(user.encode()).decode():
            return True
        self._answer(401, {"error_code": 40101, "message": "Unauthorized"})
        return False

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

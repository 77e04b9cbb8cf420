"""A Hugging Face hub of our own on the loopback address: repositories in memory, and the few calls that its package
makes to fetch a file and to send a commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """Files by repository and name; every commit goes to `main`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Calls)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Calls(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append(format % args)

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(sent)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def do_GET(self) -> None:
        """OWNER/NAME/resolve/REVISION/FILE; api/models/OWNER/NAME/revision/REVISION, which earlier packages ask before a
        commit."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and (repository := "/".join(parts[2:4])) in self.server.repositories:
            return self._answer(200, {"id": repository, "sha": COMMIT, "xetEnabled": False})
        owner, name, what, revision, *file = parts
        files = self.server.repositories.get(f"{owner}/{name}")
        if what != "resolve" or files is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._answer(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        content = files.get("/".join(file))
        if content is None:
            return self._answer(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            )
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer hf_of_the_test":
            return self._answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, {})
            return self._answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        repository, call = "/".join(parts[2:4]), parts[4]
        if call == "preupload":
            files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.repositories[repository][value["path"]] = base64.b64decode(value["content"])
        return self._answer(
            200,
            {"success": True, "commitUrl": f"{self.server.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT},
        )


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """One that answers, for a while."""
    hub = LocalHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def in_cache(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """Lay files out as the package keeps what it fetched of a model's main branch."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha1(content, usedforsecurity=False).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        pointer = folder / "snapshots" / COMMIT / name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.symlink_to(blob)

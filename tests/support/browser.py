"""A page in a headless Chromium: files served on the loopback address, what was sent counted, and one answer taken back."""

from __future__ import annotations

import json
import mimetypes
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".html": "text/html"}


def chromium() -> str:
    """Where it is; skips where it is not."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser to open a page in: none of {', '.join(NAMES)} is installed")
    return found


class Site:
    """Folders and texts by path, served on the loopback address.

    Attributes:
        sent: bytes by path, without headers.
        answer: what the page posted to /answer.
    """

    def __init__(self, folders: Mapping[str, Path], texts: Mapping[str, str]) -> None:
        self.sent: Counter[str] = Counter()
        self.answer: Any = None
        self.answered = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                data = site.read(path, folders, texts)
                self.send_response(404 if data is None else 200)
                suffix = Path(path).suffix
                kind = TYPES.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")
                site.sent[path] += len(data or b"")

            def do_POST(self) -> None:
                site.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(204)
                self.end_headers()
                site.answered.set()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @staticmethod
    def read(path: str, folders: Mapping[str, Path], texts: Mapping[str, str]) -> bytes | None:
        if path in texts:
            return texts[path].encode()
        for prefix, folder in sorted(folders.items(), key=lambda item: -len(item[0])):
            file = folder / path.removeprefix(prefix)
            if path.startswith(prefix) and file.is_file() and file.resolve().is_relative_to(folder.resolve()):
                return file.read_bytes()
        return None

    @contextmanager
    def served(self) -> Iterator[str]:
        """While it can be reached; gives its address."""
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self.address
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def opened(self, path: str, profile: Path) -> Any:
        """What a page posts to /answer when it is opened in a browser with an empty profile."""
        with self.served() as address, open(profile.with_suffix(".log"), "wb") as log:
            browser = subprocess.Popen(
                [chromium(), *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0", address + path],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                deadline = time.monotonic() + PATIENCE
                while not self.answered.wait(0.2):
                    said = profile.with_suffix(".log").read_text(errors="replace")
                    assert browser.poll() is None, f"the browser ended:\n{said}"
                    assert time.monotonic() < deadline, f"no answer; {dict(self.sent)}\n{said}"
            finally:
                browser.terminate()
                browser.wait()
        return self.answer

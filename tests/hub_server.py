"""The HTTP interface of the Hugging Face Hub on a loopback port, for tests: datasets that are read.

It answers as the hub does, which decides what its client makes of it: names of revisions, trees in
pages, large files by a redirect to another host, ranges, and errors with the hub's headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3  # files a page of a tree
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Serves `datasets[name][revision]`; what it is asked for is in `requests`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.datasets: dict[str, dict[str, Files]] = {}
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.cut: dict[str, int] = {}  # bytes of a file after which the connection breaks, once
        self.cut_then_down: set[str] = set()  # of these, files that can't be had after that
        self.down: set[str] = set()  # files that can't be had
        self.replaced: dict[str, bytes] = {}  # files whose content is not what the tree says
        self.renamed: dict[str, str] = {}  # paths in trees that are not what they should be
        self.is_hub = True  # else it answers all with a page, as a proxy that wants a login
        self.stalled: threading.Event | None = None  # set once a file that then hangs is half sent
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path holds `part`, in order."""
        return [headers for path, headers in self.requests if part in path]


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".parquet")


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((unquote(url.path), headers))
        if not self.server.is_hub:
            return self.send_body(b"<html>Log in to the network</html>")
        if url.path == "/api/agent-harnesses":  # the client would keep it in the home directory
            return self.send_json({"standardEnvVars": [], "harnesses": {}})
        if match := re.fullmatch(r"/blobs/(\w+)", url.path):
            return self.send_file(match[1])
        match = re.fullmatch(
            r"(?:/api)?/datasets/(.+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", url.path
        )
        name, action, revision = match[1], match[2], unquote(match[3] or "main")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            message = "Invalid credentials in Authorization header"
            return self.fail(401, {"X-Error-Message": message})
        if name not in self.server.datasets:
            # The hub's 401 has no such code; its client adds it, but not without TLS.
            return self.fail(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        revisions = self.server.datasets[name]
        by_commit = {commit_of(files): files for files in revisions.values()}
        files = by_commit.get(revision, revisions.get(revision))
        if files is None:
            return self.fail(404, {"X-Error-Code": "RevisionNotFound"})
        if action == "resolve":
            return self.resolve(name, files, unquote(match[4]), token)
        if action == "tree":
            return self.send_tree(files, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        siblings = [{"rfilename": path} for path in files]
        return self.send_json({"id": name, "sha": commit_of(files), "siblings": siblings})

    def send_tree(self, files: Files, start: int):
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "folder"}]
        for path, content in sorted(files.items()):
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            path = self.server.renamed.get(path, path)
            entry = {"type": "file", "oid": blob, "size": len(content), "path": path}
            if is_large(path):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        more = {}
        if start + PAGE < len(entries):
            following = f"{self.server.endpoint}{urlsplit(self.path).path}?cursor={start + PAGE}"
            more = {"Link": f'<{following}&recursive=True>; rel="next"'}
        self.send_json(entries[start : start + PAGE], more)

    def resolve(self, name: str, files: Files, path: str, token: str):
        if name in self.server.gated and not token:
            return self.fail(401, {"X-Error-Code": "GatedRepo"})
        if name in self.server.gated and token == "stranger":
            return self.fail(403, {"X-Error-Code": "GatedRepo"})
        if path in self.server.down:
            return self.fail(503, {})
        if not is_large(path):
            return self.send_file(path, files[path])
        self.send_response(302)  # to another host, which must not see the token
        target = f"http://localhost:{self.server.server_port}/blobs/"
        self.send_header("Location", target + hashlib.sha256(files[path]).hexdigest())
        self.send_header("X-Repo-Commit", commit_of(files))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str, content: bytes | None = None):
        path = name
        if content is None:
            everything = [
                f for revisions in self.server.datasets.values() for f in revisions.values()
            ]
            path, content = next(
                (path, content)
                for files in everything
                for path, content in files.items()
                if hashlib.sha256(content).hexdigest() == name
            )
        content = self.server.replaced.get(path, content)
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.server.stalled:
            self.wfile.write(content[start : len(content) // 2])
            self.server.stalled.set()
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # returns when the client is gone
            return
        self.wfile.write(content[start : self.server.cut.pop(path, len(content))])
        self.server.down |= self.server.cut_then_down & {path}

    def send_json(self, values: object, headers: dict[str, str] | None = None):
        self.send_body(json.dumps(values).encode(), headers)

    def send_body(self, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for key, value in {"Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub without datasets, until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

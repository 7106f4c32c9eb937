"""A server on the loopback address that speaks the Hub's HTTP API to the real `huggingface_hub` client.

Repositories live in memory. Uploads take both ways of the Hub: small files inside the commit, weights by Git LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "org"
LARGE = (".safetensors", ".bin", ".pt", ".onnx")


@dataclass
class Repository:
    """The commits of one repository: `{sha: {path: content}}`, the newest last."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        content = hashlib.sha1(f"{len(self.commits)}".encode())
        for path in sorted(files):
            content.update(path.encode() + b"\0" + hashlib.sha1(files[path]).digest())
        self.commits[content.hexdigest()] = files
        return content.hexdigest()

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def resolve(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


class LocalHub:
    """Serve repositories at `url` while the context lasts.

    Args:
        requests: what was asked for, in order: `"GET /org/name/resolve/main/config.json"`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path) -> str:
        """Put the files of a folder into a repository and return the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.repositories.setdefault(name, Repository()).commit(files)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process whose Hub is this one, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            # Its own protocol, which needs Xet's servers; without it the client falls back to Git LFS.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, action in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match:
                return action(self, body, *match.groups())
        self._missing("EntryNotFound", path)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, document: Any, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, what: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": f"{what} not found"})

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._missing("RepoNotFound", name)
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self._missing("RevisionNotFound", revision)
            return None
        return sha, repository.commits[sha]

    def whoami(self, body: bytes) -> None:
        self._json({"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository()
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name}, 409 if known else 200)

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self._files(name, revision)
        if found:
            sha, files = found
            self._json({"id": name, "sha": sha, "private": False, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found:
            self._json([_entry(path, content) for path, content in found[1].items()])

    def paths(self, body: bytes, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found:
            asked = json.loads(body)["paths"]
            self._json([_entry(path, content) for path, content in found[1].items() if path in asked])

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.objects
            objects.append({**item, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, b"wrong sha256")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if not found:
            return
        files = dict(found[1])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.hub.repositories[name].commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            return self._missing("EntryNotFound", path)
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part and int(part[1]) < len(content):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        self._send(200, content, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 134}
    return entry


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"/api/whoami-v2": _Handler.whoami,
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate,
    rf"/api/models/{NAME}": _Handler.info,
    rf"/api/models/{NAME}/revision/([^/]+)": _Handler.info,
    rf"/api/models/{NAME}/tree/([^/]+).*": _Handler.tree,
    rf"/api/models/{NAME}/paths-info/([^/]+)": _Handler.paths,
    rf"/api/models/{NAME}/preupload/([^/]+)": _Handler.preupload,
    rf"/api/models/{NAME}/commit/([^/]+)": _Handler.commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"/lfs/(\w+)": _Handler.lfs_put,
    rf"/{NAME}/resolve/([^/]+)/(.+)": _Handler.resolve,
}

"""A server on the loopback address that speaks the Hub's HTTP API to the real `huggingface_hub` client.

Repositories live in memory. Uploads take both ways of the Hub: small files inside the commit, weights by Git LFS, in
one part or in several. Xet, the client's third way, moves the same weights through servers of its own before the same
commit, and is switched off (`environment`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "org"
WRITER, READER = "hf_local", "hf_reader"
LARGE = (".safetensors", ".bin", ".pt", ".onnx")
# Few, so that a small model has several pages and parts; the Hub's own are 1,000 entries and some 5 GB.
TREE_PAGE = 10
PART = 2**16


@dataclass
class Repository:
    """The commits of one repository, `{sha: {path: content}}`, the newest last, and its branches and tags.

    Args:
        hidden: private, and not of the reader.
        gated: everybody sees that it is there, and the writer alone its files.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    hidden: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        content = hashlib.sha1(f"{len(self.commits)}".encode())
        for path in sorted(files):
            content.update(path.encode() + b"\0" + hashlib.sha1(files[path]).digest())
        self.refs[branch] = content.hexdigest()
        self.commits[content.hexdigest()] = files
        self.messages.append(message)
        return content.hexdigest()

    @property
    def head(self) -> str:
        return self.refs["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision) or self.tags.get(revision)
        return sha or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What befalls the next `times` requests that match, `"PUT /lfs/.*"`: an answer, or where it is 0, a cut.

    Args:
        after: bytes of the body, of the request or else of the answer, that get through before the cut.
    """

    request: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "on purpose"}'
    after: int = 0


class LocalHub:
    """Serve repositories at `url` while the context lasts.

    Args:
        requests: what was asked for, in order: `"GET /org/name/resolve/main/config.json"`.
        faults: what goes wrong, each used up by the requests that it befalls.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, *, under: str = "") -> str:
        """Put the files of a folder into a repository, or into a folder of it, and return the commit."""
        repository = self.repositories.setdefault(name, Repository())
        files = repository.files if repository.commits else {}
        paths = [path for path in folder.rglob("*") if path.is_file()]
        added = {under + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return repository.commit({**files, **added})

    def fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.fullmatch(fault.request, request):
                fault.times -= 1
                return fault
        return None

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process whose Hub is this one, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": WRITER,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    # Of a client that says less than it announced.
    timeout = 30
    cut_after: int | None = None

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
        self.query = parse_qs(urlsplit(self.path).query)
        request = f"{method} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        self.cut_after = fault.after if fault and not fault.status else None
        if self.cut_after is not None and method in ("POST", "PUT"):
            self.rfile.read(min(self.cut_after, int(self.headers.get("Content-Length") or self.cut_after)))
            return self._cut()
        body = self._body()
        if fault and fault.status:
            return self._send(fault.status, fault.body, fault.headers)
        for pattern, action in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match:
                return action(self, body, *match.groups())
        self._refuse(404, "EntryNotFound", path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut(self) -> None:
        self.close_connection = True
        # At once, where a mere end of this request would wait for what the client still sends.
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.cut_after])
            if self.cut_after is not None:
                self._cut()

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self._send(status, b"", headers)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _known(self, *, write: bool = False) -> bool:
        """Return whether the user may go on, else answer as the Hub does."""
        if self._token not in (WRITER, READER):
            self._refuse(401, "", "Invalid username or password.")
        elif write and self._token != WRITER:
            self._refuse(403, "", "You don't have the rights to write to this repository")
        else:
            return True
        return False

    def _repository(self, name: str, *, write: bool = False, files: bool = False) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.hidden and self._token != WRITER):
            # An anonymous user is not told which. Over HTTPS the client takes any 401 so, over HTTP by the code alone.
            self._refuse(404 if self._token in (WRITER, READER) else 401, "RepoNotFound", "Repository not found")
        elif files and repository.gated and self._token != WRITER:
            status = 403 if self._token == READER else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
        elif not write or self._known(write=True):
            return repository
        return None

    def _files(self, name: str, revision: str, *, files: bool = False) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name, files=files)
        if repository is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repository.commits[sha]

    def whoami(self, body: bytes) -> None:
        if self._known():
            self._json(
                {
                    "name": OWNER,
                    "type": "user",
                    "orgs": [],
                    "auth": {"accessToken": {"role": "write" if self._token == WRITER else "read"}},
                }
            )

    def create(self, body: bytes) -> None:
        if not self._known(write=True):
            return
        asked = json.loads(body)
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{kind}{asked.get('organization') or OWNER}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository(hidden=asked.get("visibility") == "private")
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial")
        known_as = name.removeprefix(kind)
        self._json({"url": f"{self.hub.url}/{name}", "id": known_as, "name": known_as}, 409 if known else 200)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        if branch in repository.refs:
            return self._refuse(409, "", "Reference already exists")
        repository.refs[branch] = repository.resolve(json.loads(body).get("startingPoint") or "main") or ""
        self._json({})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is not None:
            repository.tags[json.loads(body)["tag"]] = repository.resolve(revision) or ""
            self._json({})

    def refs(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            kinds = {"branches": ("heads", repository.refs), "tags": ("tags", repository.tags)}
            self._json(
                {
                    kind: [
                        {"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": sha} for ref, sha in refs.items()
                    ]
                    for kind, (place, refs) in kinds.items()
                }
                | {"converts": []}
            )

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self._files(name, revision)
        if found:
            sha, files = found
            private = self.hub.repositories[name].hidden
            siblings = [{"rfilename": path} for path in files]
            known_as = name.removeprefix("datasets/")
            self._json({"id": known_as, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
        found = self._files(name, revision, files=True)
        if not found:
            return
        inside = f"{folder}/" if folder else ""
        entries = {path: _entry(path, content) for path, content in found[1].items() if path.startswith(inside)}
        if not entries:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = dict(_beneath(path, inside, entry) for path, entry in entries.items())
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + TREE_PAGE < len(entries):
            query = "&".join(f"{key}={values[0]}" for key, values in self.query.items() if key != "cursor")
            address = f"{self.hub.url}{urlsplit(self.path).path}?{query}&cursor={start + TREE_PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        self._json(list(entries.values())[start : start + TREE_PAGE], headers=headers)

    def paths(self, body: bytes, name: str, revision: str) -> None:
        found = self._files(name, revision, files=True)
        if found:
            asked = parse_qs(body.decode())["paths"]
            self._json([_entry(path, content) for path, content in found[1].items() if path in asked])

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        found = self._files(name, revision) if repository is not None else None
        if not found:
            return
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            entry = _entry(file["path"], found[1][file["path"]]) if file["path"] in found[1] else {}
            # By this the client passes over what has not changed.
            oid = entry.get("lfs", entry).get("oid")
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            href, header = f"{self.hub.url}/lfs/{item['oid']}", {}
            if item["size"] > PART:
                parts = range(1, -(-item["size"] // PART) + 1)
                header = {"chunk_size": str(PART), **{f"{part:05}": f"{href}/{part}" for part in parts}}
            actions = {"upload": {"href": href, "header": header}, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str, part: str | None = None) -> None:
        if part:
            self.hub.parts[oid, int(part)] = body
            return self._send(200, b"", {"ETag": hashlib.sha256(body).hexdigest()})
        if self.command == "POST":
            body = b"".join(self.hub.parts[oid, entry["partNumber"]] for entry in json.loads(body)["parts"])
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, b"wrong sha256")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def lfs_verify(self, body: bytes) -> None:
        item = json.loads(body)
        self._send(200 if len(self.hub.objects.get(item["oid"], b"")) == item["size"] else 404, b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        found = self._files(name, revision) if repository is not None else None
        if repository is None or not found:
            return
        header, *entries = (json.loads(line) for line in body.decode().splitlines())
        if header["value"].get("parentCommit", found[0]) != found[0]:
            return self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(found[1])
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif files.pop(value["path"], None) is None:
                return self._refuse(404, "EntryNotFound", "A file with this name doesn't exist")
        number = sum(branch.startswith("refs/pr/") for branch in repository.refs) + 1
        branch = f"refs/pr/{number}" if self.query.get("create_pr") == ["1"] else revision
        sha = repository.commit(files, branch, header["value"]["summary"])
        page = f"{self.hub.url}/{name}"
        self._json(
            {
                "commitUrl": f"{page}/commit/{sha}",
                "commitOid": sha,
                "success": True,
                **({"pullRequestUrl": f"{page}/discussions/{number}"} if branch != revision else {}),
            }
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision, files=True)
        if not found:
            return
        sha, files = found
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part and int(part[1]) < len(content):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        self._send(200, content, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 134}
    return entry


def _beneath(path: str, inside: str, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a file of a folder by its path, and one of its subfolders as the subfolder."""
    name, below, _ = path.removeprefix(inside).partition("/")
    folder = {"type": "directory", "path": inside + name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    return (inside + name, folder) if below else (path, entry)


# That of a data set begins with the kind, as its page does.
NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
# A branch or a pull request: the client quotes it, and `_route` takes that back.
REVISION = r"(refs/pr/\d+|[^/]+)"
ROUTES = {
    r"/api/whoami-v2": _Handler.whoami,
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate,
    rf"/api/(?:models/)?{NAME}": _Handler.info,
    rf"/api/(?:models/)?{NAME}/refs": _Handler.refs,
    rf"/api/(?:models/)?{NAME}/branch/(.+)": _Handler.branch,
    rf"/api/(?:models/)?{NAME}/tag/{REVISION}": _Handler.tag,
    rf"/api/(?:models/)?{NAME}/revision/{REVISION}": _Handler.info,
    rf"/api/(?:models/)?{NAME}/tree/{REVISION}(?:/(.+))?": _Handler.tree,
    rf"/api/(?:models/)?{NAME}/paths-info/{REVISION}": _Handler.paths,
    rf"/api/(?:models/)?{NAME}/preupload/{REVISION}": _Handler.preupload,
    rf"/api/(?:models/)?{NAME}/commit/{REVISION}": _Handler.commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"/lfs/verify": _Handler.lfs_verify,
    r"/lfs/(\w+)(?:/(\d+))?": _Handler.lfs_put,
    rf"/{NAME}/resolve/{REVISION}/(.+)": _Handler.resolve,
}

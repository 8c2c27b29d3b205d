"""A Hub-compatible server on loopback, for tests: the real client pushes and loads over HTTP.

What it is: repos, commits, branches, tags, LFS upload and ranged download in memory, in the shapes
that huggingface_hub reads. What it is not: a git server, or Xet (set HF_HUB_DISABLE_XET=1).

    server = start_server(); os.environ["HF_ENDPOINT"] = server.url; ...; server.stop()
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_loopback"
USER, ORGS = "tester", ("org",)
DATE = "2026-01-01T00:00:00.000Z"
FOLDERS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet", "*.png", "*.jpg", "*.webp", "*.zip")
LFS_SIZE = 10 * 2**20
RESOLVE = re.compile(r"/(datasets/|spaces/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)")
Files = dict[str, "Blob"]


@dataclass(frozen=True)
class Blob:
    """One version of a file; `oid` is git's, `sha256` keys the content."""

    oid: str
    size: int
    sha256: str
    lfs: bool


@dataclass
class Repo:
    """Commits by oid (files, parent, title), and what branches and tags point to."""

    kind: str
    id: str
    commits: dict[str, tuple[Files, str | None, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error in the Hub's form: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


def git_oid(data: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """Repos and contents; every method raises HubError as the Hub would answer."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def repo(self, kind: str, name: str) -> Repo:
        if (kind, name) not in self.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repos[kind, name]

    def commit_of(self, repo: Repo, revision: str) -> str:
        name = unquote(revision).removeprefix("refs/heads/")
        for known in (repo.branches, repo.tags):
            if name in known:
                return known[name]
        found = [oid for oid in repo.commits if len(name) >= 7 and oid.startswith(name)]
        if len(found) != 1:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return found[0]

    def commit(self, repo: Repo, branch: str, files: Files, title: str) -> str:
        parent = repo.branches.get(branch)
        listed = sorted((path, blob.oid) for path, blob in files.items())
        seed = json.dumps([repo.kind, repo.id, parent, title, len(repo.commits), listed])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[oid] = (files, parent, title)
        repo.branches[branch] = oid
        return oid

    def put(self, data: bytes, lfs: bool = False) -> Blob:
        sha = hashlib.sha256(data).hexdigest()
        self.contents[sha] = data
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n"
        )
        return Blob(git_oid(pointer.encode() if lfs else data), len(data), sha, lfs)

    def card(self, files: Files) -> dict[str, Any]:
        if "README.md" not in files:
            return {}
        text = self.contents[files["README.md"].sha256].decode()
        return front_matter(text) or {}

    def apply(self, files: Files, lines: list[dict[str, Any]], head: str) -> tuple[Files, str]:
        files, title = dict(files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise HubError(412, "", "A commit has happened since.")
            elif key == "file":
                files[value["path"]] = self.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.contents:
                    raise HubError(400, "", f"no such LFS object: {value['path']}")
                files[value["path"]] = self.put(self.contents[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {p: b for p, b in files.items() if not p.startswith(prefix)}
        return files, title


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML head of a card, None where there is none. Raises yaml.YAMLError."""
    found = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    return yaml.safe_load(found.group(1)) if found else None


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as tree and paths-info list it."""
    row: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.lfs:
        row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return row


def folder_entry(path: str) -> dict[str, Any]:
    """A folder as tree and paths-info list it."""
    return {"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0}


class Handlers:
    """One coroutine an endpoint."""

    def __init__(self, store: Store) -> None:
        self.store, self.url = store, ""

    def allowed(self, request: Request, write: bool = True) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if token != TOKEN and (token or write):
            raise HubError(401, "", "Invalid username or password.")

    def at(self, request: Request) -> tuple[Repo, str, Files]:
        p = request.path_params
        repo = self.store.repo(p["kind"], f"{p['owner']}/{p['name']}")
        oid = self.store.commit_of(repo, p.get("rev", "main"))
        return repo, oid, repo.commits[oid][0]

    async def whoami(self, request: Request) -> Response:
        self.allowed(request)
        orgs = [{"type": "org", "id": o, "name": o, "roleInOrg": "admin"} for o in ORGS]
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        return JSONResponse({"type": "user", "id": "0", "name": USER, "orgs": orgs, "auth": auth})

    async def create(self, request: Request) -> Response:
        self.allowed(request)
        asked = await request.json()
        kind = (asked.get("type") or "model") + "s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.url}/{FOLDERS[kind]}{name}", "name": name, "id": "0"}
        with self.store.lock:
            if (kind, name) in self.store.repos:
                return JSONResponse({**answer, "error": "You already created this repo"}, 409)
            repo = self.store.repos[kind, name] = Repo(kind, name)
            attributes = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS)
            files = {".gitattributes": self.store.put(attributes.encode())}
            self.store.commit(repo, "main", files, "initial commit")
        return JSONResponse(answer)

    async def delete(self, request: Request) -> Response:
        self.allowed(request)
        asked = await request.json()
        kind = (asked.get("type") or "model") + "s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self.store.repo(kind, name)
        del self.store.repos[kind, name]
        return JSONResponse({})

    async def validate(self, request: Request) -> Response:
        try:
            head = front_matter((await request.json())["content"])
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        wrong = [] if isinstance(head, dict | None) else [{"message": "metadata is no mapping"}]
        return JSONResponse({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    async def info(self, request: Request) -> Response:
        self.allowed(request, write=False)
        repo, oid, files = self.at(request)
        card = self.store.card(files)
        row = {
            "_id": "0",
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": oid,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or []),
            "cardData": card,
            "siblings": [{"rfilename": p, "size": b.size} for p, b in sorted(files.items())],
        }
        if repo.kind == "spaces":
            hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
            row |= {"sdk": card.get("sdk"), "runtime": {"stage": "RUNNING", "hardware": hardware}}
        wanted = request.query_params.getlist("expand")
        if wanted:
            row = {k: v for k, v in row.items() if k in {*wanted, "id", "_id"}}
        return JSONResponse(row)

    async def tree(self, request: Request) -> Response:
        raw = request.scope["raw_path"].decode().split("?")[0]  # a revision may hold %2F
        revision, _, path = raw.split("/tree/", 1)[1].partition("/")
        request.path_params["rev"] = revision
        _, oid, files = self.at(request)
        base = unquote(path).strip("/")
        deep = request.query_params.get("recursive", "").lower() == "true"
        start = base + "/" if base else ""
        inside = {p: b for p, b in sorted(files.items()) if p.startswith(start)}
        if base and not inside:
            raise HubError(404, "EntryNotFound", f"{base} does not exist")
        folders = {
            start + "/".join(parts[: i + 1])
            for p in inside
            for parts in [p[len(start) :].split("/")]
            for i in range(len(parts) - 1 if deep else min(1, len(parts) - 1))
        }
        shown = [entry(p, b) for p, b in inside.items() if deep or "/" not in p[len(start) :]]
        listed = [folder_entry(f) for f in sorted(folders)] + shown
        return JSONResponse(listed, headers={"X-Repo-Commit": oid})

    async def paths_info(self, request: Request) -> Response:
        _, _, files = self.at(request)
        if "json" in request.headers.get("content-type", ""):
            paths = (await request.json())["paths"]
        else:
            paths = (await request.form()).getlist("paths")
        found = []
        for path in (p.strip("/") for p in paths):
            if path in files:
                found.append(entry(path, files[path]))
            elif any(p.startswith(path + "/") for p in files):
                found.append(folder_entry(path))
        return JSONResponse(found)

    async def refs(self, request: Request) -> Response:
        repo, _, _ = self.at(request)

        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid}
                for n, oid in names.items()
            ]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        return JSONResponse({"branches": branches, "tags": tags, "converts": []})

    async def commits(self, request: Request) -> Response:
        repo, oid, _ = self.at(request)
        listed, current = [], oid
        while current:
            _, parent, title = repo.commits[current]
            authors = [{"user": USER}]
            listed.append({"id": current, "title": title, "message": "", "date": DATE})
            listed[-1]["authors"] = authors
            current = parent
        return JSONResponse(listed)

    async def branch(self, request: Request) -> Response:
        self.allowed(request)
        p = request.path_params
        repo = self.store.repo(p["kind"], f"{p['owner']}/{p['name']}")
        name = unquote(p["rev"])
        if name in repo.branches:
            return JSONResponse({"error": "exists"}, 409)
        asked = json.loads(await request.body() or b"{}")
        repo.branches[name] = self.store.commit_of(repo, asked.get("startingPoint") or "main")
        return JSONResponse({})

    async def tag(self, request: Request) -> Response:
        self.allowed(request)
        repo, oid, _ = self.at(request)
        name = (await request.json())["tag"]
        if name in repo.tags:
            return JSONResponse({"error": "exists"}, 409)
        repo.tags[name] = oid
        return JSONResponse({})

    async def preupload(self, request: Request) -> Response:
        self.allowed(request)
        _, _, files = self.at(request)
        answers = []
        for file in (await request.json())["files"]:
            path = file["path"]
            binary = b"\0" in base64.b64decode(file.get("sample") or "")
            named = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            large = named or binary or file["size"] > LFS_SIZE
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": unchanged(files.get(path)),
                }
            )
        return JSONResponse({"files": answers})

    async def commit(self, request: Request) -> Response:
        self.allowed(request)
        lines = [json.loads(x) for x in (await request.body()).splitlines() if x.strip()]
        with self.store.lock:
            repo, head, files = self.at(request)
            branch = unquote(request.path_params["rev"])
            oid = self.store.commit(repo, branch, *self.store.apply(files, lines, head))
        url = f"{self.url}/{FOLDERS[repo.kind]}{repo.id}/commit/{oid}"
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url})

    async def lfs_batch(self, request: Request) -> Response:
        self.allowed(request)
        objects = []
        for wanted in (await request.json())["objects"]:
            row: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.store.contents:
                put, verify = f"{self.url}/_lfs/{wanted['oid']}", f"{self.url}/_lfs/verify"
                row["actions"] = {
                    "upload": {"href": put, "header": {}},
                    "verify": {"href": verify, "header": {}},
                }
            objects.append(row)
        answer = {"transfer": "basic", "objects": objects}
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    async def lfs_put(self, request: Request) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]:
            return JSONResponse({"error": "wrong sha256"}, 400)
        self.store.contents[request.path_params["oid"]] = data
        return Response()

    async def lfs_verify(self, request: Request) -> Response:
        asked = await request.json()
        held = self.store.contents.get(asked["oid"])
        return JSONResponse({}, 200 if held is not None and len(held) == asked["size"] else 404)

    async def resolve(self, request: Request) -> Response:
        self.allowed(request, write=False)
        raw = request.scope["raw_path"].decode().split("?")[0]  # a revision may hold %2F
        found = RESOLVE.fullmatch(raw)
        if not found:
            raise HubError(404, "", "not found")
        kind, name, revision, path = found.groups()
        repo = self.store.repo((kind or "models/").rstrip("/"), unquote(name))
        oid = self.store.commit_of(repo, revision)
        blob = repo.commits[oid][0].get(unquote(path))
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", oid)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return ranged(request, self.store.contents[blob.sha256], headers)

    async def empty(self, request: Request) -> Response:
        return JSONResponse({})


def unchanged(blob: Blob | None) -> str | None:
    """What the client compares its file with, to skip it: sha256 of LFS files, else git's name."""
    return blob and (blob.sha256 if blob.lfs else blob.oid)


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """All of the data, or the part that the request's Range header asks for."""
    status, size = 200, len(data)
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked:
        first, last = asked.groups()
        low = int(first) if first else max(0, size - int(last))
        high = min(int(last), size - 1) if first and last else size - 1
        if low >= size:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {low}-{high}/{size}"
        data, status = data[low : high + 1], 206
    headers["Content-Length"] = str(len(data))
    body = b"" if request.method == "HEAD" else data
    return Response(body, status, headers, media_type="application/octet-stream")


def application(handlers: Handlers) -> Starlette:
    """Every route of the server."""
    h, repo, post = handlers, "/api/{kind}/{owner}/{name}", ["POST"]
    routes = [
        Route("/api/whoami-v2", h.whoami),
        Route("/api/repos/create", h.create, methods=post),
        Route("/api/repos/delete", h.delete, methods=["DELETE"]),
        Route("/api/validate-yaml", h.validate, methods=post),
        Route("/api/agent-harnesses", h.empty),
        Route("/api/telemetry/{rest:path}", h.empty, methods=["GET", "HEAD"]),
        Route(repo, h.info),
        Route(repo + "/revision/{rev:path}", h.info),
        Route(repo + "/tree/{rest:path}", h.tree),
        Route(repo + "/paths-info/{rev:path}", h.paths_info, methods=post),
        Route(repo + "/refs", h.refs),
        Route(repo + "/commits/{rev:path}", h.commits),
        Route(repo + "/branch/{rev:path}", h.branch, methods=post),
        Route(repo + "/tag/{rev:path}", h.tag, methods=post),
        Route(repo + "/preupload/{rev:path}", h.preupload, methods=post),
        Route(repo + "/commit/{rev:path}", h.commit, methods=post),
        Route("/_lfs/verify", h.lfs_verify, methods=post),
        Route("/_lfs/{oid}", h.lfs_put, methods=["PUT"]),
        Route("/{rest:path}.git/info/lfs/objects/batch", h.lfs_batch, methods=post),
        Route("/{rest:path}", h.resolve, methods=["GET", "HEAD"]),
    ]

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HubError)
        return JSONResponse({"error": error.message}, error.status, headers=error.headers)

    return Starlette(routes=routes, exception_handlers={HubError: answer})


class HubServer:
    """A running server: `.url`, `.token`, `.store`; `.stop()` ends it."""

    token = TOKEN

    def __init__(self) -> None:
        self.store = Store()
        handlers = Handlers(self.store)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        self.url = handlers.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(application(handlers), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        run = {"sockets": [listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop serving; idempotent."""
        self._server.should_exit = True
        self._thread.join(5)


def start_server() -> HubServer:
    """A server on a free loopback port, ready to be asked."""
    return HubServer()

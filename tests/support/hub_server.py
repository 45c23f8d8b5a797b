"""A small Hub on 127.0.0.1 for unmodified clients: repositories, commits, branches, tags, LFS, authorisation.

`with HubServer() as hub:` serves at `hub.url`. `hub.log` keeps every request, `hub.fail(...)` has coming ones go wrong.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITE, READ, OTHER = "hf_write_8a1f0c", "hf_read_77be12", "hf_other_5d2e9b"  # what clients send
USERS = {WRITE: ("ada", True), READ: ("ada", False), OTHER: ("bob", True)}  # token: name, may write


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    lfs: set[str]


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    committing: threading.Lock = field(default_factory=threading.Lock)
    refused: threading.Event = field(default_factory=threading.Event)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    method: str
    path: str
    times: int
    act: Callable[["_Handler"], None]


class Refused(Exception):  # noqa: N818
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message or code


class HubServer:
    """commit_seconds: the longest that a commit takes; it ends once another one was refused, as on the Hub."""

    def __init__(self, commit_seconds: float = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.commit_seconds = commit_seconds
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # What tests look at

    def head(self, repo_id: str, revision: str = "main") -> Commit:
        return self.repos[repo_id].branches[revision][-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        files = self.head(repo_id, revision).files
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        return [commit.message for commit in self.repos[repo_id].branches[revision][1:]]

    def requests(self, method: str, path: str) -> list[Request]:
        return [request for request in self.log if request.method == method and re.search(path, request.path)]

    def make(self, repo_id: str, private: bool = False, **files: bytes) -> None:
        """A repository that is there already."""
        self.repos[repo_id] = Repo(private, {"main": [_commit([], "initial commit", {".gitattributes": b""}, set())]})
        if files:
            self.repos[repo_id].branches["main"].append(_commit([], "earlier", files, set()))

    # What goes wrong

    def fail(self, method: str, path: str, how: Callable[["_Handler"], None], times: int = 1) -> None:
        """Have the next `times` requests whose path has a match for `path` end in `how`."""
        self.faults.append(Fault(method, path, times, how))


def status(number: int, code: str = "", message: str = "injected") -> Callable[["_Handler"], None]:
    return lambda handler: handler.refuse(Refused(number, code, message))


def cut(handler: "_Handler") -> None:
    """Read half of what the client sends, and hang up."""
    handler.rfile.read(int(handler.headers.get("Content-Length", 0)) // 2)
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silent(seconds: float) -> Callable[["_Handler"], None]:
    """Say nothing for so long, and then hang up."""

    def wait(handler: "_Handler") -> None:
        time.sleep(seconds)
        cut(handler)

    return wait


def slow(seconds: float) -> Callable[["_Handler"], None]:
    """Answer as always, but so much later."""

    def wait(handler: "_Handler") -> None:
        time.sleep(seconds)
        handler.serve()

    return wait


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits for 40 ms
    hub: HubServer
    log: list[Request]
    body: Any

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # a client that went away
            super().handle()

    def any_method(self) -> None:
        self.route, self.body, self.log = urlsplit(self.path).path, None, self.hub.log
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.route):
                fault.times -= 1
                self.hub.log.append(Request(self.command, self.route, dict(self.headers), b""))
                return fault.act(self)
        return self.serve()

    do_GET = do_HEAD = do_POST = do_PUT = any_method  # noqa: N815

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.log is not self.hub.log:  # a request of the test before, whose client may be gone
            self.close_connection = True
            return None
        self.log.append(Request(self.command, self.path, dict(self.headers), self.body))
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method:
                    return answer(self, **{name: unquote(part or "") for name, part in match.groupdict().items()})
            raise Refused(404, "NoSuchEndpoint")
        except Refused as refused:
            self.refuse(refused)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, refused: Refused) -> None:
        if self.body is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {"X_Error_Code": refused.code, "X_Error_Message": refused.message}
        content = json.dumps({"error": refused.message}).encode()
        self.send(refused.status, content, **{name: value for name, value in headers.items() if value})

    # Who asks, and for what

    def user(self) -> tuple[str, bool] | None:
        """Name, and whether the token may write; None for nobody."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, message="Invalid user token.")
        return USERS.get(token)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        mine = user is not None and user[0] == repo_id.split("/")[0]
        if repo is None or (repo.private and not mine):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (user and mine and user[1]):
            raise Refused(403, message="You don't have the rights to write to this repository")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        if revision in repo.branches:
            return repo.branches[revision][-1]
        oid = repo.tags.get(revision, revision)
        for commits in repo.branches.values():
            for commit in commits:
                if commit.oid == oid:
                    return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # Answers

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        self.json({"type": "user", "name": user[0], "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        repo_id = f"{asked.get('organization') or user[0]}/{asked['name']}"
        if repo_id in self.hub.repos and user[0] == repo_id.split("/")[0]:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        if user[0] != repo_id.split("/")[0] or not user[1]:
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        self.hub.make(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.json({"url": f"{self.hub.url}/{repo_id}"})

    def validate_yaml(self) -> None:
        errors = _yaml_errors(json.loads(self.body)["content"])
        self.json({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        commit = self.commit(repo, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        tags = [*_head(commit.files.get("README.md", b"").decode()).get("tags", [])]
        facts = {"id": repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": tags}
        self.json({**facts, "library_name": None, "downloads": 0, "likes": 0})

    def refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        branches = [(name, f"refs/heads/{name}", commits[-1].oid) for name, commits in repo.branches.items()]
        tags = [(name, f"refs/tags/{name}", oid) for name, oid in repo.tags.items()]
        kinds = {"branches": branches, "tags": tags, "converts": []}
        self.json({k: [{"name": n, "ref": r, "targetCommit": o} for n, r, o in refs] for k, refs in kinds.items()})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        commit = self.commit(self.repo(repo_id), revision)
        names = [name for name in commit.files if not folder or name.startswith(f"{folder}/")]
        self.json([_entry(name, commit) for name in names])

    def branch(self, repo_id: str, name: str) -> None:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refused(409, message="Reference already exists")
        start = (json.loads(self.body or b"{}") or {}).get("startingPoint") or "main"
        repo.branches[name] = [self.commit(repo, start)]
        self.json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, name = self.repo(repo_id, write=True), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Refused(409, message="Tag reference exists already")
        repo.tags[name] = self.commit(repo, revision).oid
        self.json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self.commit(self.repo(repo_id, write=True), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["path"].endswith(".safetensors")
            oid = _entry(file["path"], commit) if file["path"] in commit.files else {}
            oid = oid.get("lfs", oid).get("oid")
            mode = "lfs" if binary and file["size"] else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs-store/{wanted['oid']}", "header": {}}
            missing = {} if wanted["oid"] in self.hub.blobs else {"actions": {"upload": upload}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **missing})
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="The content is not what was announced")
        self.hub.blobs[oid] = self.body
        self.send(200, b"")

    def new_commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not repo.committing.acquire(blocking=False):
            repo.refused.set()
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        try:
            repo.refused.wait(self.hub.commit_seconds)
            before = repo.branches[revision][-1]
            files, lfs, message = dict(before.files), set(before.lfs), ""
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                match line["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in self.hub.blobs:
                            raise Refused(400, message=f"{value['path']} was not uploaded")
                        files[value["path"]] = self.hub.blobs[value["oid"]]
                        lfs.add(value["path"])
                    case "deletedFile":
                        if files.pop(value["path"], None) is None:
                            raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                    case other:
                        raise Refused(400, message=f"{other} is unknown here")
            commit = _commit(repo.branches[revision], message, files, lfs)
            repo.branches[revision].append(commit)
        finally:
            repo.committing.release()
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        self.json({"commitOid": commit.oid, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit = self.commit(self.repo(repo_id), revision)
        if name not in commit.files:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content, entry = commit.files[name], _entry(name, commit)
        oid = entry.get("lfs", entry)["oid"]
        headers = {"ETag": f'"{oid}"', "X_Repo_Commit": commit.oid}
        if "lfs" in entry:
            headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], **headers)
        return self.send(200, content, **headers)


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_ID}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", _Handler.tree),
    ("POST", rf"/api/models/{_ID}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_ID}/tag/(?P<revision>.+)", _Handler.tag),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.new_commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-store/(?P<oid>\w+)", _Handler.lfs_put),
    ("GET HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]


def _commit(before: list[Commit], message: str, files: dict[str, bytes], lfs: set[str]) -> Commit:
    seed = repr((len(before), message, time.time_ns())).encode()
    return Commit(hashlib.sha1(seed).hexdigest(), message, files, lfs)


def _entry(name: str, commit: Commit) -> dict[str, Any]:
    content = commit.files[name]
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name in commit.lfs:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _head(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def _yaml_errors(card: str) -> list[str]:
    """What the Hub would refuse in a card's head."""
    try:
        head = _head(card)
    except yaml.YAMLError as error:
        return [f"the head is no YAML: {error}"]
    if not isinstance(head, dict):
        return ["the head is no mapping"]
    errors = []
    for name in ("tags", "datasets", "metrics"):
        if not all(isinstance(item, str) for item in head.get(name, [])):
            errors.append(f'"{name}" must be an array of strings')
    for model in head.get("model-index", []):
        if not (isinstance(model.get("name"), str) and isinstance(model.get("results"), list)):
            errors.append('"model-index" needs names and results')
            continue
        for result in model["results"]:
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"task.type" is required')
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                errors.append('"dataset.type" and "dataset.name" are required')
            if not result.get("metrics") or not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append('"metrics" need types and values')
    return errors

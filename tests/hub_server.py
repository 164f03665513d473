"""A small Hub on this machine for the real client: repositories, commits, LFS, branches, pull requests.

No package that is kept does it (PyPI's mirrors only read), so here are the endpoints that the client uses to
push and to load. What the Hub refuses, this refuses: users without a token, repositories of others, LFS
objects that were not uploaded, metadata of model cards that its documentation calls invalid.

`python tests/hub_server.py` runs one until it is interrupted; what it prints leads clients there.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
TOKEN = "hf_secretOfTheTests"
_LFS_SUFFIXES = (".safetensors", ".model", ".bin")
_DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
_REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: str):
        super().__init__(message)
        self.status, self.code = status, code
        self.content = {"error": message, **content}


@dataclass
class Repository:
    """Files by commit, commits by branch; commit messages in their order."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        state = [len(self.commits), message, *(git_oid(data) for data in files.values())]
        oid = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubServer(ThreadingHTTPServer):
    """The server and all that it stores.

    Attributes:
        repositories: by id.
        objects: LFS objects by SHA-256.
        faults: functions of (method, path), tried for each request: what one returns, a status or "drop",
            happens instead of an answer.
        requests: (method, path) of all.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the address stays, which clients keep for as long as their process lives."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Callable[[str, str], int | str | None]] = []
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_repository(self, repo: str, *, private: bool, files: dict[str, bytes] | None = None) -> None:
        """Make or replace a repository with one commit."""
        self.repositories[repo] = Repository(private)
        self.repositories[repo].commit({".gitattributes": b"", **(files or {})}, "main", "initial commit")

    def fail(self, method: str, part: str, what: int | str, times: int) -> None:
        """Let the first requests of a method whose path holds a text fail."""
        left = [times]

        def fault(found: str, path: str) -> int | str | None:
            if found != method or part not in path or not left[0]:
                return None
            left[0] -= 1
            return what

        self.faults.append(fault)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.server.requests.append((self.command, parts.path))
        fault = next((what for f in self.server.faults if (what := f(self.command, parts.path))), None)
        if fault == "drop":
            # Half of what was announced is read, so that the client is cut off while it sends.
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        self._body = self._read_body()
        try:
            if isinstance(fault, int):
                raise Refused(fault, "fault of the test")
            for method, pattern, handle in _ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if self.command in method.split() and found:
                    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                    groups = {name: unquote(value) for name, value in found.groupdict().items()}
                    return handle(self, query, **groups)
            raise Refused(404, f"no such endpoint: {self.command} {parts.path}")
        except Refused as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send(refusal.status, json.dumps(refusal.content).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        return USER if header else None

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        user = self._user()
        found = self.server.repositories.get(repo)
        if found is None or (found.private and user != repo.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo.split("/")[0]:
            raise Refused(403, f"You don't have the rights to write to {repo}")
        return found

    def whoami(self, query: dict[str, str]) -> None:
        if self._user() is None:
            raise Refused(401, "Invalid username or password.")
        self._json({"type": "user", "name": USER, "orgs": []})

    def create_repo(self, query: dict[str, str]) -> None:
        wanted = json.loads(self._body)
        owner = wanted.get("organization") or self._user()
        if self._user() is None or owner != USER:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{wanted['name']}"
        if repo in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{repo}")
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.server.add_repository(repo, private=bool(private))
        self._json({"url": f"{self.server.url}/{repo}"})

    def create_branch(self, query: dict[str, str], repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[revision] = repository.resolve("main")
        self._json({})

    def validate_card(self, query: dict[str, str]) -> None:
        problems = card_problems(json.loads(self._body)["content"])
        answer = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self._send(400 if problems else 200, json.dumps(answer).encode())

    def model_info(self, query: dict[str, str], repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        oid = repository.resolve(revision)
        names = [{"rfilename": name} for name in repository.commits[oid]]
        self._json({"id": repo, "private": repository.private, "sha": oid, "siblings": names, "tags": []})

    def tree(self, query: dict[str, str], repo: str, revision: str, folder: str = "") -> None:
        repository = self._repository(repo)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        files = {name: data for name, data in repository.files(revision).items() if name.startswith(prefix)}
        if prefix and not files:
            raise Refused(404, f"{prefix} does not exist", "EntryNotFound")
        self._json([self._entry(repository, name, data) for name, data in files.items()])

    def _entry(self, repository: Repository, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if name in repository.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return entry

    def preupload(self, query: dict[str, str], repo: str, revision: str) -> None:
        repository = self._repository(repo, write="create_pr" not in query)
        files = repository.files(revision)
        answers = []
        for file in json.loads(self._body)["files"]:
            name, mode = file["path"], "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular"
            answer = {"path": name, "uploadMode": mode, "shouldIgnore": False}
            if name in files:
                data = files[name]
                answer["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else git_oid(data)
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, query: dict[str, str], repo: str) -> None:
        self._repository(repo)
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, query: dict[str, str], oid: str) -> None:
        if hashlib.sha256(self._body).hexdigest() != oid:
            raise Refused(400, "the object is damaged")
        self.server.objects[oid] = self._body
        self._send(200)

    def commit(self, query: dict[str, str], repo: str, revision: str) -> None:
        as_pr = "create_pr" in query
        repository = self._repository(repo, write=not as_pr)
        parent = repository.resolve(revision)
        files = dict(repository.commits[parent])
        message = ""
        for line in self._body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
                repository.lfs.add(value["path"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        branch = f"refs/pr/{len(repository.commits)}" if as_pr else revision
        oid = repository.commit(files, branch, message)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}
        number = branch.rpartition("/")[2]
        pr_url = f"{self.server.url}/{repo}/discussions/{number}" if as_pr else None
        self._json({**answer, "pullRequestUrl": pr_url})

    def resolve(self, query: dict[str, str], repo: str, revision: str, file: str) -> None:
        repository = self._repository(repo)
        oid = repository.resolve(revision)
        headers = {"X-Repo-Commit": oid}
        if file not in repository.commits[oid]:
            return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        data = repository.commits[oid][file]
        headers["ETag"] = f'"{git_oid(data)}"'
        if file in repository.lfs:
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        self._send(200, data, headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", rf"/api/models/{_REPO}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(?P<folder>(/.*)?)", _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/branch/{_REVISION}", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_upload),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_problems(text: str) -> list[str]:
    """What the Hub's documentation of model cards' metadata would have otherwise."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    problems = []
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not _REPO_ID.fullmatch(base):
            problems.append(f"base_model {base!r} is no model id")
    if data.get("base_model_relation", "quantized") not in ("adapter", "finetune", "merge", "quantized"):
        problems.append("base_model_relation is none of the known ones")
    if data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
        problems.append("license 'other' needs license_name and license_link")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not _DATASET_TYPE.fullmatch(result["dataset"]["type"]):
                problems.append(f"dataset.type {result['dataset']['type']!r} fails to match the pattern")
            for metric in result["metrics"]:
                if not isinstance(metric["type"], str) or not isinstance(metric["value"], int | float):
                    problems.append("a metric needs a type and a value")
    return problems


if __name__ == "__main__":
    server = HubServer()
    print(f"export HF_ENDPOINT={server.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass

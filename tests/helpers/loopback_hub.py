"""A Hub on the loopback address: the endpoints that huggingface_hub calls to read and to write models."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
"""The only token that may write, or read what is private or gated."""


@dataclass
class Repo:
    """Commits of a repository: files by path for every commit, and the commit of every branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        """Adds a commit that changes `files` and keeps the others; returns its name."""
        whole = {**(self.files(branch) or {}), **files}
        seed = repr((len(self.commits), message, sorted(whole))).encode()
        name = hashlib.sha1(seed).hexdigest()
        self.commits[name], self.branches[branch] = whole, name
        self.messages.append(message)
        return name


class Hub(ThreadingHTTPServer):
    """The server; tests read and change `repos`, and read `requests`, "METHOD path" of each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.broken: str | None = None
        """A pattern of paths that are answered with 507, which is not tried again."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, folder: Path, **kind: bool) -> str:
        """Adds a repository with the files of a folder; returns the commit."""
        self.repos.setdefault(repo, Repo(**kind))
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return self.repos[repo].commit(files, "made by a test")

    def fetched(self) -> set[str]:
        """Returns the names of the files whose contents were read."""
        return {line.rpartition("/")[2] for line in self.requests if re.match(r"GET /[^/]+/[^/]+/resolve/", line)}

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Returns the variables with which a process talks to this server alone, and caches in `home`."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"} | more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.broken and re.search(self.server.broken, path):
            return self._answer(507, {"error": "out of order"})
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, f"_{method}")(**match.groupdict())
        return self._answer(404, {"error": f"no such address: {path}"})

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _readable(self, repo: str, revision: str, contents: bool = False) -> tuple[str, dict[str, bytes]] | None:
        """Returns commit and files of a revision; answers and returns None where it may not be read."""
        found = self.server.repos.get(repo)
        if found is None or (found.private and not self._may_write):
            self._answer(
                404 if self._may_write else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
        elif found.gated and contents and not self._may_write:
            self._answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        elif (files := found.files(revision)) is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        else:
            return found.branches.get(revision, revision), files
        return None

    def _info(self, repo: str, revision: str = "main") -> None:
        if found := self._readable(repo, revision):
            siblings = [{"rfilename": path} for path in found[1]]
            self._answer(200, {"id": repo, "sha": found[0], "siblings": siblings, "private": False, "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        if found := self._readable(repo, revision):
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in found[1].items()
            ]
            self._answer(200, rows)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._readable(repo, revision, contents=True)) is None:
            return
        commit, files = found
        if path not in files:
            return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self._answer(200, files[path], ETag=f'"{_oid(files[path])}"', X_Repo_Commit=commit)

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may_write:
            return self._answer(401, {"error": "Invalid username or password."})
        if repo in self.server.repos:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
            )
        self.server.repos[repo] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        self.server.repos[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._answer(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def _branch(self, repo: str, branch: str) -> None:
        found = self.server.repos[repo]
        if branch in found.branches:
            return self._answer(409, {"error": "Reference already exists"})
        found.branches[branch] = found.branches["main"]
        self._answer(200, {})

    def _validate(self) -> None:
        """Refuses a card whose metadata the Hub would refuse: the fields that this package writes."""
        text = json.loads(self.body)["content"]
        data = yaml.safe_load(text.split("---\n")[1])
        wrong = [f'"{key}" is no text' for key in ("library_name", "license") if not isinstance(data.get(key, ""), str)]
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"]):
                    wrong += [f'"dataset.type" is no id: {result["dataset"]["type"]}']
                wrong += [f"no value in {metric}" for metric in result["metrics"] if "value" not in metric]
        self._answer(400 if wrong else 200, {"errors": [{"message": each} for each in wrong], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        if self._readable(repo, revision):
            files = json.loads(self.body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in files
            ]
            self._answer(200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})

    def _batch(self, repo: str) -> None:
        objects = [
            {"oid": each["oid"], "size": each["size"], "authenticated": True}
            | {"actions": {"upload": {"href": f"{self.server.url}/uploads/{each['oid']}", "header": {}}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "another content"})
        self.server.uploads[oid] = self.body
        self._answer(200, {})

    def _commit(self, repo: str, revision: str) -> None:
        if not self._may_write:
            return self._answer(403, {"error": "forbidden"})
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        values = {
            kind: [line["value"] for line in lines if line["key"] == kind] for kind in ("header", "file", "lfsFile")
        }
        files = {value["path"]: base64.b64decode(value["content"]) for value in values["file"]}
        files |= {value["path"]: self.server.uploads[value["oid"]] for value in values["lfsFile"]}
        name = self.server.repos[repo].commit(files, values["header"][0]["summary"], revision)
        url = f"{self.server.url}/{repo}/commit/{name}"
        self._answer(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})


def _oid(data: bytes) -> str:
    """Returns git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+).*", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", "branch"),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /uploads/(?P<oid>\w+)", "upload"),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Serves on a free port of the loopback address until the context ends."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def point_to(server: Hub, home: Path, monkeypatch: Any) -> None:
    """Makes this process talk to the server alone, logged in, and cache in `home`: its constants are read at import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    path = template[template.index("/{repo_id}") :]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")

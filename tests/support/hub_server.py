"""A small Hub for tests: the endpoints that huggingface_hub uses to push and to download, and faults on demand.

Repositories live in memory, files over LFS where their name ends in `.safetensors`, as on the real Hub.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITE_TOKEN = "hf_" + "W" * 34
READ_TOKEN = "hf_" + "R" * 34
STRANGER_TOKEN = "hf_" + "S" * 34
_USERS = {WRITE_TOKEN: ("ada", "write"), READ_TOKEN: ("ada", "read"), STRANGER_TOKEN: ("bob", "write")}


@dataclass
class Repo:
    """One repository: its files at the newest commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


@dataclass
class Fault:
    """What happens to the next requests whose method and path match.

    `action` is a status, "drop" (the connection closes without an answer), "cut" (it closes after the request was
    done) or "hang" (no answer for `seconds`).
    """

    where: str
    action: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "a fault made by the test"}'
    seconds: float = 30.0


class Hub(ThreadingHTTPServer):
    """The server; runs in a thread of the test process while the context is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS storage
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.change: Callable[[str, bytes], bytes] = lambda path, data: data  # what a bad disk would do
        self.lock = threading.RLock()
        self.over = threading.Event()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Forget everything, as a fresh server would."""
        self.repos, self.objects, self.faults, self.requests = {}, {}, [], []
        self.change = lambda path, data: data

    def count(self, where: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(where, line)) for line in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        line = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(line)
            fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.where, line)), None)
            if fault:
                fault.times -= 1
        if fault and fault.action == "drop":
            return self._hang_up()
        if fault and fault.action == "hang":
            self.server.over.wait(fault.seconds)
            return self._hang_up()
        if fault and isinstance(fault.action, int):
            return self._answer(fault.action, fault.body.encode(), fault.headers)
        with self.server.lock:
            status, answer, headers = self._route(line, body)
        if fault and fault.action == "cut":
            return self._hang_up()
        return self._answer(status, answer, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    # What a request means. Every function returns status, body, headers.

    def _route(self, line: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user, role = _USERS.get(token, (None, None))
        if token and user is None:
            return _error(401, "Invalid credentials in Authorization header")
        if line == "GET /api/whoami-v2":
            return _json({"name": user, "type": "user", "auth": {"accessToken": {"role": role}}})
        if line == "POST /api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if line == "POST /api/repos/create":
            return self._create(json.loads(body), user, role)
        if match := re.match(r"PUT /storage/(\w+)$", line):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return _error(400, "not the bytes that were announced")
            self.server.objects[match[1]] = body
            return 200, b"", {}
        if line == "POST /verify":
            return (200 if json.loads(body)["oid"] in self.server.objects else 404), b"{}", {}
        match = re.match(r"\w+ /(?:api/models/)?(?P<id>[\w.-]+/[\w.-]+?)(?P<lfs>\.git)?(?P<rest>/.*)?$", line)
        repo = self.server.repos.get(match["id"]) if match else None
        if repo is None or (repo.private and user != match["id"].split("/")[0]):
            return _error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        rest, writes = match["rest"] or "", self.command in ("POST", "PUT")
        if writes and (user != match["id"].split("/")[0] or role != "write"):
            return _error(403, "You need write access to this repository")
        if match["lfs"]:
            return self._batch(json.loads(body))
        if rest.startswith("/preupload/"):
            return _json({"files": [self._mode(repo, each) for each in json.loads(body)["files"]]})
        if rest.startswith("/commit/"):
            return self._commit(match["id"], repo, body)
        if rest.startswith("/tree/"):
            return _json([_entry(repo, path) for path in repo.files])
        if rest.startswith("/resolve/"):
            return self._file(repo, rest.split("/", 3)[3])
        siblings = [{"rfilename": path} for path in repo.files]
        return _json({"id": match["id"], "private": repo.private, "sha": repo.sha, "siblings": siblings})

    def _validate(self, card: str) -> tuple[int, bytes, dict[str, str]]:
        """The Hub refuses cards whose base model is no id."""
        base = re.search(r"^base_model:\s*(\S+)", card, re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1].strip("'\"")):
            return _json({"errors": [{"message": f"base_model {base[1]} is no model id"}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def _create(self, wish: dict, user: str | None, role: str | None) -> tuple[int, bytes, dict[str, str]]:
        name = f"{wish.get('organization') or user}/{wish['name']}"
        url = f"{self.server.url}/{name}"
        if user is None:
            return _error(401, "Invalid credentials in Authorization header")
        if name in self.server.repos:
            return _json({"error": "You already created this model repo", "url": url}, 409)
        if name.split("/")[0] != user or role != "write":
            return _error(403, f"You don't have the rights to create a model under this namespace ({name})")
        self.server.repos[name] = Repo(wish.get("visibility") == "private")
        return _json({"url": url, "name": name, "id": name})

    def _mode(self, repo: Repo, file: dict) -> dict:
        path = file["path"]
        lfs = path.endswith((".safetensors", ".pt", ".pth"))
        oid = None
        if path in repo.files:
            oid = hashlib.sha256(repo.files[path]).hexdigest() if path in repo.lfs else _blob(repo.files[path])
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, wish: dict) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for each in wish["objects"]:
            known = each["oid"] in self.server.objects
            actions = {
                "upload": {"href": f"{self.server.url}/storage/{each['oid']}"},
                "verify": {"href": f"{self.server.url}/verify"},
            }
            objects.append({**each, **({} if known else {"actions": actions})})
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        changed = []
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                repo.files[value["path"]] = self.server.change(value["path"], base64.b64decode(value["content"]))
                repo.lfs.discard(value["path"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return _error(400, f"{value['path']} was never uploaded")
                data = self.server.objects[value["oid"]]
                repo.files[value["path"]] = self.server.change(value["path"], data)
                repo.lfs.add(value["path"])
            else:
                message = value["summary"]
                continue
            changed.append(value["path"])
        repo.commits.append((message, changed))
        url = f"{self.server.url}/{name}/commit/{repo.sha}"
        return _json({"commitUrl": url, "commitOid": repo.sha, "success": True})

    def _file(self, repo: Repo, path: str) -> tuple[int, bytes, dict[str, str]]:
        if path not in repo.files:
            return _error(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha})
        data = repo.files[path]
        etag = hashlib.sha256(data).hexdigest() if path in repo.lfs else _blob(data)
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{etag}"'}
        if path in repo.lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return 200, data, headers


def _entry(repo: Repo, path: str) -> dict:
    data = repo.files[path]
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if path in repo.lfs:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _json(value: object, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(value).encode(), {}


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **(headers or {})}


def http_date(seconds_from_now: float) -> str:
    """A date as in Retry-After."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds_from_now))

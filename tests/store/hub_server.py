"""A small stand-in for the Hugging Face hub, with the failures that networks have.

It serves a folder of repositories, ROOT/OWNER/NAME/..., by the parts of the protocol that huggingface_hub speaks:
`/api/models/ID[/revision/REV]`, `/api/models/ID/tree/REV`, `/ID/resolve/REV/FILE` with X-Repo-Commit, ETag and, for
large files, X-Linked-Etag and a redirect to a second address that understands Range, as the real one's CDN does.

    with HubServer(root) as hub: ... HF_ENDPOINT=hub.url
    python -m tests.store.hub_server ROOT [PORT]
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = 4096  # bytes; larger files are "LFS" files here


@dataclass
class Faults:
    """What goes wrong, changed at will while the server runs."""

    drop_after: int | None = None  # bytes of a large file's answer after which the connection breaks
    drops: int = 0  # how many more answers break so
    rate: int | None = None  # bytes a second at most
    status: int | None = None  # this error for everything
    status_of_files: int | None = None  # this error for file contents alone
    damage: bool = False  # large files arrive with a byte changed
    ignore_range: bool = False  # always the whole file, as some proxies answer


@dataclass
class HubServer:
    root: Path
    port: int = 0
    token: str | None = None  # without it nothing is seen
    gated: set[str] = field(default_factory=set)
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    sent: int = 0  # bytes of large files
    stored: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by sha256

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.root / repo
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def commit(self, repo: str) -> str:
        """Of the content, so that it changes with it."""
        text = "".join(f"{name}{entry(path)}" for name, path in self.files(repo).items())
        return hashlib.sha1(text.encode()).hexdigest()


_ENTRIES: dict[tuple[Path, int, int], dict] = {}


def entry(path: Path) -> dict:
    """Size and hashes of a file, remembered while it does not change."""
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _ENTRIES:
        if stat.st_size > LARGE:
            with path.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            made = {"size": stat.st_size, "oid": hashlib.sha1(sha.encode()).hexdigest(), "sha256": sha}
        else:
            data = path.read_bytes()
            made = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        _ENTRIES[key] = made
    return _ENTRIES[key]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.receive()

    def do_PUT(self) -> None:
        self.receive()

    def log_message(self, *_: object) -> None:
        pass

    def route(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        url = urlsplit(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        if self.hub.faults.status:
            return self.fail(self.hub.faults.status, "", "out of order")
        if parts[0] == "cdn":
            if self.headers.get("Authorization"):
                return self.fail(400, "", "a signed address refuses a second authorization")
            return self.content(self.hub.root / "/".join(parts[1:]))
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        repo = "/".join(parts[:2])
        known = len(parts) >= 2 and (self.hub.root / repo).is_dir() and ".." not in parts
        if not known or (self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}"):
            return self.fail(401, "RepoNotFound", "Invalid username or password.")
        action, revision, rest = (parts[2:3] or [""])[0], (parts[3:4] or ["main"])[0], parts[4:]
        commit = self.hub.commit(repo)
        if revision not in ("main", commit):
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and action in ("", "revision"):
            return self.json(self.info(repo, commit, "blobs" in parse_qs(url.query)))
        if api and action == "tree":
            return self.json(self.tree(repo))
        if action != "resolve":
            return self.fail(404, "", "no such route")
        if repo in self.hub.gated:
            return self.fail(403, "GatedRepo", "Access is restricted; please ask for it.", commit)
        return self.resolve(repo, commit, "/".join(rest))

    def receive(self) -> None:
        """What uploading needs: making a repository, announcing files, large ones to a store, a commit of both."""
        self.hub.requests.append((self.command, self.path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.faults.status:
            return self.fail(self.hub.faults.status, "", "out of order")
        if parts[0] == "store":
            self.hub.stored[parts[1]] = body
            return self.json({})
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.fail(401, "", "Invalid username or password.")
        data = json.loads(body) if parts[-2:-1] != ["commit"] else {}
        if parts == ["api", "repos", "create"]:
            owner = data.get("organization") or "me"
            (self.hub.root / owner / data["name"]).mkdir(parents=True, exist_ok=True)
            return self.json({"url": f"{self.hub.url}/{owner}/{data['name']}"})
        if parts == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if parts[-2:-1] == ["preupload"]:
            return self.json({"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode":
                                         "lfs" if f["size"] > LARGE else "regular"} for f in data["files"]]})
        if parts[-2:] == ["objects", "batch"]:
            return self.json({"transfer": "basic", "objects": [
                {**o, **({} if o["oid"] in self.hub.stored else {"actions": {"upload": {
                    "href": f"{self.hub.url}/store/{o['oid']}"}}})} for o in data["objects"]]})
        repo = self.hub.root / parts[2] / parts[3]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                (repo / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (repo / value["path"]).write_bytes(self.hub.stored[value["oid"]])
        name = f"{parts[2]}/{parts[3]}"
        oid = self.hub.commit(name)
        return self.json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def info(self, repo: str, commit: str, blobs: bool) -> dict:
        siblings = []
        for name, path in self.hub.files(repo).items():
            one: dict = {"rfilename": name}
            if blobs:
                e = entry(path)
                one |= {"size": e["size"], "blobId": e["oid"]}
                if "sha256" in e:
                    one["lfs"] = {"size": e["size"], "sha256": e["sha256"], "pointerSize": 134}
            siblings.append(one)
        return {"id": repo, "modelId": repo, "sha": commit, "private": False, "gated": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": siblings}

    def tree(self, repo: str) -> list[dict]:
        listed = []
        for name, path in self.hub.files(repo).items():
            e = entry(path)
            one: dict = {"type": "file", "path": name, "size": e["size"], "oid": e["oid"]}
            if "sha256" in e:
                one["lfs"] = {"size": e["size"], "oid": e["sha256"], "pointerSize": 134}
            listed.append(one)
        return listed

    def resolve(self, repo: str, commit: str, name: str) -> None:
        path = self.hub.root / repo / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound", "Entry not found", commit)
        e = entry(path)
        if "sha256" not in e:
            return self.content(path, {"ETag": f'"{e["oid"]}"', "X-Repo-Commit": commit})
        self.send_response(302)
        host = self.headers["Host"].replace("127.0.0.1", "localhost")  # another host, as a CDN is
        self.send_header("Location", f"http://{host}/cdn/{quote(f'{repo}/{name}')}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{e["sha256"]}"')
        self.send_header("X-Linked-Size", str(e["size"]))
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def content(self, path: Path, headers: dict[str, str] | None = None) -> None:
        faults = self.hub.faults
        if faults.status_of_files:
            return self.fail(faults.status_of_files, "", "out of order")
        size, first = path.stat().st_size, 0
        asked = "" if faults.ignore_range else self.headers.get("Range", "")
        if asked:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            if first >= size:
                return self.fail(416, "", "Range Not Satisfiable")
        self.send_response(206 if asked else 200)
        for key, value in {"ETag": f'"{path.name}"', "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(size - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        allowed = None
        if size > LARGE and faults.drops > 0:
            faults.drops -= 1
            allowed = faults.drop_after
        with path.open("rb") as file:
            file.seek(first)
            while block := file.read(1 << 16):
                if faults.damage and size > LARGE:
                    block = bytes([block[0] ^ 1]) + block[1:]
                if allowed is not None:
                    block = block[:allowed]
                    allowed -= len(block)
                try:
                    self.wfile.write(block)
                except OSError:
                    self.close_connection = True
                    return None
                if size > LARGE:
                    self.hub.sent += len(block)
                if allowed == 0:
                    self.close_connection = True  # without the bytes that were promised
                    return None
                if faults.rate:
                    time.sleep(len(block) / faults.rate)
        return None

    def json(self, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) as server:
        print(server.url, flush=True)
        threading.Event().wait()

"""A stand-in of the Hugging Face Hub on this machine, that speaks its protocol over HTTP.

Repositories of models with commits, branches and files: what they hold can be listed and
downloaded, and pushed as the Hub's client does it without Xet: the mode of each file is asked for,
large ones go to a store by their SHA-256, and a commit brings small ones along.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

#: The login of the one user that may write, in namespace `me`.
TOKEN = "hf_stand_in"


class Repository:
    """Commits by name, each its files by name; branches and tags name commits."""

    def __init__(self):
        self.commits, self.names = {}, {}

    def commit(self, files, branch="main", oid=None):
        oid = oid or hashlib.sha1(repr((branch, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = files
        self.names[branch] = oid
        return oid

    def at(self, revision):
        return self.names.get(revision, revision)


class Hub(BaseHTTPRequestHandler):
    """Answers for `repositories`, keeps large files in `store`, and notes what was `asked`."""

    repositories: dict
    store: dict
    asked: list
    commits: list  # the lines of each commit that was pushed

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.repositories:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        repository = self.repositories[name]
        commit = repository.at(rest[1] if len(rest) > 1 else "main")
        if commit not in repository.commits:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if rest[:1] == ["resolve"]:
            data = files["/".join(rest[2:])]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self.answer(200, data, headers)
        if rest[:1] == ["tree"]:
            return self.tell([
                {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                for path, data in files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": path} for path in files]
        return self.tell({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[1]
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, b"{}")
        self.store[oid] = data
        return self.answer(200, b"")

    def do_POST(self):
        self.asked.append(self.path)
        body = self.body()
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
            return self.tell({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.tell({"error": "Invalid user token."}, 401)
        if path == "/api/repos/create":
            return self.create(**json.loads(body))
        parts = path.strip("/").split("/")
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body)["objects"])
        name, kind, branch = "/".join(parts[2:4]), parts[4], parts[5]
        repository = self.repositories[name]
        files = repository.commits.get(repository.at(branch), {})
        if kind == "preupload":
            return self.tell(
                {"files": [self.mode(file, files) for file in json.loads(body)["files"]]}
            )
        assert kind == "commit"
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append(lines)
        added = {line["value"]["path"]: self.content(**line) for line in lines[1:]}
        oid = repository.commit({**files, **added}, branch)
        address = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        return self.tell({"success": True, "commitUrl": address, "commitOid": oid})

    def create(self, name, organization, **_):
        full = f"{organization}/{name}"
        told = {"url": f"http://{self.headers['Host']}/{full}"}
        if organization != "me":
            return self.tell({"error": f"You don't have the rights to create {full}"}, 403)
        if full in self.repositories:
            return self.tell({**told, "error": "You already created this model repo"}, 409)
        self.repositories[full] = Repository()
        self.repositories[full].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.tell(told)

    def mode(self, file, files):
        large = file["path"].endswith(".safetensors")
        found = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
        if data := files.get(file["path"]):
            found["oid"] = hashlib.sha256(data).hexdigest() if large else git_hash(data)
        return {**found, "shouldIgnore": False}

    def batch(self, objects):
        told = []
        for each in objects:
            address = f"http://{self.headers['Host']}/store/{each['oid']}"
            actions = (
                {} if each["oid"] in self.store else {"actions": {"upload": {"href": address}}}
            )
            told.append({"oid": each["oid"], "size": each["size"], **actions})
        return self.tell({"transfer": "basic", "objects": told})

    def content(self, key, value):
        if key == "file":
            return base64.b64decode(value["content"])
        assert key == "lfsFile" and len(self.store[value["oid"]]) == value["size"]
        return self.store[value["oid"]]

    def body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def tell(self, values, code=200):
        told = {"X-Error-Message": values["error"]} if "error" in values else {}
        self.answer(code, json.dumps(values).encode(), {"Content-Type": "application/json", **told})

    def answer(self, code, data, headers=None):
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(repositories):
    """Serve repositories by name; yield the handler's class and the address."""
    state = {"repositories": repositories, "store": {}, "asked": [], "commits": []}
    handler = type("Serving", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.stop = staticmethod(lambda: (server.shutdown(), server.server_close()))
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        handler.stop()

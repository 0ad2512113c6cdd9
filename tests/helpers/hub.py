"""A stand-in for the Hugging Face hub on this machine, which keeps what is uploaded."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

TOKEN = "hf_a_token_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Knows one token; `fails` is the status that uploads get, if any."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.files, self.fails = {}, {}, None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers what `create_repo` and `upload_folder` ask, all files as parts of a commit."""

    def log_message(self, *_):
        pass

    def send(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def is_let_in(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send({"error": f"wrong: {self.headers.get('Authorization')}"}, 401)
        return False

    def do_GET(self):
        if not self.is_let_in():
            return
        if self.path.endswith("/whoami-v2"):
            self.send({"name": "me", "type": "user", "orgs": [], "auth": {}})
        else:
            self.send({"sha": "0" * 40, "siblings": [], "private": True, "id": "me/result"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
            return
        if not self.is_let_in():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else None
            self.server.repos[name or asked["name"]] = asked
            self.send({"url": f"{self.server.url}/{name}", "name": name})
        elif self.server.fails is not None:
            self.send({"error": "out of order"}, self.server.fails)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self.send({"files": told})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            url = f"{self.server.url}/me/result/commit/{'1' * 40}"
            self.send({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.send({"error": f"nothing at {self.path}"}, 404)


@contextlib.contextmanager
def stand_in(monkeypatch):
    """The stand-in, in place of the hub, with its token in the environment."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        for name in ("ENDPOINT", "HF_ENDPOINT"):
            monkeypatch.setattr(huggingface_hub.constants, name, hub.url, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.close_session()
        try:
            yield hub
        finally:
            hub.shutdown()
            monkeypatch.undo()
            huggingface_hub.utils.close_session()

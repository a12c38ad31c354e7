"""A Hugging Face cache made by hand, and a hub that serves one model on this machine."""

import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40
NAME = "Owner/Some-MoE.1"


def cached(
    model: Path, cache: Path, name: str = NAME, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """Put a copy of a model into a cache as the library does; the folder models--OWNER--NAME."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in sorted(model.iterdir()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return root


@contextmanager
def hub(model: Path, status: dict[str, tuple[int, str]] | None = None):
    """Serve the files of a folder as the main revision of `NAME`.

    Args:
      model: the folder.
      status: repository -> (HTTP status, the hub's word for its reason) of those that are refused.

    Yields:
      (address, the paths that were asked for).
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/")
            asked.append(f"{self.command} {path}")
            for repository, (code, word) in (status or {}).items():
                if repository in path:
                    return self.answer(code, b"{}", {"X-Error-Code": word, "X-Error-Message": word})
            if path.startswith(f"api/models/{NAME}/revision/"):
                return self.say({"id": NAME, "sha": COMMIT, "siblings": []})
            if path == f"api/models/{NAME}/tree/{COMMIT}":
                return self.say([self.entry(file) for file in sorted(model.iterdir())])
            content = (model / path.rpartition("/")[2]).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

        def entry(self, file: Path) -> dict:
            tag = hashlib.sha1(file.read_bytes()).hexdigest()
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": tag}

        def say(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, code: int, content: bytes, headers: dict):
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()

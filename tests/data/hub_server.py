"""A server of one data set or model, with the calls of the Hugging Face hub that reading it needs."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(name: str, folder: pathlib.Path, kind: str = "datasets") -> Iterator[str]:
    """The server's address, while the files of `folder` are the data set (or the model) `name`, on the branch main."""
    handler = type("Handler", (_Handler,), {"name": name, "folder": folder, "kind": kind})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    name: str
    folder: pathlib.Path
    kind: str

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        api, of_kind = f"/api/{self.kind}/{self.name}", "" if self.kind == "models" else f"/{self.kind}"
        files = f"{of_kind}/{self.name}/resolve/{COMMIT}/"
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return self._send(json.dumps({"id": self.name, "sha": COMMIT, "siblings": self._siblings()}).encode())
        if path.startswith(f"{api}/tree/{COMMIT}"):
            return self._send(json.dumps(self._entries(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))).encode())
        file = self.folder / path.removeprefix(files)
        if path.startswith(files) and file.is_file():
            return self._send_file(file.read_bytes())
        return self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound" if self.name in path else "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass

    def _siblings(self):
        files = (file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file())
        return [{"rfilename": file.as_posix()} for file in files]

    def _entries(self, below):
        def entry(path):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir():
                return {"type": "directory", "path": name, "oid": "1" * 40, "size": 0}
            return {"type": "file", "path": name, "oid": "1" * 40, "size": path.stat().st_size}

        return [entry(path) for path in (self.folder / below).iterdir()]

    def _send_file(self, content):
        headers = {"X-Repo-Commit": COMMIT, "ETag": '"1"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first : last + 1], 206, headers)
        return self._send(content, 200, headers)

    def _send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

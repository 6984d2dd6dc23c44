"""Other people's clients, unmodified from npm, on a page of another origin than signaling.

`clients/package.json` says which, exactly; its lock names no registry, so that npm asks the one
that the machine is set up for. `clients/*.js` are pages' scripts that import them by name and put
on `window` what a test wants to call; `bundled` makes a site of one, `site` serves it.

    with guests.site(guests.bundled("agents.js", tmp_path)) as url:
        page.goto(url)

What npm installs stays in `clients/node_modules`, which git ignores, until the lock changes.
"""

import contextlib
import fcntl
import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_browser import absent

CLIENTS = Path(__file__).resolve().parent / "clients"
ESBUILD = CLIENTS / "node_modules" / ".bin" / "esbuild"

INSTALL_S_MAX = 300.0
"""Forty megabytes from a registry, or from npm's cache."""
BUNDLE_S_MAX = 60.0

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>A guest</title>
<link rel="icon" href="data:,">
<script type="module" src="{script}"></script>
"""


def bundled(script: str, folder: Path) -> Path:
    """A folder to serve: a page with one of the scripts and all that it imports in one file.

    Skips the test on a machine without node and npm, or fails it where CI says so; and skips it
    where npm cannot get the packages.
    """
    _install()
    argv = ["--bundle", "--format=esm", "--platform=browser", "--log-level=warning"]
    subprocess.run(
        [ESBUILD, CLIENTS / script, *argv, f"--outfile={folder / script}"],
        check=True,
        timeout=BUNDLE_S_MAX,
    )
    (folder / "index.html").write_text(PAGE.format(script=script))
    return folder


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """Serves a folder on a free port of loopback while the block lasts: another port is another
    origin, and loopback a secure context, so that there is a microphone."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="site")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The browser says what it misses."""


def _install() -> None:
    """`npm ci`, unless it has been done for this lock. One at a time in a checkout."""
    if not (shutil.which("node") and shutil.which("npm")):
        absent("no node and npm on this machine: install Debian's packages nodejs and npm")
    wanted = hashlib.sha256(
        b"".join((CLIENTS / name).read_bytes() for name in ("package.json", "package-lock.json"))
    ).hexdigest()
    stamp = CLIENTS / "node_modules" / ".installed"
    folder = os.open(CLIENTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        argv = ["npm", "ci", "--prefer-offline", "--fetch-retries=1", "--loglevel=error"]
        try:
            ran = subprocess.run(
                argv,
                cwd=CLIENTS,
                capture_output=True,
                text=True,
                timeout=INSTALL_S_MAX,
                check=False,
            )
            wrong = ran.stderr[-1000:] if ran.returncode else ""
        except subprocess.TimeoutExpired:
            wrong = f"nothing after {INSTALL_S_MAX:g} s"
        if wrong:
            # Whether a registry is within reach is not up to the tree: never a failure.
            reason = f"npm cannot install the clients: {wrong}"
            print(f"skipped: {reason}")
            pytest.skip(reason)
        stamp.write_text(wanted)
    finally:
        os.close(folder)

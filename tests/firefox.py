"""The system's Firefox, driven by its own remote protocol: no driver to install.

    async with firefox.opened(folder) as page:
        await page.go("http://127.0.0.1:1234/")
        await page.run("return navigator.userAgent")

Marionette speaks JSON over TCP, each message behind its length: [0, id, command, parameters], and
[1, id, error, result] in return.
https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
"""

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from . import shim
from .test_browser import absent

NAMES = ("firefox-esr", "firefox")
START_S_MAX = 60.0
"""A first start makes a profile."""

PREFERENCES = {
    "marionette.port": 0,  # any that is free: it is written into the profile
    "media.navigator.permission.disabled": True,
    "media.navigator.streams.fake": True,  # a tone
    "media.autoplay.default": 0,
    "app.update.enabled": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
}


class Page:
    """The one tab of a browser."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ids = itertools.count()

    async def hear(self) -> Any:
        """The next message."""
        octets = await self._reader.readuntil(b":")
        return json.loads(await self._reader.readexactly(int(octets[:-1])))

    async def ask(self, command: str, **parameters: Any) -> Any:
        """Have a command done; its result."""
        message = json.dumps([0, next(self._ids), command, parameters]).encode()
        self._writer.write(b"%d:%s" % (len(message), message))
        async with asyncio.timeout(shim.WAIT_S):
            _, _, error, result = await self.hear()
        assert error is None, f"{command}: {error['message']}"
        return result

    async def go(self, url: str) -> None:
        """Load a page."""
        await self.ask("WebDriver:Navigate", url=url)

    async def run(self, body: str, *arguments: Any) -> Any:
        """What an asynchronous function with this body returns."""
        script = f"""const done = arguments[arguments.length - 1];
            (async (...given) => {{ {body} }})(...arguments)
              .then((found) => done([found]), (error) => done(String(error.stack ?? error)));"""
        found = await self.ask("WebDriver:ExecuteAsyncScript", script=script, args=list(arguments))
        assert isinstance(found["value"], list), found["value"]
        return found["value"][0]


def found() -> str:
    """The browser. Skips the test without one, or fails it where CI says so."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        absent("no Firefox on this machine: install Debian's package firefox-esr")
    return str(path)


@asynccontextmanager
async def opened(profile: Path) -> AsyncIterator[Page]:
    """A browser of its own while the block lasts, with an empty folder for its profile."""
    profile.mkdir()
    lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in PREFERENCES.items()]
    (profile / "user.js").write_text("".join(lines))
    argv = [found(), "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
    nothing = asyncio.subprocess.DEVNULL
    browser = await asyncio.create_subprocess_exec(*argv, stdout=nothing, stderr=nothing)
    port = profile / "MarionetteActivePort"
    try:
        async with asyncio.timeout(START_S_MAX):
            while not (port.exists() and port.read_text().strip()):
                await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port.read_text()))
        page = Page(reader, writer)
        await page.hear()  # what it speaks
        await page.ask("WebDriver:NewSession", capabilities={})
        await page.ask("WebDriver:SetTimeouts", script=int(1_000 * shim.WAIT_S))
        yield page
        await page.ask("Marionette:Quit")
        writer.close()
        async with asyncio.timeout(shim.WAIT_S):
            await browser.wait()
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()

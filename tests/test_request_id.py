"""A request's id at the transceiver: the nonce of the hint, and the key to a call's one line."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import journal
import observer
import ufrag

from . import shim
from .test_transceiver import House, closed, house, types

BIN = Path(sys.executable).parent
DEV = [sys.executable, Path(__file__).resolve().parent.parent / "scripts" / "dev.py"]


def nonce(on: House, call_id: str) -> str:
    """What a relay reads in the hint."""
    cluster = on.transceiver._cluster
    hint = (ufrag.from_call_id(call_id) or "").encode()
    found = ufrag.parse(on.transceiver._keyring, {cluster.id: cluster}, hint)
    assert isinstance(found, ufrag.Hint)
    return f"{found.nonce:08x}"


@contextmanager
def written(name: str) -> Iterator[list[dict[str, Any]]]:
    """What a logger writes meanwhile, as machines read it."""
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(journal.Json().format(record)))

    log, kept = logging.getLogger(name), Kept()
    level = log.level
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(kept)
        log.setLevel(level)


def test_the_requests_id_is_the_nonce_unless_another_call_has_it(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        offer = await client.offer()

        async def opened(request_id: Any) -> tuple[str, str]:
            body = {"offer": offer, "candidates": [list(on.shim.address)], "request_id": request_id}
            status, answer, _ = await on.ask("POST", "/v1/sessions", body)
            assert status == 201, answer
            assert nonce(on, answer["call_id"]) == answer["request_id"]
            shown = await on.ask("GET", f"/v1/sessions/{answer['call_id']}")
            assert shown[1]["request_id"] == answer["request_id"]
            return answer["call_id"], answer["request_id"]

        first, known_as = await opened("0badcafe")
        assert known_as == "0badcafe"
        second, drawn = await opened("0badcafe")
        assert drawn != "0badcafe" and second != first
        # What is no nonce is another name for a call that has its own.
        ids = {(await opened(other))[1] for other in ("", "0BADCAFE", "trace-1", "1" * 9)}
        assert len(ids) == 4 and "trace-1" not in ids
        # Once that call has ended, and its name with it, the id may be used again.
        await on.ask("DELETE", f"/v1/sessions/{first}")
        await shim.until(lambda: not on.transceiver._closing)
        again = (await opened("0badcafe"))[0]
        assert again != first and ufrag.from_call_id(again) == ufrag.from_call_id(first)

        with written("transceiver") as lines:
            pair = {"ufrag": "abcd", "pwd": "p" * 22}
            _, renewed, _ = await on.ask("POST", f"/v1/sessions/{second}/ice", pair)
        line = lines[-1]
        assert line["request_id"] == drawn
        assert line["restarted_as"] == nonce(on, ufrag.call_id(renewed["ufrag"])) != drawn

    house(tmp_path, scenario, limits="sessions_max = 10")


def test_a_call_is_one_line_with_all_there_is_to_know(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        body = {
            "offer": await client.offer(),
            "candidates": [list(on.shim.address)],
            "request_id": "0badcafe",
            "key": "alice",
            "model": "parrot-1",
        }
        status, answer, _ = await on.ask("POST", "/v1/sessions", body)
        assert status == 201
        call_id = answer["call_id"]
        await client.accept(answer["answer"])
        await shim.until(lambda: "session.created" in types(client))
        client.channel.send("no JSON")
        await shim.until(lambda: "error" in types(client))
        with written("session") as lines:
            headers = {"X-Earshot-Key": "alice", "X-Request-Id": "feedbeef"}
            with written("control") as noted:
                async with on.http.delete(f"{on.url}/v1/sessions/{call_id}", headers=headers):
                    pass
            await closed(client)
            await shim.until(lambda: lines)
            await shim.until(lambda: not on.transceiver._closing)
        (line,) = lines
        assert line["request_id"] == "0badcafe" and line["key"] == "alice"
        assert line["reason"] == "hung up by request" and line["state"] == "live"
        assert line["model"] == "parrot-1" and line["dialect"] == "realtime"
        assert line["codec"] == "opus"
        assert line["call"] == call_id[-6:] and call_id not in json.dumps(line)
        assert line["set_up"]["connected_ms"] >= line["set_up"]["check_ms"] > 0
        assert line["set_up"]["channel_ms"] > 0 and line["duration_s"] > 0
        assert line["errors"] == {"client": 1, "server": 0}
        assert {"packets_out", "octets_out", "replies", "interruptions", "frames"} <= line.keys()
        assert (noted[0]["request_id"], noted[0]["by_request_id"]) == ("0badcafe", "feedbeef")

        with written("session") as lines:  # one that nobody ever answered
            offered = {"offer": body["offer"], "candidates": body["candidates"]}
            _, answer, _ = await on.ask("POST", "/v1/sessions", offered)
            await on.ask("DELETE", f"/v1/sessions/{answer['call_id']}")
            await shim.until(lambda: lines)
        (line,) = lines
        assert line["state"] == "offered" and set(line["set_up"]) == {"backend_ms"}
        assert line["request_id"] == answer["request_id"]

    house(tmp_path, scenario)


@pytest.mark.parametrize("trouble", ["none", "full", "draining"])
def test_it_is_ready_while_it_would_take_a_call(tmp_path: Path, trouble: str) -> None:
    async def scenario(on: House) -> None:
        if trouble == "full":
            await on.call()
        elif trouble == "draining":
            on.transceiver.drain()
        status, body, _ = await on.ask("GET", "/readyz")
        assert (status == 200) == body["ready"] == (trouble == "none")
        assert bool(body["why"]) == (trouble != "none")
        async with on.http.get(f"{on.url}/healthz") as response:
            assert response.status == 200

    house(tmp_path, scenario, limits="sessions_max = 1")


def test_one_id_in_signaling_the_relay_and_the_transceiver(tmp_path: Path) -> None:
    """The whole system, and a call whose request is found in all of its programs."""
    system = subprocess.Popen(
        [*DEV, "--free-ports", "--json", "--state-dir", tmp_path / "state"],
        stdout=subprocess.PIPE,
        env=os.environ | {journal.VARIABLE: "json"},
    )

    def lines(program: str) -> list[dict[str, Any]]:
        whole = (tmp_path / "state" / f"{program}.log").read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    async def call(page: str) -> str:
        """Call, look at the relay's flows, hang up; the call's request id."""
        client = shim.Client()
        url, asked = f"{page}v1/realtime/calls", {observer.HEADER: "mine, and nobody's nonce"}
        async with aiohttp.ClientSession() as http:
            headers = {"Content-Type": "application/sdp", **asked}
            offer = await client.offer()
            async with http.post(url, data=offer, headers=headers) as response:
                assert response.status == 201
                request_id = response.headers[observer.HEADER]
                location = response.headers["Location"]
                await client.accept(await response.text())
            await shim.until(lambda: "session.created" in types(client))
            argv = [BIN / "relay", "flows", "--config", tmp_path / "state" / "relay.toml"]
            shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            assert [line.split()[-1] for line in shown.splitlines()] == [request_id], shown
            async with http.delete(f"{page.rstrip('/')}{location}") as response:
                assert response.status == 200
                hung_up_by = response.headers[observer.HEADER]
            await closed(client)
        await client.close()
        assert any("ready" in line["message"] for line in lines("relay"))
        written = lines("signaling")
        (made,) = [line for line in written if line.get("request_id") == request_id]
        assert made["status"] == 201 and made["client_request_id"] == asked[observer.HEADER]
        ended = [
            line
            for program in ("transceiver-1", "transceiver-2")
            for line in lines(program)
            if line.get("request_id") == request_id
        ]
        by = [line["by_request_id"] for line in ended if "by_request_id" in line]
        assert by == [hung_up_by]
        assert len([line for line in ended if "duration_s" in line]) == 1
        assert all(line["call"] == made["call"] for line in ended if "call" in line)
        everything = json.dumps([written, ended])
        assert location.rpartition("/")[2] not in everything  # nobody can join by a log
        return request_id

    try:
        assert system.stdout is not None
        about = json.loads(system.stdout.readline())
        print(asyncio.run(call(about["page"])))
    finally:
        system.send_signal(signal.SIGINT)
        assert system.wait(30) == 0

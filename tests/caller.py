"""A caller in a process of its own: a stock WebRTC client behind the relay in miniature.

    python tests/caller.py CONTROL_URL HOST PORT SECONDS

Calls the transceiver, sends a tone for so many seconds, and prints one line of JSON: for every RTP
packet the monotonic time (which all processes of a machine share) just before it was handed to the
transceiver's socket. Its own process, so that its work is not taken for the transceiver's.
"""

import asyncio
import importlib.util
import json
import sys
import time
from pathlib import Path

import aiohttp
from aiortc.mediastreams import AudioStreamTrack

import stun

_where = importlib.util.spec_from_file_location("shim", Path(__file__).with_name("shim.py"))
shim = importlib.util.module_from_spec(_where)
_where.loader.exec_module(shim)


async def main(control: str, host: str, port: int, seconds: float) -> None:
    relay = shim.Shim((host, port))
    sent: list[float] = []

    def up(datagram: bytes) -> bytes:
        if stun.kind(datagram[0]) is stun.Kind.RTP and not stun.is_rtcp(datagram):
            sent.append(time.monotonic())
        return datagram

    relay.up = up
    client = shim.Client()
    async with aiohttp.ClientSession() as http:
        request = {
            "offer": await client.offer(AudioStreamTrack()),
            "candidates": [list(relay.address)],
        }
        async with http.post(f"{control}/v1/sessions", json=request) as response:
            await client.accept((await response.json())["answer"])
    begun = time.monotonic()
    await shim.until(lambda: sent and time.monotonic() - begun > seconds)
    relay.up = lambda datagram: None if stun.kind(datagram[0]) is stun.Kind.RTP else datagram
    await client.close()
    relay.close()
    print(json.dumps(sent))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))

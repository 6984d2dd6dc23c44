"""Real calls of each kind of offer: codecs, directions, roles, certificates, where the channel is.

The client is aiortc's RTCPeerConnection, the other side the transceiver with its parrot.
"""

import asyncio
import datetime
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiortc import RTCCertificate, RTCRtpSender
from aiortc.mediastreams import AudioStreamTrack
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

import dtls
import sdp
import stun
from session import State

from . import shim
from .test_transceiver import House, house, types

ROOT = Path(__file__).resolve().parent.parent

_spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check.py")
assert _spec is not None
assert _spec.loader is not None
check: Any = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("check", check)
_spec.loader.exec_module(check)

CORRELATION_MIN = 0.6
"""As check.py has it: speech that is not the same stays under 0.3. 0.9 is what G.711 reaches."""


def codecs(mime: str) -> list[Any]:
    found = [each for each in RTCRtpSender.getCapabilities("audio").codecs if each.mimeType == mime]
    assert found
    return found


async def offered(client: shim.Client, track: Any, mime: str, direction: str = "sendrecv") -> str:
    """An offer of one codec alone."""
    line = client.pc.addTransceiver(track, direction=direction)
    line.setCodecPreferences(codecs(mime))
    await client.pc.setLocalDescription(await client.pc.createOffer())
    return str(client.pc.localDescription.sdp)


UNHURRIED = {"type": "server_vad", "silence_duration_ms": 2_000}
"""A machine that stands still in mid-sentence does not end the turn there."""


async def answered(on: House, client: shim.Client, offer: str) -> tuple[str, Any]:
    """The call is taken: the answer, and the session at the transceiver."""
    on.clients.append(client)
    session = {"type": "realtime", "audio": {"input": {"turn_detection": UNHURRIED}}}
    asked = {"offer": offer, "session": session, "candidates": [list(on.shim.address)]}
    status, body, _ = await on.ask("POST", "/v1/sessions", asked)
    assert status == 201, body
    await client.accept(body["answer"])
    return body["answer"], on.transceiver.sessions[body["call_id"]]


async def echoed(on: House, mime: str) -> tuple[float, Any]:
    """Say the sentence, hear the parrot: how alike they are, and the session."""
    speech = check.sentence()
    speaker, client, call = check.Speaker(speech), shim.Client(), check.Call()
    answer, session = await answered(on, client, await offered(client, speaker, mime))
    name = mime.removeprefix("audio/")
    assert f" {name}/8000\r\n" in answer
    assert "opus" not in answer
    await shim.until(lambda: client.messages, "session.created")
    listening = asyncio.create_task(check.listen(client.track, call))
    speaker.speak()
    await shim.until(lambda: "output_audio_buffer.stopped" in types(client), "the reply")
    listening.cancel()
    # The client decodes G.711 to 8 kHz: so it is compared.
    said = speech[: len(speech) // 6 * 6].reshape(-1, 6).mean(axis=1)
    return check.correlation(said, np.concatenate(call.heard)), session


@pytest.mark.parametrize("mime", ["audio/PCMU", "audio/PCMA"])
def test_a_conversation_by_telephone_codec(tmp_path: Path, mime: str) -> None:
    async def scenario(on: House) -> None:
        alike, session = await echoed(on, mime)
        print(f"{mime}: echo correlation {alike:.2f}")
        assert alike > CORRELATION_MIN
        assert session.offer.codec is sdp.Codec(f"{mime.removeprefix('audio/')}/8000")
        assert session._receiver.malformed == session._receiver.late == 0

    house(tmp_path, scenario)


def test_a_telephone_codec_over_a_path_that_loses(tmp_path: Path) -> None:
    """One packet in twenty of what the client says: still the same sentence, and of its length.

    What it hears stays whole: aiortc's client would play that late from the first loss on.
    """

    async def scenario(on: House) -> None:
        chance = random.Random(711)

        def lossy(datagram: bytes) -> bytes | None:
            media = stun.kind(datagram[0]) is stun.Kind.RTP and not stun.is_rtcp(datagram)
            return None if media and chance.random() < 0.05 else datagram

        on.shim.up = lossy
        alike, session = await echoed(on, "audio/PCMU")
        print(f"with 5 % lost: echo correlation {alike:.2f}")
        assert alike > CORRELATION_MIN - 0.1
        assert session._receiver.concealed > 0

    house(tmp_path, scenario)


def certificate(kind: str) -> RTCCertificate:
    if kind == "ecdsa":
        return RTCCertificate.generateCertificate()
    key = rsa.generate_private_key(public_exponent=65537, key_size=int(kind.removeprefix("rsa-")))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "encoder")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now - datetime.timedelta(days=1))
    built = built.not_valid_after(now + datetime.timedelta(days=1))
    # The transceiver's context, since aiortc's own client offers nothing to an RSA certificate.
    return dtls.Certificate(key, built.sign(key, hashes.SHA256()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ecdsa", "rsa-2048"])
@pytest.mark.parametrize("setup", ["actpass", "active", "passive"])
def test_dtls_in_every_role_with_every_certificate(tmp_path: Path, setup: str, kind: str) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client(certificate(kind))
        offer = (await client.offer(AudioStreamTrack())).replace(
            "a=setup:actpass", f"a=setup:{setup}"
        )
        answer, session = await answered(on, client, offer)
        assert f"a=setup:{'passive' if setup == 'active' else 'active'}\r\n" in answer
        await shim.until(lambda: client.messages, "session.created")
        await shim.until(lambda: session._receiver.decoded > 5, "speech")
        assert session.state is State.LIVE

    house(tmp_path, scenario)


def test_who_only_listens_hears_what_is_asked_for(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        answer, session = await answered(on, client, await client.offer())  # recvonly
        assert "a=sendonly\r\n" in answer
        await shim.until(lambda: client.messages, "session.created")
        await shim.until(lambda: session._playout.packets_sent, "a packet that opens the line")
        client.channel.send(json.dumps({"type": "input_audio_buffer.clear"}))
        await shim.until(lambda: "input_audio_buffer.cleared" in types(client), "an answer")

    house(tmp_path, scenario)


def test_who_only_speaks_is_heard_and_sent_nothing(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        offer = await offered(client, AudioStreamTrack(), "audio/opus", "sendonly")
        answer, session = await answered(on, client, offer)
        assert "a=recvonly\r\n" in answer
        await shim.until(lambda: session._receiver.decoded > 5, "speech")
        assert session._playout.packets_sent == 0
        assert client.track is None

    house(tmp_path, scenario)


def test_the_channel_may_come_first_and_not_alone(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        others = [client.pc.createDataChannel(f"more {at}") for at in range(2)]
        client.pc.addTransceiver(AudioStreamTrack())
        await client.pc.setLocalDescription(await client.pc.createOffer())
        text = str(client.pc.localDescription.sdp)
        # aiortc writes the channels last, as browsers do but for those that had them first.
        head, audio, channels = split(text)
        offer = "".join((head.replace("BUNDLE 0 1", "BUNDLE 1 0"), channels, audio))
        assert sdp.read_offer(offer).application == 0
        on.clients.append(client)
        status, body, _ = await on.offer(offer)
        assert status == 201
        head, first, second = split(body["answer"])
        assert first.startswith("m=application")
        # And it reads answers in the order of its own offer.
        await client.accept("".join((head.replace("BUNDLE 1 0", "BUNDLE 0 1"), second, first)))
        await shim.until(lambda: client.messages, "session.created")
        await shim.until(lambda: all(each.readyState == "open" for each in others), "the others")

    house(tmp_path, scenario)


def split(description: str) -> list[str]:
    """A session description with two m-lines: what stands before them, and each."""
    head, first, second = description.split("\r\nm=")
    return [f"{head}\r\n", f"m={first}\r\n", f"m={second}"]

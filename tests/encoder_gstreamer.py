"""An encoder of GStreamer's webrtcbin that comes in by WHIP: a program of its own, for the tests.

    /usr/bin/python3 tests/encoder_gstreamer.py URL TOKEN CODEC SETUP WAV
    /usr/bin/python3 tests/encoder_gstreamer.py check

It speaks the file, prints a line of JSON for each step, and hangs up when its
standard input ends. The system's interpreter runs it, since that has GStreamer's bindings; `check`
names what else it lacks.
"""

import json
import os
import sys
import urllib.request

import gi

for name, version in (("Gst", "1.0"), ("GstSdp", "1.0"), ("GstWebRTC", "1.0")):
    gi.require_version(name, version)
from gi.repository import GLib, Gst, GstSdp, GstWebRTC  # noqa: E402

NEEDED = ("webrtcbin", "nicesrc", "dtlsdec", "srtpdec", "opusenc", "rtpopuspay", "mulawenc")

ENCODED = {
    "opus": "audio/x-raw,rate=48000 ! opusenc ! rtpopuspay pt=96",
    "pcmu": "audio/x-raw,rate=8000,channels=1 ! mulawenc ! rtppcmupay pt=0",
    "pcma": "audio/x-raw,rate=8000,channels=1 ! alawenc ! rtppcmapay pt=8",
}
CAPS = {
    "opus": "encoding-name=OPUS,payload=96,clock-rate=48000",
    "pcmu": "encoding-name=PCMU,payload=0,clock-rate=8000",
    "pcma": "encoding-name=PCMA,payload=8,clock-rate=8000",
}
PIPELINE = """
webrtcbin name=call bundle-policy=max-bundle
filesrc location={wav} ! wavparse ! identity sync=true ! audioconvert ! audioresample ! {encoded}
  ! application/x-rtp,media=audio,{caps} ! call.
"""


def say(**step: object) -> None:
    print(json.dumps(step), flush=True)


KEPT = []
"""Promises and replies, since what they hold goes with them."""


def asked(call: object, signal: str, *arguments: object) -> object:
    """What webrtcbin replies. Its promises are waited for: this program has nothing else to do."""
    promise = Gst.Promise.new()
    call.emit(signal, *arguments, promise)
    promise.wait()
    reply = promise.get_reply()
    KEPT.append((promise, reply))
    return reply


def main(url: str, token: str, codec: str, setup: str, wav: str) -> None:
    Gst.init(None)
    text = PIPELINE.format(encoded=ENCODED[codec], caps=CAPS[codec], wav=wav)
    pipeline = Gst.parse_launch(" ".join(text.split()))
    call = pipeline.get_by_name("call")
    # The relay under test is on 127.0.0.1, which libnice tries from nowhere else.
    KEPT.append(call.get_property("ice-agent"))
    KEPT[-1].emit("add-local-ip-address", "127.0.0.1")
    loop = GLib.MainLoop()
    call.connect("on-negotiation-needed", lambda _: GLib.idle_add(loop.quit))
    call.connect(
        "notify::connection-state",
        lambda element, _: say(state=element.get_property("connection-state").value_nick),
    )
    pipeline.set_state(Gst.State.PLAYING)
    loop.run()
    line = call.emit("get-transceiver", 0)
    line.set_property("direction", GstWebRTC.WebRTCRTPTransceiverDirection.SENDONLY)
    offer = asked(call, "create-offer", None).get_value("offer")
    asked(call, "set-local-description", offer)
    said = offer.sdp.as_text().replace("a=setup:actpass", f"a=setup:{setup}")
    headers = {"Content-Type": "application/sdp", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, said.encode(), headers, method="POST")
    with urllib.request.urlopen(request) as response:
        where, answer = response.headers["Location"], response.read()
        say(status=response.status, location=where, etag=response.headers["ETag"])
    _, description = GstSdp.SDPMessage.new()
    GstSdp.sdp_message_parse_buffer(answer, description)
    kind = GstWebRTC.WebRTCSDPType.ANSWER
    found = GstWebRTC.WebRTCSessionDescription.new(kind, description)
    asked(call, "set-remote-description", found)
    GLib.io_add_watch(sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IO_HUP | GLib.IO_IN, leave, loop)
    loop.run()
    host = url[: url.index("/", len("http://"))]
    request = urllib.request.Request(host + where, headers=headers, method="DELETE")
    with urllib.request.urlopen(request) as response:
        say(deleted=response.status)
    pipeline.set_state(Gst.State.NULL)
    os._exit(0)  # the bindings would let go of the agent once more than they may


def leave(_source: object, _condition: object, loop: object) -> bool:
    loop.quit()
    return False


def check() -> None:
    Gst.init(None)
    missing = [name for name in NEEDED if Gst.ElementFactory.find(name) is None]
    sys.exit(f"GStreamer has no {', '.join(missing)} here" if missing else 0)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["check"] else main(*sys.argv[1:])

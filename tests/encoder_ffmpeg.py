"""FFmpeg's WHIP muxer as an encoder: a program of its own, for the tests.

    python tests/encoder_ffmpeg.py URL TOKEN WAV CERTIFICATE KEY

It speaks the file in real time, until its standard input ends. PyAV brings an
FFmpeg that has the muxer (8.0 and later); most distributions' ffmpeg does not yet.
"""

import json
import select
import sys
import time
import wave
from fractions import Fraction

import av

RATE_HZ = 48_000
FRAME = 960


def main(url: str, token: str, wav: str, certificate: str, key: str) -> None:
    with wave.open(wav) as file:
        assert (file.getframerate(), file.getnchannels()) == (RATE_HZ, 1)
        speech = file.readframes(file.getnframes())
    av.logging.restore_default_callback()  # what is wrong goes to standard error
    av.logging.set_level(av.logging.ERROR)
    # Without a certificate of its own an FFmpeg with GnuTLS makes one on secp224r1, which OpenSSL
    # has given up; one with OpenSSL takes P-256 by itself.
    options = {"authorization": token, "cert_file": certificate, "key_file": key}
    with av.open(url, "w", format="whip", options=options) as call:
        line = call.add_stream("libopus", rate=RATE_HZ, layout="stereo")
        line.bit_rate = 64_000
        begun = time.monotonic()
        for number in range(1 << 30):
            if select.select([sys.stdin], [], [], 0)[0]:
                break
            piece = speech[2 * FRAME * number : 2 * FRAME * (number + 1)].ljust(2 * FRAME, b"\0")
            frame = av.AudioFrame(format="s16", layout="stereo", samples=FRAME)
            both = b"".join(piece[at : at + 2] * 2 for at in range(0, 2 * FRAME, 2))
            frame.planes[0].update(both)
            frame.sample_rate, frame.time_base = RATE_HZ, Fraction(1, RATE_HZ)
            frame.pts = FRAME * number
            for packet in line.encode(frame):
                call.mux(packet)
            if number == 0:
                begun = time.monotonic()
                print(json.dumps({"state": "connected"}), flush=True)
            time.sleep(max(0.0, begun + number * FRAME / RATE_HZ - time.monotonic()))
    print(json.dumps({"deleted": True}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

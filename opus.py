"""Opus by way of libopus: PCM to payloads and back, one frame a call, in this thread.

Owns the only handle on the codec. It calls the C library through ctypes and not through PyAV: that
has neither concealment nor FEC, decodes to 48 kHz stereo only, and holds a frame back to resample.

Rules:
- Codec state lies in memory that Python owns (opus_*_get_size and opus_*_init instead of _create):
  nothing to free, no use after free, and whoever drops the object has dropped it all.
- Buffers are laid out once; a call allocates its result and nothing else.
- Payloads come from strangers: a malformed one is None, never an exception. PCM comes from this
  program: a frame of the wrong length is a ValueError.
- An encoder is never reset between two replies. The client's decoder is not either, and predicting
  from another past than its own is heard as a crack.

It does not pace, reorder or decide what to conceal: audio.py and receiver.py do. RFC 6716
(https://www.rfc-editor.org/rfc/rfc6716); the C interface is https://opus-codec.org/docs/.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import enum
import functools
import importlib.util
from pathlib import Path
from typing import TypeAlias

FRAME_MS = 20
"""One packet out. Shorter frames cost a packet's overhead more often, longer ones are delay."""

RATES_HZ = (16_000, 24_000, 48_000)
"""Those of Opus' sampling rates that speech is worth: 8 and 12 kHz sound like a telephone."""

BITRATE = 48_000
"""A little above the 28 to 40 kb/s that RFC 7587 section 3.1.1 recommends for full-band speech, as
CELT alone does without SILK's model of speech. 121 octets a packet, of which the headers are half
as much again: more would cost the caller's down-link, less would hardly spare it."""

COMPLEXITY = 0
"""Of 0 to 10. In CELT 0 takes half the time of 5 (16 kHz: 15 and 34 us a frame on a 2 vCPU Xeon)
and sounds as good: PESQ (wide band, five voices, 48 kb/s) 3.88 against 3.97 at 16 kHz, 3.53 against
3.58 at 24 kHz. 1 to 4 are dearer than 0 and sound worse; 10 gains 0.2 for three times the work."""

SILK_COMPLEXITY = 5
"""In SILK less is no bargain: with 2 % lost, and FEC, PESQ is 3.7 at 5 (200 us a frame) and 2.9 at
0 (90 us), where CELT has 3.1 without any FEC."""

_DECODED_MS_MAX = 120  # the longest packet there is: RFC 6716 section 3.4, R5
_PAYLOAD_OCTETS_MAX = 1 + 1_275  # one frame: RFC 6716 section 3.2.1
_FRAMES_MAX = 48  # frames in a packet, RFC 6716 section 3.2.5
# One frame of 20 ms of CELT, full band, mono; the first bit that is coded is its silence flag
# (RFC 6716 sections 3.1 and 4.3). Any decoder takes it between frames of whatever bandwidth.
_SILENCE = b"\xf8\xff\xfe"

# opus_defines.h
_OK = 0
_SET_BITRATE = 4002
_SET_COMPLEXITY = 4010
_SET_INBAND_FEC = 4012
_SET_PACKET_LOSS_PERCENT = 4014
_SET_SIGNAL = 4024
_RESET_STATE = 4028
_SIGNAL_VOICE = 3001


_State: TypeAlias = ctypes.c_void_p


class LibraryMissing(RuntimeError):
    """There is no libopus on this machine, or one that cannot be loaded."""


class Application(enum.IntEnum):
    """What the encoder is tuned for (OPUS_APPLICATION_*)."""

    VOIP = 2048
    """SILK and hybrid: sounds well below 24 kb/s, has in-band FEC, looks 6.5 ms ahead."""
    LOW_DELAY = 2051
    """CELT only: a third of the work, looks 2.5 ms ahead; a loss is the other side's to conceal."""


class Encoder:
    """PCM16LE mono frames of 20 ms to Opus payloads."""

    def __init__(
        self,
        rate_hz: int,
        *,
        bitrate: int = BITRATE,
        complexity: int = COMPLEXITY,
        application: Application = Application.LOW_DELAY,
        loss_percent: int = 0,
    ) -> None:
        """`loss_percent` above 0 adds in-band FEC for that much loss (VOIP only; CELT has none).

        Raises ValueError for a rate not in RATES_HZ or numbers that libopus refuses, LibraryMissing
        where there is no libopus.
        """
        lib = _library()
        _check_rate(rate_hz)
        self.rate_hz = rate_hz
        self._samples = rate_hz * FRAME_MS // 1_000
        self._octets = 2 * self._samples
        self._application = application
        self._state: _State | None = _memory(lib.opus_encoder_get_size(1))
        out = ctypes.create_string_buffer(_PAYLOAD_OCTETS_MAX)
        self._out, self._view = _pointer(out), memoryview(out)
        self._encode = lib.opus_encode
        self._ctl = lib.opus_encoder_ctl
        _require(lib.opus_encoder_init(self._state, rate_hz, 1, application), "encoder")
        self._set(_SET_BITRATE, bitrate)
        self._set(_SET_COMPLEXITY, complexity)
        self._set(_SET_SIGNAL, _SIGNAL_VOICE)
        self.expect_loss(loss_percent)

    def expect_loss(self, percent: int) -> None:
        """Say how much of what is sent gets lost: 0 to 100, as the reports tell. 0 ends the FEC."""
        self._set(_SET_INBAND_FEC, int(percent > 0))
        self._set(_SET_PACKET_LOSS_PERCENT, percent)

    def encode(self, pcm: bytes) -> bytes:
        """One frame of exactly FRAME_MS to one payload (about 120 octets at 48 kb/s)."""
        if len(pcm) != self._octets:
            raise ValueError(f"a frame has {self._octets} octets, this one {len(pcm)}")
        state = _opened(self._state)
        count = self._encode(state, pcm, self._samples, self._out, _PAYLOAD_OCTETS_MAX)
        if count < _OK:
            _require(count, "encode")
        return self._view[:count].tobytes()

    def silence(self) -> bytes:
        """A frame of digital silence, whatever was encoded before it.

        What the encoder makes of a frame of zeros behind speech decodes to a noise of -38 dBFS, and
        needs four frames to be 3 octets: an envelope may fall only so fast. So it hears the zeros,
        that it forgets its past, and this leaves in its place; the decoder falls silent after the
        2.5 ms of overlap with what came before (-67 dBFS), and completely with the next frame.

        It is CELT's, and a decoder that leaves SILK begins SILK anew: so has its encoder to.
        """
        if self._application is Application.VOIP:
            self._ctl(_opened(self._state), _RESET_STATE)
        else:
            self.encode(bytes(self._octets))
        return _SILENCE

    def close(self) -> None:
        """Free the state now (some 25 kB) instead of with the object. Closing twice is harmless."""
        self._state = None

    def _set(self, request: int, value: int) -> None:
        result = self._ctl(_opened(self._state), request, ctypes.c_int32(value))
        _require(result, f"setting {request}")


class Decoder:
    """Opus payloads to PCM16LE mono at `rate_hz`, whatever rate and channels they were made of.

    libopus decodes right to the lower rate and to one channel: there is nothing to resample.
    """

    def __init__(self, rate_hz: int) -> None:
        """Raises ValueError for a rate not in RATES_HZ, LibraryMissing without a libopus."""
        lib = _library()
        _check_rate(rate_hz)
        self.rate_hz = rate_hz
        self._samples_max = rate_hz * _DECODED_MS_MAX // 1_000
        self._state: _State | None = _memory(lib.opus_decoder_get_size(1))
        out = ctypes.create_string_buffer(2 * self._samples_max)
        self._out, self._view = _pointer(out), memoryview(out)
        self._lib = lib
        self._decode = lib.opus_decode
        _require(lib.opus_decoder_init(self._state, rate_hz, 1), "decoder")

    def decode(self, payload: bytes) -> bytes | None:
        """One payload to its 2.5 to 120 ms of PCM; None if it is malformed."""
        if not payload:  # libopus would take it for a loss and conceal the longest packet
            return None
        state = _opened(self._state)
        count = self._decode(state, payload, len(payload), self._out, self._samples_max, 0)
        return self._view[: 2 * count].tobytes() if count > 0 else None

    def conceal(self, samples: int) -> bytes:
        """Invent what was lost, from what came before. Fades out within 100 ms or so.

        `samples` is rounded down to a multiple of 2.5 ms, which is what libopus can do.
        """
        return self._run(None, self._conceivable(samples), 0) or b""

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        """The frame that was lost just before `payload`, of which it holds a coarse copy.

        None if it holds none (then conceal() is the answer). Call decode(payload) afterwards.
        RFC 6716 section 2.1.7 and 4.2.4.
        """
        if not self._has_fec(payload):
            return None
        return self._run(payload, self._conceivable(samples), 1)

    def reset(self) -> None:
        """Forget the stream so far: another encoder's begins."""
        self._lib.opus_decoder_ctl(_opened(self._state), _RESET_STATE)

    def close(self) -> None:
        """Free the state now (some 18 kB) instead of with the object. Closing twice is harmless."""
        self._state = None

    def _run(self, payload: bytes | None, samples: int, fec: int) -> bytes | None:
        octets = len(payload) if payload else 0
        count = self._decode(_opened(self._state), payload, octets, self._out, samples, fec)
        return self._view[: 2 * count].tobytes() if count > 0 else None

    def _conceivable(self, samples: int) -> int:
        """Losses come in units of 2.5 ms, and no more at a time than the buffer holds."""
        unit = self.rate_hz // 400
        return max(unit, min(samples, self._samples_max) // unit * unit)

    def _has_fec(self, payload: bytes) -> bool:
        """Whether the first frame brings a copy of the one before it: the LBRR flag.

        A SILK frame begins with one voice activity flag for each of its 20 ms, then this flag (RFC
        6716 section 4.2.3), and for stereo the same again for the side channel. Newer versions of
        libopus tell (opus_packet_has_lbrr), those that distributions ship do not.
        """
        sizes = (ctypes.c_int16 * _FRAMES_MAX)()
        begin = ctypes.c_int()
        frames = self._lib.opus_packet_parse(
            payload, len(payload), None, None, sizes, ctypes.byref(begin)
        )
        if frames < 1 or payload[0] & 0x80 or not sizes[0]:  # malformed, or CELT, or DTX
            return False
        # SILK alone has 10, 20, 40, 60 ms frames in configurations 0 to 11, hybrid 10, 20 ms in 12
        # to 15: RFC 6716 table 2.
        config = payload[0] >> 3
        parts = (1, 1, 2, 3)[config & 3] if config < 12 else 1
        flags = payload[begin.value]
        mid, side = flags >> 7 - parts & 1, flags >> 6 - 2 * parts & 1
        return bool(mid or (side and payload[0] & 0x04))


def encoder_for(rate_hz: int, loss_percent: int) -> Encoder:
    """The encoder for a path that loses so much: CELT where that is nothing, else SILK with FEC.

    Raises as Encoder does.
    """
    if not loss_percent:
        return Encoder(rate_hz)
    return Encoder(
        rate_hz,
        complexity=SILK_COMPLEXITY,
        application=Application.VOIP,
        loss_percent=loss_percent,
    )


def version() -> str:
    """What libopus calls itself, for the log. Raises LibraryMissing."""
    return str(_library().opus_get_version_string().decode("ascii", "replace"))


def _check_rate(rate_hz: int) -> None:
    if rate_hz not in RATES_HZ:
        raise ValueError(f"rate {rate_hz} Hz is none of {RATES_HZ}")


def _require(result: int, what: str) -> None:
    """libopus answers a negative number when asked for what it cannot do: a mistake of ours."""
    if result < _OK:
        raise ValueError(f"libopus refuses: {what} (error {result})")


def _memory(octets: int) -> _State:
    """Zeroed memory for a codec's state; malloc aligns it to 16, libopus wants 8."""
    return _pointer(ctypes.create_string_buffer(octets))


class _Pointer(ctypes.c_void_p):
    """A pointer that keeps its memory alive. Made once: to make one of an array for each call costs
    70 ns. ctypes.cast does the same by a cycle of references, whose memory, 65 kB a call, would
    wait for the collector."""

    memory: ctypes.Array[ctypes.c_char]


def _pointer(memory: ctypes.Array[ctypes.c_char]) -> ctypes.c_void_p:
    found = _Pointer(ctypes.addressof(memory))
    found.memory = memory
    return found


def _opened(state: _State | None) -> _State:
    """libopus would dereference a null pointer without a word."""
    if state is None:
        raise ValueError("the codec is closed")
    return state


@functools.cache
def _library() -> ctypes.PyDLL:
    """The system's libopus, which its distribution keeps mended, else the one in PyAV's wheel."""
    found = ctypes.util.find_library("opus")
    wheel = _wheel_library()
    for name in (found, wheel):
        if name is not None:
            try:
                return _declare(name)
            except (OSError, AttributeError) as error:
                reason = f"{name} cannot be used: {error}"
    if found is None and wheel is None:
        reason = "there is none on this machine"
    raise LibraryMissing(f"libopus: {reason}; install it (Debian: apt install libopus0)")


def _wheel_library() -> str | None:
    """The libopus that PyAV's wheel brings for its own use, beside the package."""
    spec = importlib.util.find_spec("av")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.parent / "av.libs"
    return next((str(path) for path in sorted(folder.glob("libopus-*.so*"))), None)


def _declare(name: str) -> ctypes.PyDLL:
    """Load the library and say what its functions take; AttributeError for one it lacks.

    PyDLL keeps the GIL: a frame takes 20 to 50 us, and whoever gives the GIL up may wait 5 ms (the
    switch interval) to get it back from a thread that computes, which the caller would hear.
    """
    lib = ctypes.PyDLL(name)
    pointer, octets, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures: dict[str, list[type[ctypes._CDataType]]] = {
        "opus_encoder_get_size": [number],
        "opus_encoder_init": [pointer, ctypes.c_int32, number, number],
        "opus_encode": [pointer, octets, number, pointer, ctypes.c_int32],
        "opus_decoder_get_size": [number],
        "opus_decoder_init": [pointer, ctypes.c_int32, number],
        "opus_decode": [pointer, octets, ctypes.c_int32, pointer, number, number],
        "opus_packet_parse": [octets, ctypes.c_int32, *[pointer] * 4],
        "opus_get_version_string": [],
    }
    for function, arguments in signatures.items():
        getattr(lib, function).argtypes = arguments
        getattr(lib, function).restype = ctypes.c_int
    # Variadic in C: the arguments past these two are passed as they come.
    lib.opus_encoder_ctl.argtypes = lib.opus_decoder_ctl.argtypes = [pointer, number]
    lib.opus_get_version_string.restype = octets
    return lib

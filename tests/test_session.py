"""One call's parts joined, with the transport and the backend played by the test."""

import asyncio
import gc
import weakref
from typing import Any

import hypothesis
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import carrier
import endpoints
import ice
import ledger
import metrics
import opening
import opus
import rtp
import sdp
import session
import settings
from metrics import Transceiver as Count
from session import State

HINT, PASSWORD = "APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN"
LIMITS = settings.TransceiverTable(
    listen=endpoints.Endpoint("127.0.0.1:9000"),
    relay_prefixes=(endpoints.Prefix("127.0.0.0/8"),),
    control_prefixes=(endpoints.Prefix("127.0.0.0/8"),),
)
CREATED = {"type": "session.created", "event_id": "event_1", "session": {"type": "realtime"}}
TONE = bytes(range(256)) * 10
"""80 ms at 16 kHz."""


def offer(direction: str = "sendrecv") -> sdp.Offer:
    return sdp.read_offer(
        "v=0\nm=audio 9 UDP/TLS/RTP/SAVPF 111\na=rtpmap:111 opus/48000/2\na=rtcp-mux\n"
        f"a=ice-ufrag:abcd\na=ice-pwd:{'p' * 22}\na=setup:actpass\na={direction}\n"
        f"a=fingerprint:sha-256 {':'.join(['AB'] * 32)}"
    )


class FakePeer:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.agent = ice.Agent(b"u", b"p", (b"c", b"q"))
        self.backlog_octets = 0
        self.carrier = carrier.Carrier()
        self.checked_at: float | None = None
        self.sent: list[rtp.Packet] = []
        self.reports: list[bytes] = []
        self.messages: list[dict[str, Any]] = []
        self.closed = 0

    def send_rtp(self, packet: bytes) -> None:
        found = rtp.read(packet)
        assert found is not None
        self.sent.append(found)

    def send_rtcp(self, packet: bytes) -> None:
        self.reports.append(packet)

    def send_message(self, message: str) -> None:
        self.messages.append(orjson.loads(message))

    def sweep(self, now: float) -> None:
        pass

    async def close(self) -> None:
        self.closed += 1


class FakeBackend:
    """A backend whose events the test makes up; it speaks from inside `connect`."""

    rate_hz = 16_000

    def __init__(self, emit: Any) -> None:
        self.emit = emit
        self.heard: list[tuple[bytes, float]] = []
        self.events: list[dict[str, Any]] = []
        self.ticks = 0
        self.closed = 0
        emit(CREATED)

    def send(self, event: dict[str, Any], now: float) -> None:
        self.events.append(event)

    def append(self, pcm: bytes, now: float) -> None:
        self.heard.append((pcm, now))

    def tick(self, now: float) -> None:
        self.ticks += 1

    def close(self) -> None:
        self.closed += 1

    def reply(self, pcm: bytes) -> None:
        """What a model says when it speaks."""
        about = {"response_id": "r", "item_id": "i", "output_index": 0, "content_index": 0}
        self.emit({"type": "response.created", "response": {"id": "r"}})
        self.emit({"type": "response.output_audio.delta", "delta": pcm, **about})
        self.emit({"type": "response.output_audio.done", **about})
        self.emit({"type": "response.done", "response": {"id": "r", "status": "completed"}})


class Call:
    """A session with everything around it played by this object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, direction: str = "sendrecv") -> None:
        self.now = 1000.0
        self.counters = ledger.Counters(Count)
        self.timings = ledger.Histograms(metrics.Timing)
        self.limits = LIMITS
        self.peer = FakePeer()
        self.endings: list[str] = []
        self.scheduled: list[float | None] = []
        wanted = opening.Opening("", {"instructions": "be kind"}, ())
        self.session = session.Session(self, self, offer(direction), (HINT, PASSWORD), self, wanted)

    def connect(self, wanted: Any, emit: Any, lost: Any, past: Any) -> FakeBackend:
        assert wanted == {"instructions": "be kind"}
        self.backend, self._lost = FakeBackend(emit), weakref.WeakMethod(lost)
        return self.backend

    def lose(self, reason: str) -> None:
        """The backend is given up."""
        lost = self._lost()
        assert lost is not None
        lost(reason)

    def open(self, *_: Any) -> FakePeer:
        return self.peer

    def clock(self) -> float:
        return self.now

    def unix(self) -> float:
        return 1_700_000_000.0 + self.now

    def paced(self, found: session.Session) -> None:
        self.scheduled.append(found.wakes_at)

    def ended(self, _: session.Session, reason: str) -> None:
        self.endings.append(reason)

    def types(self) -> list[str]:
        return [message["type"] for message in self.peer.messages]

    def play_out(self) -> None:
        """Let the pacer's time pass until nothing is left to send."""
        while self.session.wakes_at is not None:
            self.now = max(self.now, self.session.wakes_at)
            self.session.flow(self.now)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(monkeypatch)


def packets(count: int, ssrc: int = 5, payload_type: int = 111) -> list[bytes]:
    encoder = opus.Encoder(16_000)
    return [
        rtp.write(payload_type, number, number * 960, ssrc, encoder.encode(TONE[:640]))
        for number in range(count)
    ]


def test_states(call: Call) -> None:
    assert call.session.state is State.OFFERED
    call.peer.agent.active = ice.Path(b"", ())
    assert call.session.state is State.CONNECTING
    call.session.connected(call.now)
    assert call.session.state is State.LIVE
    assert call.counters[Count.SESSIONS_CONNECTED] == 1
    asyncio.run(call.session.close("over"))
    assert call.session.state is State.CLOSED


def test_session_created_is_the_first_thing_a_client_hears(call: Call) -> None:
    call.session.connected(call.now)
    call.backend.emit({"type": "input_audio_buffer.cleared"})
    assert call.types() == []
    call.session.opened(call.now)
    assert call.types() == ["session.created", "input_audio_buffer.cleared"]


def test_pcm_reaches_the_backend_before_the_callback_returns(call: Call) -> None:
    call.session.connected(call.now)
    for number, packet in enumerate(packets(5), 1):
        call.now += 0.02
        call.session.rtp(packet, call.now)
        assert len(call.backend.heard) == number
        pcm, at = call.backend.heard[-1]
        assert len(pcm) == 640
        assert at == call.now


def test_other_payloads_and_octets_are_ignored(call: Call) -> None:
    call.session.connected(call.now)
    for packet in [*packets(2, payload_type=13), b"", b"\x80", b"\x80" * 40]:
        call.session.rtp(packet, call.now)
    assert call.backend.heard == []


def test_the_first_frame_of_a_reply_leaves_at_once_and_the_rest_on_the_grid(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    call.peer.sent.clear()
    begun = call.now = call.now + 1
    call.backend.reply(TONE)
    assert len(call.peer.sent) == 1
    assert call.peer.sent[0].marker
    assert call.scheduled[-1] == pytest.approx(begun + 0.02)
    call.play_out()
    assert len(call.peer.sent) == 4
    assert call.now == pytest.approx(begun + 0.06)
    types = call.types()
    assert types.index("output_audio_buffer.started") < types.index("response.done")
    assert types[-1] == "output_audio_buffer.stopped"
    assert not any("delta" in name and "audio" in name for name in types)


def test_a_packet_of_silence_opens_the_line(call: Call) -> None:
    call.session.connected(call.now)
    assert len(call.peer.sent) == 1
    assert len(call.peer.sent[0].payload) < 10
    assert call.session.wakes_at is None
    call.session.opened(call.now)
    assert call.types() == ["session.created"]


def test_nothing_is_played_before_the_client_is_there(call: Call) -> None:
    call.backend.reply(TONE)
    assert call.peer.sent == []
    assert call.session.wakes_at is None
    call.session.connected(call.now)
    assert len(call.peer.sent) == 1


def test_a_client_that_takes_no_audio_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(monkeypatch, "sendonly")
    call.session.connected(call.now)
    call.backend.reply(TONE)
    call.play_out()
    assert call.peer.sent == []


def test_an_interruption_silences_at_once(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    call.backend.reply(TONE * 10)
    call.session.message('{"type": "output_audio_buffer.clear"}', call.now)
    assert call.session.wakes_at is None
    call.play_out()
    assert len(call.peer.sent) == 1
    assert "output_audio_buffer.cleared" in call.types()
    assert [event["type"] for event in call.backend.events][-1] == "conversation.item.truncate"


def test_a_client_event_reaches_the_backend(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    call.session.message('{"type": "input_audio_buffer.clear"}', call.now)
    assert [event["type"] for event in call.backend.events] == ["input_audio_buffer.clear"]
    call.session.message(b"\xff not JSON", call.now)
    assert call.types()[-1] == "error"


def test_a_receiver_report_to_a_client_that_only_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(monkeypatch, "sendonly")
    call.session.connected(call.now)
    assert call.session.sweep(call.now) is None
    assert call.peer.reports == []  # nothing sent, nothing received: nothing to report
    for packet in packets(5)[::2]:
        call.session.rtp(packet, call.now)
    call.session.sweep(call.now)
    (block,) = rtp.read_reports(call.peer.reports[-1])
    assert (block.ssrc, block.lost) == (5, 2)
    assert rtp.read_senders(call.peer.reports[-1]) == []


def test_a_sender_report_as_soon_as_something_was_sent(call: Call) -> None:
    call.session.connected(call.now)
    call.session.sweep(call.now)
    (sender,) = rtp.read_senders(call.peer.reports[-1])
    assert sender.ssrc == call.session.ssrc
    assert sender.packets == 1  # the silence that opened the line
    assert sender.ntp == rtp.ntp(call.unix())


def test_the_clients_report_tells_round_trip_and_loss(call: Call) -> None:
    call.session.connected(call.now)
    middle = rtp.ntp(call.unix() - 0.25) >> 16 & 0xFFFF_FFFF
    block = rtp.Block(call.session.ssrc, 64, 3, 100, 0, middle, 65536 // 10)
    call.session.rtcp(rtp.receiver_report(5, [block], "client"), call.now)
    assert call.session.reports.round_trip_s == pytest.approx(0.15, abs=0.001)
    assert call.session.reports.fraction_lost == 0.25
    call.session.rtcp(b"\x80\xc9", call.now)


def test_loss_that_the_client_reports_puts_redundancy_into_what_it_is_sent(call: Call) -> None:
    call.session.connected(call.now)

    def reported(highest: int, lost: int) -> None:
        block = rtp.Block(call.session.ssrc, 0, lost, highest, 0, 0, 0)
        call.session.rtcp(rtp.receiver_report(5, [block], "client"), call.now)

    def is_celt() -> bool:
        call.now += 0.02
        call.session.flow(call.now)
        return call.peer.sent[-1].payload[0] >= 0x80  # RFC 6716 section 3.1, table 2

    call.backend.reply(bytes(10 * 640))
    assert is_celt()
    reported(1_000, 10)
    assert is_celt()
    reported(1_250, 25)
    assert not is_celt()


WORD = st.integers(0, 0xFFFF_FFFF)
AUDIO = st.builds(
    rtp.write,
    st.just(111),
    st.integers(0, 0xFFFF) | st.integers(0, 6),
    WORD | st.integers(0, 6).map(lambda n: n * 960),
    st.sampled_from([5, 5, 5, 6]),
    st.binary(max_size=60) | st.binary(max_size=3),
    marker=st.booleans(),
)
MANGLED = st.builds(
    lambda datagram, at, flip, cut: bytes(
        octet ^ flip * (n == at) for n, octet in enumerate(datagram[: len(datagram) - cut])
    ),
    AUDIO,
    st.integers(0, 15),
    st.integers(0, 255),
    st.integers(0, 80),
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["rtp", "rtcp", "tick", "sweep"]), AUDIO | MANGLED, st.floats(0, 1)
        ),
        max_size=40,
    ),
    st.lists(st.builds(rtp.Block, st.just(0), *[st.integers(0, 255)] * 2, *[WORD] * 4), max_size=4),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_whatever_an_authenticated_client_sends_the_session_goes_on(
    datagrams: list[tuple[str, bytes, float]], blocks: list[rtp.Block]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        call = Call(patch)
        call.session.connected(call.now)
        about = [block._replace(ssrc=call.session.ssrc) for block in blocks]
        call.session.rtcp(rtp.receiver_report(5, about, "client"), call.now)
        for kind, datagram, after_s in datagrams:
            call.now += after_s
            if kind == "rtp":
                call.session.rtp(datagram, call.now)
            elif kind == "rtcp":
                call.session.rtcp(datagram[:1] + b"\xc8" + datagram[2:], call.now)
            elif kind == "tick":
                call.session.tick(call.now)
            else:
                call.session.sweep(call.now)
        call.backend.heard.clear()
        call.now += 1
        for datagram in packets(3, ssrc=77):
            call.session.rtp(datagram, call.now)
        assert len(call.backend.heard) >= 3, "a new stream is heard at once"
        assert call.endings == []


def test_a_clients_sender_report_is_echoed_for_its_own_round_trip(call: Call) -> None:
    call.session.connected(call.now)
    call.session.rtp(packets(1)[0], call.now)
    sender = rtp.Sender(5, rtp.ntp(1_700_000_000.0), 0, 1, 100)
    call.session.rtcp(rtp.sender_report(sender, [], "client"), call.now)
    call.session.sweep(call.now + 0.5)
    (block,) = rtp.read_reports(call.peer.reports[-1])
    assert block.last_sr == rtp.ntp(1_700_000_000.0) >> 16 & 0xFFFF_FFFF
    assert block.delay_since_last_sr == 32_768


def test_deadlines(call: Call) -> None:
    begun = call.now
    assert call.session.sweep(begun + 14.9) is None
    assert call.session.sweep(begun + 15) == "the client never connected"
    call.session.connected(begun + 1)
    call.peer.agent.heard_at = begun + 100
    assert call.session.sweep(begun + 129.9) is None
    assert call.session.sweep(begun + 130) == "the client has vanished"
    call.peer.agent.heard_at = begun + 7_199
    assert call.session.sweep(begun + 7_200) == "the session limit is reached"


def test_a_client_that_stops_reading_is_let_go(call: Call) -> None:
    call.session.connected(call.now)
    call.peer.backlog_octets = session.BACKLOG_OCTETS_MAX + 1
    assert call.session.sweep(call.now) == "the client has stopped reading its data channel"


def test_a_backend_that_says_more_than_the_client_reads_fills_no_memory(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    told = len(call.peer.messages)
    for _ in range(100):
        call.backend.emit(
            {"type": "response.function_call_arguments.delta", "delta": "x" * 100_000}
        )
        call.peer.backlog_octets += 100_000
    assert 40 < len(call.peer.messages) - told < 50
    assert set(call.endings) == {session.STOPPED_READING}


def test_time_passes_only_while_live(call: Call) -> None:
    call.session.tick(call.now)
    assert call.backend.ticks == 0
    call.session.connected(call.now)
    call.session.tick(call.now)
    assert call.backend.ticks == 1


def test_a_lost_transport_is_passed_on(call: Call) -> None:
    call.session.lost("the client closed the connection")
    assert call.endings == ["the client closed the connection"]


def test_closing_frees_everything_and_is_silent_afterwards(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    asyncio.run(call.session.close("hung up"))
    asyncio.run(call.session.close("hung up"))
    assert call.peer.closed == 1
    assert call.backend.closed == 1
    sent, told = len(call.peer.sent), len(call.peer.messages)
    call.backend.emit({"type": "input_audio_buffer.cleared"})
    call.session.rtp(packets(1)[0], call.now)
    call.session.message("{}", call.now)
    call.session.flow(call.now)
    call.session.tick(call.now)
    assert (len(call.peer.sent), len(call.peer.messages)) == (sent, told)
    assert call.session.wakes_at is None

    gone = weakref.ref(call.session)
    del call.session
    del call.backend
    gc.collect()
    assert gone() is None


def test_the_log_does_not_name_the_call(call: Call) -> None:
    assert HINT not in str(call.session)
    assert call.session.call_id not in str(call.session)


def test_a_client_hears_that_its_backend_is_lost_before_its_call_ends(call: Call) -> None:
    call.session.connected(call.now)
    call.session.opened(call.now)
    call.lose("The model server is gone.")
    assert call.endings == [session.BACKEND_LOST]
    error = call.peer.messages[-1]["error"]
    assert (error["type"], error["code"]) == ("server_error", "backend_lost")
    assert error["message"] == "The model server is gone."


def test_a_backend_lost_at_once_is_told_when_the_channel_opens(call: Call) -> None:
    call.lose("The model server refused the connection with status 401.")
    assert call.endings == []
    call.session.connected(call.now)
    call.session.opened(call.now)
    assert call.types()[-1] == "error"
    assert call.endings == [session.BACKEND_LOST]


def test_a_call_without_a_channel_ends_all_the_same(call: Call) -> None:
    call.session.connected(call.now)
    call.peer.agent.heard_at = call.now
    call.lose("The model server is gone.")
    assert call.session.sweep(call.now) is None
    assert call.session.sweep(call.now + session.LOSS_TOLD_S) == session.BACKEND_LOST
    assert call.endings == []

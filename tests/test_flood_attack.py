"""flood.py attack: what is sent is what is said, and each rule can be broken. Nothing is timed."""

import asyncio
import contextlib
import dataclasses
import importlib
import ipaddress
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ledger
import metrics
import settings
import stun
import ufrag

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 90
NAMES = (
    *("aftermath", "assault", "attacks", "attackers", "dev", "eavesdropper", "findings"),
    *("onlooker", "phases", "target"),
)
HOME = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1024, 65535)
PORT = 9000


@pytest.fixture(scope="module")
def scripts():
    """The modules by their names, out of the folder of scripts."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def keyring():
    return ufrag.Keyring.parse(f"0 {bytes(range(32)).hex()}")


@pytest.fixture(scope="module")
def material(scripts, keyring):
    """All that there is to know about three calls."""
    at = ipaddress.ip_address("127.0.0.1")
    hints = [ufrag.mint(keyring, HOME, at, PORT, nonce) for nonce in range(3)]
    found = scripts.attacks.Material(hints=hints, keyring=keyring, clusters={1: HOME})
    found.own = [scripts.attacks.Own(hints[0], ufrag.password(keyring, hints[0]))]
    found.checks = list(scripts.attacks.checks(found, random.Random(1)))
    found.ssrcs = [0x11111111, 0x22222222]
    found.live = [("127.9.0.1", 40_001), ("127.9.0.2", 40_002)]
    return found


def can_listen():
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).close()
    except PermissionError:
        return False
    return True


raw = pytest.mark.skipif(not can_listen(), reason="raw sockets need CAP_NET_RAW")


# --- what is sent ---------------------------------------------------------------------------------


def made(scripts, material, name, seed=7):
    (attack,) = (each for each in scripts.attacks.ATTACKS if each.name == name)
    assert attack.missing(material) == ""
    return attack.datagrams(material, random.Random(seed))


def judged(keyring, datagram):
    """What a relay with these keys thinks of a first datagram: a reason, or the session's hint."""
    request = stun.read_request(datagram)
    if isinstance(request, stun.Malformed):
        return request
    hint = ufrag.parse(keyring, {1: HOME}, request.ufrag)
    if isinstance(hint, ufrag.Reject):
        return hint
    password = ufrag.password(keyring, request.ufrag)
    return hint if stun.check_integrity(datagram, request, password) else "bad integrity"


def test_all_of_it_is_made_again_by_its_seed(scripts, material):
    for name in scripts.attacks.NAMES:
        found = made(scripts, material, name)
        assert found == made(scripts, material, name)
        assert 0 < len(found) <= scripts.attacks.KINDS
        assert max(map(len, found)) <= scripts.attacks.LENGTH_MAX


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("random-hints", {ufrag.Reject.MALFORMED, ufrag.Reject.UNKNOWN_KEY, ufrag.Reject.FORGED}),
        ("bad-integrity", {"bad integrity"}),
    ],
)
def test_what_strangers_send_opens_nothing(scripts, keyring, material, name, reasons):
    assert {judged(keyring, each) for each in made(scripts, material, name)} == reasons


def test_broken_stun_is_stun_by_its_first_octet_and_opens_nothing(scripts, keyring, material):
    found = made(scripts, material, "broken-stun")
    assert {stun.kind(each[0]) for each in found} == {stun.Kind.STUN}
    verdicts = [judged(keyring, each) for each in found]
    assert not any(isinstance(each, ufrag.Hint) for each in verdicts)
    assert stun.Malformed.TRUNCATED in verdicts and stun.Malformed.NOT_REQUEST in verdicts


def test_what_is_no_stun_is_none(scripts, material):
    found = made(scripts, material, "non-stun")
    kinds = {stun.kind(each[0]) for each in found if each}
    assert b"" in found and stun.Kind.STUN not in kinds
    assert {stun.Kind.DTLS, stun.Kind.TURN, stun.Kind.ZRTP, stun.Kind.RTP} <= kinds


def test_media_guesses_ssrcs_or_steals_them(scripts, material):
    guessed = {each[8:12] for each in made(scripts, material, "unknown-media")}
    assert len(guessed) > 900
    stolen = {int.from_bytes(e[8:12], "big") for e in made(scripts, material, "stolen-ssrcs")}
    assert stolen == set(material.ssrcs)


def test_oversized_datagrams_are_larger_than_a_relay_takes(scripts, material):
    table = settings.RelayTable(public="127.0.0.1:1", internal="127.0.0.1:2")
    assert table.datagram_octets_max == scripts.attacks.DATAGRAM_MAX
    assert min(map(len, made(scripts, material, "oversized"))) > scripts.attacks.DATAGRAM_MAX


def test_valid_checks_are_valid_and_new(scripts, keyring, material):
    for name in ("one-ufrag", "hijack", "minted"):
        found = made(scripts, material, name)
        hints = [judged(keyring, each) for each in found]
        assert all(isinstance(each, ufrag.Hint) for each in hints)
        assert len({each[8:20] for each in found}) == len(found)  # transaction ids
        assert len(set(hints)) == (len(found) if name == "minted" else 1)
        assert {each.port for each in hints} == {PORT}


def test_recorded_checks_are_sent_as_they_were(scripts, keyring, material):
    assert made(scripts, material, "replay") == material.checks
    assert len({judged(keyring, each) for each in material.checks}) == 3
    (replay,) = (each for each in scripts.attacks.ATTACKS if each.name == "replay")
    assert replay.may_hear(material)[0] == set()
    known = dataclasses.replace(material, recorded=False)
    assert "dtls" not in replay.may_hear(known)[0] and "stun success" in replay.may_hear(known)[0]


def test_what_cannot_be_made_says_why(scripts):
    nothing = scripts.attacks.Material()
    whys = {each.name: each.missing(nothing) for each in scripts.attacks.ATTACKS}
    strangers = {"random-hints", "broken-stun", "non-stun", "unknown-media", "oversized"}
    assert {name for name, why in whys.items() if not why} == strangers
    assert "--config" in whys["minted"] and "CAP_NET_RAW" in whys["spoofed"]
    assert "CAP_NET_RAW" in whys["hijack"] and "of one's own" in whys["hijack"]


# --- how it is sent -------------------------------------------------------------------------------


@pytest.fixture
def relay():
    """A socket in place of one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE_S)
        yield sock


@pytest.fixture
def band(scripts, relay):
    found = scripts.attackers.Band(*relay.getsockname())
    yield found
    found.close()


def taken(sock, count):
    return [sock.recvfrom(65_536) for _ in range(count)]


def test_each_datagram_comes_from_somebody_else(band, relay):
    sent = [bytes([number]) * (number + 1) for number in range(7)]
    band.load("flood", sent)
    *told, account = band.run(1_000, 0.1)
    assert account["done"] and account["refused"] == 0 and all(t["sent"] for t in told)
    found = taken(relay, account["sent"])
    assert [datagram for datagram, _ in found] == [sent[i % 7] for i in range(len(found))]
    assert account["octets"] == sum(len(datagram) for datagram, _ in found)
    assert account["octets_of_one"] == 7
    assert len({source for _, source in found}) == len(found) > 7
    assert not relay_has_more(relay)


def relay_has_more(sock):
    return bool(select.select([sock], [], [], 0)[0])


def test_what_was_refused_was_not_sent(band, relay, monkeypatch):
    band.load("flood", [b"1234567"])
    sending, batches = band._batch.send, []

    def send(fd, n):
        batches.append(n)
        if len(batches) % 2:
            raise PermissionError
        sending(fd, n)

    monkeypatch.setattr(band._batch, "send", send)
    *_, account = band.run(1_000, 0.1)
    assert account["sent"] == sum(batches[1::2]) > 0
    assert account["refused"] == sum(batches[::2])
    assert account["octets"] == 7 * account["sent"]
    assert len(taken(relay, account["sent"])) == account["sent"]
    assert not relay_has_more(relay)


def test_what_attackers_are_sent_is_counted(band, relay):
    band.load("flood", [b"\x01"])
    assert band.account()["flood"]["datagrams"] == 0
    *_, account = band.run(500, 0.1)
    found = taken(relay, account["sent"])
    victim, other = found[0][1], found[1][1]
    relay.sendto(stun.success(bytes(12), "127.0.0.1", 1, b"x"), victim)
    relay.sendto(b"\x16\xfe\xff" + bytes(97), victim)
    band.load("another", [b"\x02"])  # what is late belongs to those who were before
    relay.sendto(b"\x80" + bytes(11), other)
    while band.account()["flood"]["datagrams"] < 3:
        select.select(band.descriptors, [], [], PATIENCE_S)
    back = band.account()
    assert back["flood"]["kinds"] == {"stun success": 1, "dtls": 1, "rtp": 1}
    assert (back["flood"]["attackers"], back["flood"]["to_one"]) == (2, 2)
    assert back["flood"]["octets"] == back["flood"]["octets_to_one"] + 12
    assert back["another"]["datagrams"] == 0


@raw
def test_datagrams_in_the_name_of_others(band, relay, material):
    band.load("flood", [b"one", b"two", b"three"], material.live)
    *_, account = band.run(1_000, 0.05)
    found = taken(relay, account["sent"])
    assert {source for _, source in found} == set(material.live)
    assert {datagram for datagram, _ in found} == {b"one", b"two"}  # as many as fit the addresses
    assert account["octets"] == 3 * len(found)


def test_the_process_sends_and_ends_with_whoever_gave_the_orders(scripts, relay, tmp_path):
    async def story():
        async with scripts.attackers.attackers(*relay.getsockname()) as held:
            await held.load(tmp_path / "sent", [b"", b"abc"])
            account = await held.run(1_000, 0.2)
            assert (await held.account())["sent"]["datagrams"] == 0
            pid = held._process.pid
            endless = asyncio.create_task(held.run(1_000, 60))
            while not held.sent:
                await asyncio.sleep(0.01)
            endless.cancel()
        return account, pid

    account, pid = asyncio.run(story())
    assert account["sent"] == held_of(account)
    assert [datagram for datagram, _ in taken(relay, 4)] == [b"", b"abc", b"", b"abc"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def held_of(account):
    """What was sent by its octets: every other datagram has three."""
    return account["octets"] // 3 * 2 + account["sent"] % 2


# --- what is seen ---------------------------------------------------------------------------------


def test_an_eavesdropper_keeps_those_that_were_named(scripts, keyring, material):
    found = scripts.eavesdropper.Overheard()
    ours, theirs, late = ("127.9.0.1", 1), ("127.9.0.2", 2), ("127.9.0.3", 3)
    media = b"\x80\x6f" + bytes(6) + b"\0\0\0\x05" + bytes(20)
    for source, datagram in (
        (late, media),
        (ours, material.checks[0]),
        (theirs, material.checks[1]),
        (ours, media),
        (theirs, media),
        (ours, b"\x80\xc8" + bytes(30)),
        (ours, b"\x00\x01"),
    ):
        found.take(source, datagram, {material.hints[0]})
    assert found.checks == {ours: material.checks[0]}
    assert found.ssrcs == {ours: 5}


@raw
def test_an_eavesdropper_survives_what_is_no_whole_header(scripts, relay):
    host, port = relay.getsockname()

    async def story():
        hears = asyncio.create_task(
            asyncio.to_thread(scripts.eavesdropper.overhear, host, port, {"nobody"}, 0.2)
        )
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as stranger:
            while not hears.done():
                stranger.sendto(b"", (host, 0))
                stranger.sendto(b"\0\1", (host, 0))
                await asyncio.sleep(0.01)
        return await hears

    assert asyncio.run(story()).checks == {}


@raw
def test_an_eavesdropper_hears_what_arrives_here(scripts, relay, material):
    host, port = relay.getsockname()
    media = b"\x80\x6f" + bytes(6) + b"\0\0\0\x07" + bytes(20)

    async def story():
        hears = asyncio.create_task(
            asyncio.to_thread(
                scripts.eavesdropper.overhear, host, port, {material.hints[2]}, PATIENCE_S
            )
        )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind(("127.0.0.1", 0))
            while not hears.done():
                client.sendto(material.checks[2], (host, port))
                client.sendto(media, (host, port))
                await asyncio.sleep(0.01)
            return await hears, client.getsockname()

    found, client = asyncio.run(story())
    assert found.checks == {client: material.checks[2]} and found.ssrcs == {client: 7}


def page(inbound):
    rows = [({"worker": str(number)}, row) for number, row in enumerate(inbound)]
    sockets = [({"worker": "0", "socket": "public"}, ledger.Counters(metrics.Socket))]
    sockets[0][1].values[metrics.Socket.DROPPED] = 9
    return (
        metrics.exposition("earshot_relay_inbound", rows)
        + metrics.exposition("earshot_relay_socket", sockets)
    ).decode()


def test_a_page_is_read_and_the_law_can_be_broken(scripts):
    kinds = metrics.Inbound
    rows = [ledger.Counters(kinds), ledger.Counters(kinds)]
    before = scripts.onlooker.counted(page(rows))
    for row in rows:
        row.values[kinds.RECEIVED] = 10
        row.values[kinds.FORWARDED], row.values[kinds.RECOVERED] = 4, 1
        row.values[kinds.WAITING], row.values[kinds.DROPPED_OVERSIZED] = 2, 3
    found = scripts.onlooker.counted(page(rows))
    assert found["inbound_received"] == 20 and found["socket_public_dropped"] == 9
    assert scripts.onlooker.missing(found, "inbound") == 0
    assert scripts.onlooker.drops(before, found) == {"oversized": 6}
    rows[1].values[kinds.DROPPED_BAD_INTEGRITY] = 5
    rows[1].values[kinds.RECEIVED] = 17
    found = scripts.onlooker.counted(page(rows))
    assert scripts.onlooker.missing(found, "inbound") == 2


def test_programs_are_found_by_their_port_and_seen(scripts, relay):
    assert scripts.onlooker.holder(relay.getsockname()[1]) == os.getpid()
    seen = scripts.onlooker.Processes({"us": [os.getpid()], "nobody": [2**22 + 1]})
    used = seen.cpu_s()
    assert used["us"] > 0 and used["nobody"] == 0
    assert seen.octets("us") > 1 << 20 and seen.octets("nobody") == 0


# --- how it is judged -----------------------------------------------------------------------------


@dataclass
class Call:
    """What is asked of ring.Call."""

    number: int = 0
    state: str = "talking"
    failure: str | None = None
    why: str = ""
    ended_ns: int | None = None
    down: dict = field(default_factory=dict)
    up: dict = field(default_factory=dict)
    silent: dict = field(default_factory=dict)

    def lost_down(self, since, until):
        return self.down.get(since, 0)

    def lost_up(self, since, until):
        return self.up.get(since)

    def silent_ms(self, since, until):
        return self.silent.get(since, 0.0)

    def received(self, since, until):
        return 50

    def gaps_ms(self, since, until, over_ms):
        return [0.0, 1.0]

    def silence_ms(self, since, until):
        return 3.0


SECOND = 10**9


@pytest.fixture
def judge(scripts):
    """Judges a round of three phases of 10 s; `changes` goes into the attack's phase."""

    def judging(calls, answers=(), back=None, off=0, newcomer_ms=20.0, after=None, **more):
        found = []
        for number, name in enumerate(("quiet", "flood", "quiet")):
            since = number * 12 * SECOND
            phase = scripts.phases.Phase(name, since, since + 10 * SECOND, newcomer_ms=20.0)
            phase.sent = {"sent": 100, "octets": 1_000, "forged": more.get("forged", False)}
            phase.back = {"datagrams": 0, "octets": 0, "kinds": {}}
            phase.felt = scripts.phases.felt(calls, phase.since_ns, phase.until_ns)
            found.append(phase)
        found[1].off, found[1].newcomer_ms = off, newcomer_ms
        found[2].newcomer_ms = more.get("behind_ms", 20.0)
        found[1].after.update(after or {})
        found[1].back |= back or {}
        finding = scripts.findings.Finding("judged")
        parts = found[1], (found[0], found[2]), frozenset(answers)
        scripts.phases.Round(*parts).judge(finding, len(calls))
        return finding.failures

    return judging


AT = 12 * SECOND
"""When the attack begins."""


def test_an_attack_that_nobody_notices_is_no_failure(judge):
    assert judge([Call(), Call()]) == []


def test_losses_are_judged_by_those_of_the_quiet(judge):
    """Two calls send and are sent 2,000 packets in the phase: 2 more may be lost."""
    assert judge([Call(down={AT: 1}, up={AT: 1}), Call()]) == []
    assert judge([Call(down={0: 4, AT: 6}), Call()]) == []
    (down,) = judge([Call(down={AT: 3}), Call()])
    (up,) = judge([Call(up={AT: 5, 0: 1, 2 * AT: 2}), Call()])
    assert "lost 3 packets, and [0, 0] in the quiet" in down
    assert "lost 5 packets, and [1, 2] in the quiet" in up


def test_a_call_that_ends_is_a_failure(judge):
    gone = {"number": 4, "state": "failed", "failure": "lost", "why": "nothing came"}
    (during,) = judge([Call(ended_ns=AT + SECOND, **gone)])
    (behind,) = judge([Call(ended_ns=2 * AT + SECOND, **gone)])
    assert during == "flood: a live call ended: call 4, lost: nothing came"
    assert behind == "flood: a live call ended in the quiet behind it: call 4, lost: nothing came"


def test_a_call_that_falls_silent_is_a_failure(judge):
    assert judge([Call(silent={AT: 400.0})]) == []
    (during,) = judge([Call(4, silent={AT: 900.0})])
    (behind,) = judge([Call(4, silent={2 * AT: 900.0})])
    assert during == "flood: a live call was silent as it ended: call 4, for 900 ms"
    assert "silent as the quiet behind it ended" in behind


def test_what_went_to_others_is_not_judged(judge, scripts):
    back = {"datagrams": 2, "octets": 2_000, "kinds": {"dtls": 2}}
    assert len(judge([Call()], back=back)) == 2
    assert judge([Call()], back=back, forged=True) == []
    phase = scripts.phases.Phase("spoofed", back=back)
    phase.sent = {"sent": 5, "octets": 50, "seconds": 1.0, "skipped": 0, "refused": 0, "cpu_s": 0.1}
    phase.sent["forged"] = True
    row = scripts.phases.Round(phase, (phase, phase), frozenset()).sent()
    assert (row["back"], row["back_octets"], row["amplification"]) == (None, None, None)


def test_what_goes_back_is_a_failure_unless_it_is_an_answer(judge):
    back = {"datagrams": 2, "octets": 200, "kinds": {"stun success": 2}}
    (said,) = judge([Call()], back=back)
    assert said == "flood: the attackers were sent {'stun success': 2}"
    assert judge([Call()], answers={"stun success"}, back=back) == []
    (said,) = judge([Call()], answers={"stun success"}, back=back | {"octets": 1_001})
    assert said == "flood: 1001 octets went back for 1000 that were sent"


def test_a_counter_that_is_missing_and_a_call_that_cannot_begin_are_failures(judge):
    (law,) = judge([Call()], off=3)
    (newcomer,) = judge([Call()], newcomer_ms=None)
    (behind,) = judge([Call()], behind_ms=None)
    assert judge([Call()], after={"inbound_received": 50}) == []
    (another,) = judge([Call()], after={"inbound_received": 40, "socket_public_dropped": 9})
    assert "of 100 datagrams 49 arrived" in another
    assert "3 datagrams are in no counter" in law
    assert "a new call did not connect during the attack" in newcomer
    assert "a new call did not connect in the quiet behind it" in behind


def test_a_new_call_must_connect_before_anything_is_attacked(scripts):
    quiet, attack, behind = (scripts.phases.Phase(name) for name in ("quiet", "flood", "quiet"))
    attack.newcomer_ms = behind.newcomer_ms = 20.0
    attack.sent = {"sent": 1, "octets": 1}
    attack.back = {"datagrams": 0, "octets": 0, "kinds": {}}
    round_ = scripts.phases.Round(attack, (quiet, behind), frozenset())
    finding = scripts.findings.Finding("judged")
    scripts.aftermath.Account(finding, [Call()], [round_], [], 0)
    assert finding.failures == ["a new call did not connect before anything was attacked: "]


# --- whom it speaks to ----------------------------------------------------------------------------


class Answer:
    """Of signaling: where the call is, it says."""

    def __init__(self, where, status=201):
        self.status, self.headers = status, {"Location": where}

    async def text(self):
        return "a=ice-ufrag:hint\r\na=ice-pwd:password\r\n"

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass


class Http:
    """Answers all requests alike, and keeps them."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def post(self, url, **options):
        self.asked.append((url, options))
        return self.answer

    get = post


PAGE = "http://127.0.0.1:8080"


def place(scripts, http):
    plan = scripts.assault.Plan(PAGE, ("127.0.0.1", 1), (), 1, 1, 1, 1, key="secret")
    return asyncio.run(scripts.assault.place(http, plan, random.Random(1)))


@pytest.mark.parametrize(
    "where",
    [
        "/v1/realtime/calls/rtc_1",
        f"{PAGE}/v1/realtime/calls/rtc_1/",
        "@evil.org/rtc_1",
        f"{PAGE}.evil.org/rtc_1",
        f"{PAGE}@evil.org/rtc_1",
    ],
)
def test_a_call_is_hung_up_at_the_page_wherever_it_is_said_to_be(scripts, where):
    http = Http(Answer(where))
    found, own = place(scripts, http)
    assert found == f"{PAGE}/v1/realtime/calls/rtc_1"
    assert own == scripts.attacks.Own("hint", b"password")
    ((_, options),) = http.asked
    assert options["allow_redirects"] is False and options["timeout"].total > 0
    assert options["headers"]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("where", ["", "/", "/calls/..", "/calls/a?b", "/calls/a@b"])
def test_a_call_without_an_id_is_refused(scripts, where):
    with pytest.raises(OSError, match="names no call"):
        place(scripts, Http(Answer(where)))


def test_a_page_of_metrics_is_a_target(scripts):
    with pytest.raises(scripts.target.TargetError, match=r"--metrics.*public address"):
        scripts.assault._metrics("http://8.8.8.8/metrics", None, False)
    assert scripts.assault._metrics(None, None, False) is None
    for at, url in (("0.0.0.0:9", "127.0.0.1:9"), ("[::1]:9", "[::1]:9")):
        table = settings.RelayTable(
            public="127.0.0.1:1", internal="127.0.0.1:2", metrics=settings.Endpoint(at)
        )
        configured = type("Configured", (), {"relay": table})
        assert scripts.assault._metrics(None, configured, False) == f"http://{url}/metrics"


def test_a_page_of_metrics_sends_nobody_on(scripts):
    http = Http(Answer("http://127.0.0.2/", status=302))
    with pytest.raises(OSError, match="no relay's page"):
        asyncio.run(scripts.onlooker.Page(http, f"{PAGE}/metrics").read())
    assert http.asked[0][1]["allow_redirects"] is False


# --- the command ----------------------------------------------------------------------------------


def command(*words):
    return [sys.executable, SCRIPTS / "flood.py", "attack", *map(str, words)]


def ran(*words):
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "say --page and --relay, or --start"),
        (("--start", "--relay", "127.0.0.1:3478"), "say --page and --relay, or --start"),
        (("--start", "--config", "relay.toml"), "--start has a configuration"),
        (("--page", "http://[::1]/", "--relay", "[::1]:1", "--keys", "k"), "--keys needs --config"),
        (("--start", "--only", "nonsense"), "no attack is called nonsense"),
        (
            ("--page", "http://127.0.0.1:1/", "--relay", "203.0.113.5:3478"),
            "203.0.113.5 is a public address",
        ),
        (("--page", "http://127.0.0.1:1/", "--relay", "[::1]:3478"), "speak IPv4 only"),
    ],
)
def test_what_may_not_be_attacked_is_refused(scripts, words, reason):
    cli = typer.Typer()
    cli.command()(scripts.assault.attack)
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def system(scripts):
    with scripts.dev.running(None, True, "127.0.0.1", False, patient=True) as (_, about):
        yield about


def test_an_attack_from_the_command_line(system, tmp_path):
    """Everything that was sent is dropped and counted, and whoever sent it hears nothing."""
    done = ran(
        *("--page", system["page"], "--relay", system["relay"], "--calls", 1),
        *("--config", Path(system["state_dir"]) / "relay.toml", "--only", "random-hints"),
        *("--seconds-each", 1, "--rate", 500, "--json", "--report", tmp_path / "report.html"),
    )
    print(done.stderr)
    found = json.loads(done.stdout)
    (sent,), (counted,) = found["sent"], found["counted"]
    assert sent["sent"] > 0 and sent["back"] == 0
    assert counted["dropped"] + counted["kernel_dropped"] == sent["sent"]
    assert counted["in_no_counter"] == 0 and counted["mib"] > 1
    drops = {"ufrag_malformed", "ufrag_unknown_key", "ufrag_forged"}
    assert set(found["dropped"]["random-hints"]) <= drops
    assert [row["phase"] for row in found["felt"]] == ["quiet", "random-hints", "quiet"]
    assert all(row["received"] > 0 and row["ended"] == 0 for row in found["felt"])
    assert done.returncode == bool(found["failures"])
    assert "random-hints" in (tmp_path / "report.html").read_text()


def test_an_interrupt_ends_the_attackers_too(system):
    page, relay = ("--page", system["page"]), ("--relay", system["relay"])
    process = subprocess.Popen(
        command(*page, *relay, "--calls", 1), stderr=subprocess.PIPE, text=True
    )
    try:
        while not (children := attackers_of(process.pid)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert "what was started has ended" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    deadline = time.monotonic() + PATIENCE_S
    for pid in children:  # the last of them has read that there is nobody any more
        while lives(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def attackers_of(pid):
    """Its children that are attackers: others come and go while it starts."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        with contextlib.suppress(OSError):
            if b"attackers.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def lives(pid):
    """False for a process that has ended, also if nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

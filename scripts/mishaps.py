"""What happens to calls when parts of the Global Relay are lost in the middle of them.

For lab.py. Both sides speak; then a site goes, or a cluster's relay, or the backbone between two of
them, and the packets that the world has seen say for how long there was silence, each way.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hearing
from estate import Estate, Lab, Voice

Figures = dict[str, Any]

SETTLE_S = 1.5
"""Of a reply that flows, before something happens."""

LISTENED_S = 2.5
"""How long is listened after something has happened, and after it is whole again."""

SITE_PATIENCE_S, BROWSER_PATIENCE_S = 40.0, 17.0
"""After a site is lost: aioice gives up after 24 to 36 s, Chromium after 15."""

OLD_S = 45.0
"""A call that is older has lost, in Chromium, whatever path it has not heard from for 30 s."""

SILENCE_MS_MAX = 1_000.0
"""What a lost transit path, or a lost relay behind it, may cost."""

NOTICED_S = 8.0
"""After this signaling has asked three times over, and a fourth for good measure, with patience for
each answer: it names a lost site no more, or one that is back again."""


@dataclass
class Talk:
    """A call in which both sides speak: the caller always, the parrot since some moments."""

    voice: Voice
    estate: Estate
    begun: float
    relays: list[str]

    @property
    def caller(self) -> str:
        """The name of the caller's host."""
        return self.voice.name

    def carrier(self) -> tuple[str, str, str]:
        """The hosts by which it goes: the site, the cluster's relay, the transceiver's."""
        entry, hop, machine = hearing.carrier(self.estate.fabric.seen(), self.caller)
        return self.estate.host_of(entry), self.estate.host_of(hop), machine

    def around(self, at: float, until: float | None = None) -> dict[str, hearing.Heard]:
        """What was heard from a moment until now."""
        seen = self.estate.fabric.seen()
        return hearing.around(seen, self.caller, at, until or time.monotonic())


@contextmanager
def talking(
    estate: Estate, name: str, talk_s: float, age_s: float = 0.0, door: int | None = None
) -> Iterator[Talk]:
    """A call of `talk_s` of speech, then the parrot's as long reply, and so on; entered when a
    reply flows and the call is at least so old."""
    voice, region = estate.voices[name], name.partition("/")[0]
    cluster = estate.clusters[door] if door else estate.nearest(region)
    estate.fabric.watch()
    call = voice.ask(
        "call",
        url=estate.door(cluster),
        key=estate.key,
        headers=estate.headers(region),
        talk_s=talk_s,
    )
    try:
        replies = 1
        voice.ask("until", event="output_audio_buffer.started", count=replies, most_s=80)
        while time.monotonic() < call["connected"] + age_s:
            replies += 1
            voice.ask("until", event="output_audio_buffer.started", count=replies, most_s=80)
        estate.fabric.watch()
        time.sleep(SETTLE_S)
        yield Talk(voice, estate, call["connected"], call["relays"])
    finally:
        voice.ask("hangup")


def site(lab: Lab) -> Figures:
    """The nearest site is lost while both speak; later it comes back."""
    rows: list[Figures] = []
    estate, browsers = lab.estate(), lab.plan.browsers
    cases = [] if lab.quick and browsers else [(lab.plan.callers[0], 0.0)]
    for region in browsers:
        if region in lab.plan.sites:
            cases.append((f"{region}/chromium", 0.0))
            cases += [] if lab.quick else [(f"{region}/chromium", OLD_S)]
    for name, age_s in cases:
        lost = name.partition("/")[0]
        at, row = _lose_site(lab, estate, name, age_s)
        if not rows:
            row |= _new_callers(lab, estate, lost, at)
        rows.append(row)
        if len(rows) < len(cases):
            estate.site_back(lost)
            time.sleep(NOTICED_S)
    return {"rows": rows, "words": SITE_WORDS}


SITE_WORDS = {
    "silence_ms": "longest pause at the transceiver's link (up), at the caller's (down)",
    "states": "what the client said of its connection, in seconds after the loss",
    "then_by_a_new_offer_s": "from a POST with ?resume= to connected, once the client has closed",
    "new_callers_are_told": "by signaling, to whom calls at_the_latest_after_s",
}


def _lose_site(lab: Lab, estate: Estate, name: str, age_s: float) -> tuple[float, Figures]:
    """When it was lost, and what became of a call."""
    region, browser = name.partition("/")[0], "/" in name
    talk_s = 9.0 if lab.quick else 24.0
    with talking(estate, name, talk_s, age_s) as talk:
        lab.must(len(talk.relays) >= 2, "the answer names fewer than two sites")
        entry = talk.carrier()[0]
        age = time.monotonic() - talk.begun
        pairs = talk.voice.ask("state").get("pairs", [])
        at = estate.lose_site(region)
        patience_s = BROWSER_PATIENCE_S if browser else SITE_PATIENCE_S
        state = _until_heard(talk, at, patience_s)
        heard = talk.around(at)
        states = [(round(when - at, 1), what) for when, what in state["states"] if when >= at]
        anew = _post_again(estate, talk) if state["state"] == "closed" else {}
        if browser:
            for direction, found in heard.items():
                lab.must(
                    found.silence_ms is not None, f"{name}, {age:.0f} s old: {direction} never"
                )
    row = {
        "caller": name,
        "client": "Chromium" if browser else "stock aiortc",
        "call_age_s": round(age),
        "entered_at": entry,
        "goes_on_at": estate.host_of(state["by"] or "") if heard["down"].silence_ms else "",
        **_flat(heard),
        "states": states,
        "pairs_before": [
            f"{estate.host_of(each['to'] or '')}: {each['answered']} of {each['sent']} checks"
            for each in pairs
        ],
        **anew,
    }
    lab.say(str(row))
    return at, row


def _post_again(estate: Estate, talk: Talk) -> Figures:
    """A client that has been told of its end posts another offer, as an application would."""
    region = talk.voice.name
    call = talk.voice.ask(
        "call",
        url=estate.door(estate.nearest(region)),
        key=estate.key,
        headers=estate.headers(region),
        resume=True,
    )
    return {
        "then_by_a_new_offer_s": round(call["connected"] - call["posted"], 2),
        "which_enters_at": estate.host_of(call["by"]),
    }


def _until_heard(talk: Talk, at: float, patience_s: float) -> Figures:
    """Wait until the call is heard again both ways, or closed; what has become of it."""
    while True:
        time.sleep(0.5)
        now = time.monotonic()
        state: Figures = talk.voice.ask("state")
        seen = talk.estate.fabric.seen()
        back = [
            any(each.point == point and each.at > at + 0.3 for each in seen)
            for point in ("heard", "received")
        ]
        if all(back):
            time.sleep(LISTENED_S)
            return dict(talk.voice.ask("state"))
        if now > at + patience_s or state["state"] in ("closed", "failed"):
            return state


def _flat(heard: dict[str, hearing.Heard]) -> Figures:
    return {
        f"{direction}_{name}": value
        for direction, found in heard.items()
        for name, value in found.figures().items()
    }


def _new_callers(lab: Lab, estate: Estate, lost: str, since: float) -> Figures:
    """People call until signaling knows of the loss: what they are told, and how they enter."""
    voice, region = estate.voices[lost], lost
    while True:
        call = voice.ask(
            "call",
            url=estate.door(estate.nearest(region)),
            key=estate.key,
            headers=estate.headers(region),
        )
        voice.ask("hangup")
        told = [estate.host_of(each) for each in call["relays"]]
        # Where there are but two, the second stands behind the first, in case it comes back.
        known = told if len(estate.sites) > 2 else told[:1]
        noticed = estate.sites[lost].host not in known
        if noticed or call["posted"] > since + NOTICED_S:
            break
        time.sleep(0.5)
    lab.must(noticed, f"{NOTICED_S:g} s after the loss new callers are told of {told}")
    return {
        "new_callers_are_told": told,
        "at_the_latest_after_s": round(call["posted"] - since, 1),
        "new_caller_enters_at": estate.host_of(call["by"]),
    }


def relay(lab: Lab) -> Figures:
    """A relay of the owning cluster is killed and not started again, or lost with its host."""
    rows, estate = [], lab.estate()
    region = lab.plan.callers[0]
    for how in ("host lost",) if lab.quick else ("killed", "host lost") * 3:
        with talking(estate, region, talk_s=6.0 if lab.quick else 10.0) as talk:
            entry, hop, _ = talk.carrier()
            at = estate.fabric.lose(hop) if how == "host lost" else time.monotonic()
            estate.kill(hop)
            time.sleep(LISTENED_S)
            rows.append(_row(lab, talk, at, {"relay": hop, "how": how, "entered_at": entry}))
        estate.start_again(hop)
        estate.wait_ready(hop)
        estate.fabric.restore(hop)
    return {"rows": rows}


def transit(lab: Lab) -> Figures:
    """The backbone between the site and the cluster's relay is cut, and mended."""
    rows, estate = [], lab.estate()
    region = lab.plan.callers[0]
    for _ in range(1 if lab.quick else 3):
        with talking(estate, region, talk_s=7.0 if lab.quick else 12.0) as talk:
            entry, hop, _ = talk.carrier()
            ends = [estate.fabric.hosts[name].addresses[0] for name in (entry, hop)]
            path = {"between": entry, "and": hop}
            at = estate.fabric.cut(*ends)
            time.sleep(LISTENED_S)
            rows.append(_row(lab, talk, at, {"what": "cut", **path}))
            at = estate.fabric.mend(*ends)
            time.sleep(LISTENED_S)
            rows.append(_row(lab, talk, at, {"what": "mended", **path}))
    return {"rows": rows}


def _row(lab: Lab, talk: Talk, at: float, about: Figures) -> Figures:
    """What was heard from a moment until now; it is to be under a second of silence, but where it
    is only asked whether all works: other programs may have the CPU then."""
    heard = talk.around(at)
    for direction, found in heard.items():
        soon = lab.quick or (found.silence_ms or 0) < SILENCE_MS_MAX
        lab.must(
            found.silence_ms is not None and soon,
            f"{' '.join(map(str, about.values()))}: {direction} {found.figures()}",
        )
    row = {**about, "goes_on_by": talk.carrier()[1], **_flat(heard)}
    lab.say(str(row))
    return row


PARTS = {"relay": relay, "transit": transit, "site": site}
"""The last one leaves a site lost."""

"""What the transceiver counts and times: its counters, and its histograms.

What it owns: two catalogues. `Transceiver` counts datagrams, sessions and what became of frames;
`Timing` says what is timed, in which unit and in which steps. Programs reach both as
`metrics.Transceiver` and `metrics.Timing`; the numbers themselves are ledger.py's.

Rules that stay true:
- Base units: seconds, and fractions of one. A histogram's steps end where the answer to "is it
  good?" changes: at a promise, at what a person hears, at a deadline.
- What happens for every packet is counted, never timed, but for the pacer's ticks: an observation
  costs a fifth of a microsecond.

https://prometheus.io/docs/practices/histograms/
"""

import ledger


class Transceiver(ledger.Kinds):
    """The transceiver: its media socket and its sessions."""

    RECEIVED = "datagrams", "Taken from the media socket."
    FORWARDED = "datagrams", "Handed to the session they belong to."
    DROPPED_NOT_RELAY = (
        "datagrams",
        "From an address outside relay_prefixes.",
        "Something else sends to the media port, or a relay is missing from relay_prefixes.",
    )
    DROPPED_BAD_FRAME = (
        "datagrams",
        "Without the header that stands before every client's datagram.",
        "A relay of another version.",
    )
    DROPPED_UNKNOWN_CLIENT = (
        "datagrams",
        "From a client address that no session knows.",
        "Media that outlived its session, or came before its first check.",
    )
    DROPPED_UNKNOWN_SESSION = (
        "datagrams",
        "A check for a ufrag that no session has.",
        "A client that outlived its session, or a replay.",
    )
    DROPPED_STUN_MALFORMED = (
        "datagrams",
        "STUN that is no well-formed Binding Request, and no answer to one.",
        "Garbage that came through a live flow.",
    )
    DROPPED_BAD_INTEGRITY = (
        "datagrams",
        "A check, or an answer to one of ours, whose MESSAGE-INTEGRITY is wrong.",
        "A client with a stale answer, or someone who injects into a flow.",
    )
    DROPPED_STUN_UNASKED = (
        "datagrams",
        "An answer to no check that is under way on its path.",
        "Answers that come seconds late or by another relay, or someone who makes them up.",
    )
    DROPPED_UNKNOWN_KIND = (
        "datagrams",
        "Neither STUN, DTLS nor RTP by the first octet.",
        "Garbage that came through a live flow.",
    )
    DROPPED_OVERSIZED = (
        "datagrams",
        "Larger than 1,500 octets without the frame.",
        "A relay that forwards more than clients send, or garbage.",
    )
    DROPPED_STUN_REPLAYED = (
        "datagrams",
        "A check whose transaction id came from another address before.",
        "Someone replays recorded checks; the session does not move.",
    )
    DROPPED_ADDRESS_HELD = (
        "datagrams",
        "A check for a session from an address where another session is alive.",
        "A forged source, or a client that reuses a port within a second of another call.",
    )
    DROPPED_BAD_SRTP = (
        "datagrams",
        "SRTP or SRTCP that does not authenticate, or that came before.",
        "Duplicated packets, or someone who injects into a flow.",
    )
    DROPPED_GUESS_LIMIT = (
        "datagrams",
        "SRTP from an unknown address with the SSRC of a call, beyond the failures allowed.",
        "Someone floods with the SSRCs of live calls; a client that roams waits for its check.",
    )
    DROPPED_EARLY = (
        "datagrams",
        "SRTP before its keys, beyond the second of it that is kept.",
        "A client that speaks but does not finish its DTLS handshake.",
    )
    DROPPED_BACKLOG = (
        "datagrams",
        "DTLS that its session has not kept up with.",
        "A client that floods its data channel, or an overloaded process.",
    )
    DROPPED_FAULT = (
        "datagrams",
        "Met a mistake in this program; the log has it.",
        "A defect: please report it. The session it belonged to has ended, others go on.",
    )
    ICE_RESTARTS = "times", "Sessions given new ICE credentials."
    ADDRESSES_LEARNED = "addresses", "Of clients, learned from SRTP before any check came."
    CHECKS_SENT = (
        "datagrams",
        "Checks of our own, so that ways in stay open that clients do not use.",
        "Many more than CHECKS_ANSWERED: a relay or a network has let such a way be lost.",
    )
    CHECKS_ANSWERED = "datagrams", "Authentic answers to them."
    CHECKS_REFUSED = (
        "datagrams",
        "Errors in answer to them. The call goes on.",
        "Clients that do not expect checks: a way in that they do not use may close.",
    )
    SENT = "datagrams", "Sent to a relay."
    SEND_FAILED = (
        "datagrams",
        "Refused by the kernel when sent to a relay.",
        "No route, or a send buffer that stayed full.",
    )
    PACED_LATE = (
        "packets",
        "Audio that left more than 5 ms after its time.",
        "An overloaded process: lower load_max, or give it more of a CPU.",
    )
    SESSIONS_OPENED = "sessions", "Offers answered."
    SESSIONS_CONNECTED = "sessions", "Sessions whose media became live."
    RESUMED = "sessions", "Of those opened, ones that go on with the conversation of another call."
    REDIS_UP = (
        "state",
        "1 while Redis answers.",
        "0 with [redis]: signaling that starts now does not find this process, and conversations"
        " end with it.",
        True,
    )
    RECORDS_WRITTEN = "records", "Of conversations, written to Redis for other transceivers."
    RECORDS_FAILED = (
        "records",
        "Attempts to write one that Redis did not take.",
        "Redis is away or full: should this process die now, its conversations are lost.",
    )
    RESUME_UNAVAILABLE = (
        "sessions",
        "Of those opened, ones that asked for a conversation that is not known, or not to them.",
        "Clients come back too late, or Redis has lost records, or did not answer.",
    )
    SIDEBANDS = "connections", "Attending a call now.", "", True
    SIDEBANDS_DROPPED = (
        "connections",
        "Sidebands that were let go because they did not read what they were told.",
        "An application's server that hangs, or a network that loses much. Its call goes on.",
    )
    REFUSED_DRAINING = (
        "offers",
        "Refused because the process drains.",
        "Signaling still asks it, which does no harm: it asks the next one.",
    )
    REFUSED_SESSIONS = (
        "offers",
        "Refused because sessions_max was reached.",
        "More calls than this process is configured for.",
    )
    REFUSED_CONNECTING = (
        "offers",
        "Refused because connecting_max sessions were connecting.",
        "A burst of callers, as after a fault elsewhere, or somebody who only ever connects.",
    )
    REFUSED_LOAD = (
        "offers",
        "Refused because the process was loaded: load_max or lag_s_max was reached, or would be.",
        "More calls than the CPU carries, or something else on this machine takes it.",
    )
    SESSIONS_CLOSED = "sessions", "Sessions that ended, whatever the reason."
    SESSIONS = "sessions", "Sessions now.", "", True
    SESSIONS_OFFERED = "sessions", "Of them, those whose client has not come yet.", "", True
    SESSIONS_CONNECTING = "sessions", "Of them, those in their DTLS handshake.", "", True
    SESSIONS_LIVE = "sessions", "Of them, those with media.", "", True
    LOAD = (
        "thousandths",
        "How near the process is to refusing calls by what it measures of itself: 1000 is there.",
        "Compare with REFUSED_LOAD. /v1/health has the parts of it.",
        True,
    )
    TASKS = (
        "tasks",
        "Of asyncio: one for each session, one for each request, and a few.",
        "Many more than sessions and requests: something is left behind; please report it.",
        True,
    )
    ENDED_NEVER_CONNECTED = (
        "sessions",
        "Ended since their client was not connected by connect_deadline_s.",
        "Clients that cannot reach a relay's address, or offers that nobody meant.",
    )
    ENDED_VANISHED = (
        "sessions",
        "Ended since nothing came from their client for silence_deadline_s.",
        "Closed laptops, tunnels, crashes; where it is many, a relay or a network in between.",
    )
    ENDED_EXPIRED = (
        "sessions",
        "Ended by session_s_max.",
        "Calls that are long, or that somebody has forgotten.",
    )
    ENDED_BACKEND = (
        "sessions",
        "Ended since their model server was lost for good.",
        "A model server is down: callers were told, and heard nothing more.",
    )
    ENDED_FAULT = (
        "sessions",
        "Ended by a mistake in this program; the log has it.",
        "A defect: please report it. Other sessions did not notice.",
    )
    BACKEND_RECONNECTS = (
        "connections",
        "To model servers, made again in mid-call.",
        "Model servers restart or are overloaded; each time a caller waits.",
    )
    BACKEND_CONNECT_FAILED = (
        "attempts",
        "To reach a model server, that failed.",
        "Model servers are down, refuse the key, or do not speak the protocol.",
    )
    BACKEND_AUDIO_DROPPED = (
        "octets",
        "Of callers' PCM, dropped while their model server was away or did not keep up.",
        "What was said then was not heard.",
    )
    BACKEND_GARBLED = (
        "messages",
        "Of model servers, that could not be understood and were ignored.",
        "A model server of another version, or no model server at all.",
    )
    ERRORS_CLIENT = (
        "events",
        "Errors told to clients about their own events.",
        "A client that speaks the protocol wrongly: somebody's new program, mostly.",
    )
    ERRORS_SERVER = (
        "events",
        "Errors told to clients that are not their fault.",
        "Model servers that fail or are lost; the log has which.",
    )
    FRAMES_DECODED = "frames", "Of the clients' audio, decoded in order."
    FRAMES_CONCEALED = (
        "frames",
        "Lost and made up from what was before.",
        "Loss that redundancy did not cover: compare with LOSS_IN.",
    )
    FRAMES_RECOVERED = "frames", "Lost and restored by the redundancy in the next packet."
    FRAMES_LATE = (
        "frames",
        "That came after their place had been filled.",
        "Reordering or jitter of more than two packets.",
    )
    FRAMES_DUPLICATE = "frames", "That came twice.", "A network that duplicates."
    FRAMES_STRAY = (
        "frames",
        "Too far from the others in sequence or time to belong to them.",
        "A client that restarts its stream, or garbage from an authenticated client.",
    )
    FRAMES_MALFORMED = (
        "frames",
        "That are no Opus.",
        "A broken client; its session goes on.",
    )
    FRAMES_SURPLUS = (
        "frames",
        "Beyond real time, and not decoded.",
        "A client that floods its session with audio; nobody else notices.",
    )


_SETUP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 15.0)
"""A call's set-up: two round trips are 20 ms in a city and 500 ms by satellite; at 15 s it ends."""

_ANSWER = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
"""An answer in a conversation: 60 ms is the promise for the parrot, a second is what people find
slow."""

_NETWORK = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
"""A network's delays: jitter is heard beyond the 20 ms of a frame, a round trip beyond 300 ms."""

_LOSS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Lost packets, of all. Redundancy hides 5 %, concealment 10 % for a while."""

_PROCESS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Delays of our own: 5 ms at p99 is the promise, 20 ms are a frame, 100 ms a hole that is heard."""


class Timing(ledger.Measures):
    """What the transceiver times, call by call but for the last four."""

    SETUP_CHECK = (
        "seconds",
        "From the offer to the client's first authenticated check.",
        _SETUP,
        "The way of the answer through signaling, and the client's own time; not ours.",
    )
    SETUP_CONNECTED = (
        "seconds",
        "From the offer to DTLS being up.",
        _SETUP,
        "Beyond the first check plus a round trip: lost flights, or an overloaded process.",
    )
    SETUP_AUDIO = (
        "seconds",
        "From the offer to the first audio packet of the client.",
        _SETUP,
        "Clients that take long to open their microphone.",
    )
    SETUP_CHANNEL = (
        "seconds",
        "From the offer to the opening of the data channel, when session.created leaves.",
        _SETUP,
        "Beyond DTLS plus two round trips: lost packets of SCTP, or an overloaded process.",
    )
    BACKEND_CONNECT = (
        "seconds",
        "From the attempt to reach the model server to its session.created.",
        _ANSWER,
        "A model server that is far away or overloaded: callers wait for its greeting.",
    )
    REPLY = (
        "seconds",
        "From the end of the client's turn, as the backend says it, to the reply's first packet.",
        _ANSWER,
        "The model server's time to its first sound. The parrot's is under 20 ms.",
    )
    INTERRUPTION = (
        "seconds",
        "From the event that interrupts a reply until nothing more of it is sent.",
        _PROCESS,
        "An overloaded process: people hear a voice that goes on over their own.",
    )
    ROUND_TRIP = (
        "seconds",
        "To the client and back, by its reports.",
        _NETWORK,
        "Clients far away, or on crowded links.",
    )
    JITTER_IN = (
        "seconds",
        "Of the client's packets as they arrive (RFC 3550), once a second.",
        _NETWORK,
        "Crowded links; beyond a frame some packets come too late to be used.",
    )
    JITTER_OUT = (
        "seconds",
        "Of our packets as they arrive at the client, by its reports.",
        _NETWORK,
        "Crowded links, or our pacer: compare with PACER.",
    )
    LOSS_IN = (
        "ratio",
        "Of the client's packets, those that never came, of the last second.",
        _LOSS,
        "Loss between client and relay, or a full buffer at one of the sockets.",
    )
    LOSS_OUT = (
        "ratio",
        "Of our packets, those that did not reach the client, by its reports.",
        _LOSS,
        "Loss between relay and client.",
    )
    PACER = (
        "seconds",
        "How late the pacer sends a frame of audio.",
        _PROCESS,
        "An overloaded process: lower load_max, or give it more of a CPU.",
    )
    LOOP_LAG = (
        "seconds",
        "How late the event loop runs what is due, twenty times a second.",
        _PROCESS,
        "Something holds up the loop: too many sessions, or a pause of the collector.",
    )
    COLLECTION = (
        "seconds",
        "Pauses of Python's garbage collector.",
        _PROCESS,
        "Part of LOOP_LAG: sessions leave cycles behind, which only the collector frees.",
    )
    TICK = (
        "seconds",
        "How long the process takes for its round of all sessions, twenty times a second.",
        _PROCESS,
        "Too many sessions, or a backend that is slow in its own process.",
    )

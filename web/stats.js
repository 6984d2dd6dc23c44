// Figures of the connection from getStats, as text for people.
//
// What it owns: which of the many reports is read, and the differences between two readings. Browsers
// lack some figures at times (Firefox knows no transport report, Chromium no round trip before the
// first receiver report): those read "–".
// https://www.w3.org/TR/webrtc-stats/

const NONE = "–";

export class Stats {
  #before = null;

  // Returns {roundTripMs, lossIn, lossOut} as numbers or null, and `figures`, the texts.
  read(report) {
    const found = pick(report);
    const { pair, local, inbound, outbound, remote, codec } = found;
    const now = {
      at: performance.now(),
      bytesIn: inbound?.bytesReceived ?? 0,
      bytesOut: outbound?.bytesSent ?? 0,
      lost: inbound?.packetsLost ?? 0,
      received: inbound?.packetsReceived ?? 0,
      delay: inbound?.jitterBufferDelay ?? 0,
      emitted: inbound?.jitterBufferEmittedCount ?? 0,
    };
    const before = this.#before ?? now;
    this.#before = now;
    const seconds = (now.at - before.at) / 1000;
    const roundTrip = pair?.currentRoundTripTime ?? remote?.roundTripTime;
    // Since the start of the call: one late second would flicker by and tell nobody.
    const lossIn = ratio(now.lost, now.lost + now.received);
    const lossOut = remote?.fractionLost ?? null;
    const delay = ratio(now.delay - before.delay, now.emitted - before.emitted);
    return {
      roundTripMs: roundTrip === undefined ? null : roundTrip * 1000,
      lossIn,
      lossOut,
      packetsIn: now.received,
      packetsOut: outbound?.packetsSent ?? 0,
      figures: {
        roundTrip: milliseconds(roundTrip),
        loss: `${percent(lossIn)} / ${percent(lossOut)}`,
        jitter: milliseconds(inbound?.jitter),
        delay: milliseconds(delay),
        codec: codec ? codecName(codec) : NONE,
        rate: seconds > 0
          ? `${kilobits(now.bytesIn - before.bytesIn, seconds)} / `
            + `${kilobits(now.bytesOut - before.bytesOut, seconds)} kbit/s`
          : NONE,
        path: pair ? pathOf(pair, local, report.get(pair.remoteCandidateId)) : NONE,
      },
    };
  }
}

function pick(report) {
  const found = {};
  for (const entry of report.values()) {
    if (entry.type === "inbound-rtp" && entry.kind === "audio") found.inbound = entry;
    if (entry.type === "outbound-rtp" && entry.kind === "audio") found.outbound = entry;
    if (entry.type === "remote-inbound-rtp") found.remote = entry;
    if (entry.type === "transport") found.pair ??= report.get(entry.selectedCandidatePairId);
  }
  if (!found.pair) {
    found.pair = [...report.values()].find(
      (entry) => entry.type === "candidate-pair" && entry.nominated && entry.state === "succeeded",
    );
  }
  found.local = report.get(found.pair?.localCandidateId);
  found.codec = report.get(found.inbound?.codecId) ?? report.get(found.outbound?.codecId);
  return found;
}

function pathOf(pair, local, remote) {
  const protocol = (local?.protocol ?? remote?.protocol ?? "").toUpperCase();
  const address = remote?.address?.includes(":") ? `[${remote.address}]` : remote?.address;
  return remote ? `${protocol} ${address ?? "?"}:${remote.port}` : NONE;
}

function codecName({ mimeType, clockRate }) {
  const name = mimeType.replace("audio/", "");
  return `${name[0].toUpperCase()}${name.slice(1)}, ${clockRate / 1000} kHz`;
}

const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const percent = (share) => (share === null ? NONE : `${(share * 100).toFixed(1)} %`);
const kilobits = (octets, seconds) => Math.round((octets * 8) / 1000 / seconds);
const milliseconds = (seconds) =>
  seconds === undefined || seconds === null ? NONE : `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

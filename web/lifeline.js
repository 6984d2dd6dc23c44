// The lifeline: whether the server that has a call is still there.
//
// A call whose server has died looks like one with a bad network: nothing comes any more, and the
// browser takes many seconds to call that a failure. But signaling knows: it is asked for the call
// as soon as less comes than should, which costs next to nothing where it was a false alarm.
//
// What it owns: when to be suspicious, and the answer to the question.

import { authorization } from "./key.js";

// How often to look.
const LOOK_MS = 150;

// Silence that is suspicious. The server sends a report every second, and while a reply sounds 50
// packets: networks that make such pauses by themselves cost a question each.
const SILENT_MS_MAX = 1300;
const SILENT_MS_MAX_SOUNDING = 400;

// Silence after which the connection is given up although the call is there, if the browser doubts
// it, too: the path has broken, and ICE, which looks for another one meanwhile, has not found any.
const PATH_MS_MAX = 5000;

// Between two questions, and how long one may take: longer than signaling waits for a server that
// hangs before it says that it does.
const ASK_MS = 1000;
const ANSWER_MS_MAX = 3500;

export class Lifeline {
  heardAt = performance.now();
  #peer;
  #location;
  #call;
  #timer;
  #received = -1;
  #asking = false;
  #askAt = 0;

  // Follows the connection `peer` of the call at `location`, until `stop`. The `call` has
  // `sounding`, whether a reply is being heard; and is told `silent()` once nothing has come for
  // too long, `heard()` when something does again, and `lost()` once there is nothing to wait for.
  constructor(peer, location, call) {
    this.#peer = peer;
    this.#location = location;
    this.#call = call;
    this.#timer = setInterval(() => this.#look(), LOOK_MS);
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = null;
  }

  async #look() {
    const received = packets(await this.#peer.getStats());
    const now = performance.now();
    if (this.#timer === null) return;
    if (received !== this.#received) {
      this.#received = received;
      this.heardAt = now;
      this.#call.heard();
      return;
    }
    const most = this.#call.sounding ? SILENT_MS_MAX_SOUNDING : SILENT_MS_MAX;
    if (now - this.heardAt > most && now > this.#askAt && !this.#asking) await this.#ask();
  }

  async #ask() {
    const heardAt = this.heardAt;
    this.#asking = true;
    const answer = await status(this.#location);
    this.#asking = false;
    this.#askAt = performance.now() + ASK_MS;
    if (this.#timer === null || this.heardAt !== heardAt) return;
    const silent = performance.now() - heardAt;
    const broken = silent > PATH_MS_MAX && this.#peer.connectionState !== "connected";
    if (answer === "gone" || (answer === "there" && broken)) this.#call.lost();
    else if (silent > SILENT_MS_MAX) this.#call.silent();
  }
}

// "there", "gone", or "unreachable" if it is this end that has no network.
async function status(location) {
  try {
    const signal = AbortSignal.timeout(ANSWER_MS_MAX);
    const response = await fetch(location, { headers: authorization(), signal });
    return response.ok ? "there" : "gone";
  } catch {
    return "unreachable";
  }
}

// Grows with all that comes, reports and STUN included, as far as this browser counts it.
function packets(report) {
  let sum = 0;
  for (const entry of report.values()) {
    sum += (entry.packetsReceived ?? 0) + (entry.roundTripTimeMeasurements ?? 0);
    if (entry.type === "candidate-pair") {
      sum += (entry.responsesReceived ?? 0) + (entry.bytesReceived ?? 0);
    }
  }
  return sum;
}

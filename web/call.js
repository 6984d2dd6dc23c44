// One call: microphone, peer connection, data channel, and the HTTP requests around them.
//
// What it owns: the state of the connection and every error's sentence for people. It knows nothing
// of the page; it says what happens by events:
//   state   {state, error}        see STATES; `error` is a CallError with the state "failed"
//   reply   {stream}              the stream of the reply, to be played
//   message {direction, event}    one Realtime event, "sent" or "received"
//   lost    {}                    the line is lost: what was under way will not be finished
//   resumed {}                    and there is another one, on which the conversation goes on
//
// A call is used once. The offer leaves at once, without candidates: the server learns the client's
// address from its first check, so there is nothing to wait for.
//
// A call outlives its connection. When the server that has it dies, or the path to it breaks
// (lifeline.js), another offer is posted that names the call which it goes on with; the microphone
// stays open meanwhile. Signaling places it elsewhere, and the conversation is carried over.

import { authorization } from "./key.js";
import { Lifeline } from "./lifeline.js";

export const STATES = [
  "idle", "microphone", "offering", "connecting", "live", "reconnecting", "ended", "failed",
];

// The answer to an offer. The server gives up on its own after eight seconds.
const ANSWER_MS_MAX = 10_000;

// From the answer to media. ICE takes milliseconds where UDP gets through; beyond this it will not.
const CONNECT_MS_MAX = 12_000;

// How long to look for a way back: as long as servers keep a conversation that they have lost.
const LOST_MS_MAX = 300_000;

// Attempts that end with a word from the server, or without a path to it; and the waits after them.
// Where there is no network, waiting is all there is to do, and it is not counted.
const TRIES_MAX = 6;
const WAIT_MS = [250, 500, 1000, 2000, 4000];

// A data channel message that parses to more than this is no event of ours.
const MESSAGE_CHARACTERS_MAX = 1 << 20;

export class CallError extends Error {
  // `retryAfter` is in seconds, null if the server did not say. `offline`: the server was not even
  // reached. `final`: it will say the same again. `key`: it wants to be shown another key.
  constructor(title, message, { retryAfter = null, offline = false, final = false, key = false } = {}) {
    super(message);
    Object.assign(this, { title, retryAfter, offline, final, key });
  }
}

export class Call extends EventTarget {
  state = "idle";
  id = null;
  microphone = null; // MediaStream, from the state "offering" on
  timings = {}; // milliseconds since the offer was posted: answered, connected, channel, audio
  resumptions = []; // each: milliseconds since the last packet from before, {noticed, resumed}
  sounding = false; // a reply is being heard
  #session = null;
  #peer = null;
  #channel = null;
  #location = null;
  #lifeline = null;
  #posted = 0;
  #timer = 0;
  #resumable = null; // id of the last call that was connected: it has the conversation
  #stopping = false; // the server has said that it stops
  #back = null; // while the line is lost: {silentSince, noticed, tries}

  // Returns when the answer is applied; the rest is told by events. Throws nothing: what goes wrong
  // ends in the state "failed". `session()` is sent with each offer.
  async start({ session, processing }) {
    this.#session = session;
    try {
      this.#become("microphone");
      this.microphone = await openMicrophone(processing);
      if (this.#over) return this.#release();
      for (const track of this.microphone.getTracks()) {
        track.onended = () => this.#fail(microphoneGone());
      }
      this.#become("offering");
      await this.#connect();
    } catch (error) {
      this.#fail(error instanceof CallError ? error : unexpected(error));
    }
  }

  // Offer a connection and apply the answer. Throws a CallError, or what a browser throws.
  async #connect() {
    const peer = await this.#open();
    this.#posted = performance.now();
    const { answer, location } = await post(
      peer.localDescription.sdp, this.#session(), this.#resumable,
    );
    this.#location = location;
    this.id = location.split("/").at(-1);
    if (this.#over) return this.#hangUp();
    this.#mark("answered");
    if (!this.#back) this.#become("connecting");
    this.#timer = setTimeout(() => this.#unconnected(), CONNECT_MS_MAX);
    await peer.setRemoteDescription({ type: "answer", sdp: answer });
  }

  get open() {
    return this.#channel?.readyState === "open";
  }

  // Send a Realtime event; false, and nothing happens, while the channel is not open.
  send(event) {
    if (!this.open) return false;
    this.#channel.send(JSON.stringify(event));
    this.#tell("message", { direction: "sent", event });
    return true;
  }

  getStats() {
    return this.#peer.getStats();
  }

  // The user hangs up, or leaves the page. Can be called at any time, more than once.
  end() {
    if (this.#over) return;
    this.#hangUp();
    this.#become("ended");
    this.#release();
  }

  get #over() {
    return this.state === "ended" || this.state === "failed";
  }

  // A new peer connection with the microphone in it, in place of the one before.
  async #open() {
    this.#disconnect();
    const peer = (this.#peer = new RTCPeerConnection({ bundlePolicy: "max-bundle" }));
    for (const track of this.microphone.getTracks()) peer.addTrack(track, this.microphone);
    peer.ontrack = ({ streams, track }) => {
      track.onunmute = () => this.#mark("audio");
      this.#tell("reply", { stream: streams[0] ?? new MediaStream([track]) });
    };
    peer.onconnectionstatechange = () => this.#connection(peer.connectionState);
    this.#channel = peer.createDataChannel("oai-events");
    this.#channel.onopen = () => this.#mark("channel");
    this.#channel.onmessage = ({ data }) => this.#received(data);
    this.#channel.onclose = () => this.#closedByServer();
    await peer.setLocalDescription();
    return peer;
  }

  // Part with the connection, silently: what still comes of it is not ours any more.
  #disconnect() {
    clearTimeout(this.#timer);
    this.#lifeline?.stop();
    this.#lifeline = null;
    this.sounding = false;
    if (!this.#peer) return;
    this.#peer.ontrack = this.#peer.onconnectionstatechange = null;
    this.#channel.onopen = this.#channel.onmessage = this.#channel.onclose = null;
    this.#peer.close();
  }

  #connection(state) {
    if (this.#over) return;
    if (state === "connected") this.#connected();
    else if (state === "disconnected") this.silent();
    else if (state === "failed") this.#unconnected();
  }

  #connected() {
    clearTimeout(this.#timer);
    this.#mark("connected");
    this.#lifeline ??= new Lifeline(this.#peer, this.#location, this);
    this.#resumable = this.id;
    const back = this.#back;
    this.#back = null;
    this.#become("live");
    if (!back) return;
    const resumed = Math.round(performance.now() - back.silentSince);
    this.resumptions.push({ noticed: back.noticed, resumed });
    this.#tell("resumed", {});
  }

  // ICE has given up, or takes too long.
  #unconnected() {
    if (this.#back) this.#tryAgain(noPath());
    else if (this.#lifeline) this.lost();
    else this.#fail(noPath());
  }

  // --- when the line is lost ----------------------------------------------------------------------

  // Nothing has come for a while. It may be a moment's; ICE goes on trying by itself.
  silent() {
    if (this.state === "live") this.#become("reconnecting");
  }

  // Something comes again, if it had stopped.
  heard() {
    if (this.state === "reconnecting" && !this.#back) this.#become("live");
  }

  // The server has gone, or the path to it: the conversation goes on elsewhere.
  lost() {
    if (this.#over || this.#back) return;
    const silentSince = this.#lifeline?.heardAt ?? performance.now();
    const noticed = Math.round(performance.now() - silentSince);
    this.#back = { silentSince, noticed, tries: 0 };
    this.#stopping = false;
    this.#disconnect();
    this.#become("reconnecting");
    this.#tell("lost", {});
    this.#goOn();
  }

  async #goOn() {
    try {
      await this.#connect();
    } catch (error) {
      this.#tryAgain(error instanceof CallError ? error : unexpected(error));
    }
  }

  #tryAgain(error) {
    const back = this.#back;
    if (this.#over || !back) return;
    clearTimeout(this.#timer);
    if (!error.offline) back.tries += 1;
    const late = performance.now() - back.silentSince > LOST_MS_MAX;
    if (late || error.final || back.tries >= TRIES_MAX) return this.#fail(error);
    const wait = WAIT_MS[Math.min(error.offline ? 2 : back.tries - 1, WAIT_MS.length - 1)];
    this.#timer = setTimeout(() => this.#goOn(), Math.max(wait, 1000 * (error.retryAfter ?? 0)));
  }

  // --- events -------------------------------------------------------------------------------------

  #received(data) {
    let event = null;
    try {
      if (data.length <= MESSAGE_CHARACTERS_MAX) event = JSON.parse(data);
    } catch {
      // Shown as unreadable below: a server's mistake must be seen, and must not end the call.
    }
    if (typeof event?.type !== "string") event = { type: "(unreadable)", text: String(data).slice(0, 500) };
    if (event.type === "output_audio_buffer.started") this.sounding = true;
    if (/^output_audio_buffer\.(stopped|cleared)$/.test(event.type)) this.sounding = false;
    if (event.error?.code === "server_shutting_down") this.#stopping = true;
    this.#tell("message", { direction: "received", event });
  }

  #closedByServer() {
    if (this.#over) return;
    if (this.#stopping) this.lost();
    else this.#fail(new CallError("The call has ended", "The server closed it."));
  }

  #fail(error) {
    if (this.#over) return;
    this.#hangUp();
    this.#become("failed", error);
    this.#release();
  }

  #hangUp() {
    if (!this.#location) return;
    // keepalive lets it leave even when the page is being closed.
    const request = { method: "POST", keepalive: true, headers: authorization() };
    fetch(`${this.#location}/hangup`, request).catch(() => {
      // The server finds out by itself: nothing has been heard of this client for 30 s.
    });
    this.#location = null;
  }

  #release() {
    this.#disconnect();
    for (const track of this.microphone?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
  }

  #mark(name) {
    this.timings[name] ??= Math.round(performance.now() - this.#posted);
  }

  #become(state, error = null) {
    this.state = state;
    this.#tell("state", { state, error });
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

async function openMicrophone(processing) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new CallError(
      "This page may not use a microphone",
      "Browsers allow it only over https, or on localhost.",
    );
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: {
        echoCancellation: processing,
        noiseSuppression: processing,
        autoGainControl: processing,
        channelCount: 1,
      },
    });
  } catch (error) {
    throw {
      NotAllowedError: () => new CallError(
        "The microphone was not allowed",
        "Allow it for this page in the address bar, then press Start again.",
      ),
      NotFoundError: () => new CallError(
        "There is no microphone",
        "Connect one, then press Start again.",
      ),
      NotReadableError: () => new CallError(
        "The microphone is in use",
        "Another program holds it. Close that one, then press Start again.",
      ),
    }[error.name]?.() ?? unexpected(error);
  }
}

// Post the offer. A form costs no preflight on other origins, and carries the session with it.
async function post(offer, session, resumed) {
  const path = "/v1/realtime/calls" + (resumed ? `?resume=${resumed}` : "");
  const form = new FormData();
  form.set("sdp", offer);
  form.set("session", JSON.stringify(session));
  let response, text;
  try {
    const signal = AbortSignal.timeout(ANSWER_MS_MAX);
    response = await fetch(path, { method: "POST", body: form, headers: authorization(), signal });
    text = await response.text();
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new CallError("The server does not answer", "It took too long. Please try again.");
    }
    throw new CallError(
      "The server cannot be reached",
      "Check your network, or whether the server is running.",
      { offline: true },
    );
  }
  if (response.status === 201) return { answer: text, location: response.headers.get("Location") };
  throw refused(response, text);
}

function refused(response, text) {
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Something in between answered: its status has to do.
  }
  const { status } = response;
  const retryAfter = Number.parseInt(response.headers.get("Retry-After"), 10);
  const title = {
    401: "This server asks for a key",
    429: "That was too often",
    503: "All lines are busy",
  }[status] ?? "The server refused the call";
  return new CallError(title, message, {
    retryAfter: retryAfter > 0 ? retryAfter : null,
    final: status < 500 && status !== 429,
    key: status === 401,
  });
}

const noPath = () => new CallError(
  "No sound gets through",
  "The server answered, but its UDP address cannot be reached from here. A firewall may block it.",
);
const microphoneGone = () => new CallError(
  "The microphone has gone",
  "It was unplugged, or another program took it.",
);
const unexpected = (error) => new CallError("That did not work", `${error.name}: ${error.message}`);

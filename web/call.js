// One call: microphone, peer connection, data channel, and the two HTTP requests around it.
//
// What it owns: the state of the connection and every error's sentence for people. It knows nothing
// of the page; it says what happens by events:
//   state   {state, error}        see STATES; `error` is a CallError with the state "failed"
//   reply   {stream}              the stream of the reply, to be played
//   message {direction, event}    one Realtime event, "sent" or "received"
//
// A call is used once. The offer leaves at once, without candidates: the server learns the client's
// address from its first check, so there is nothing to wait for.

export const STATES = [
  "idle", "microphone", "offering", "connecting", "live", "reconnecting", "ended", "failed",
];

// The answer to an offer. The server gives up on its own after eight seconds.
const ANSWER_MS_MAX = 10_000;

// From the answer to media. ICE takes milliseconds where UDP gets through; beyond this it will not.
const CONNECT_MS_MAX = 12_000;

// A data channel message that parses to more than this is no event of ours.
const MESSAGE_CHARACTERS_MAX = 1 << 20;

export class CallError extends Error {
  // `retryAfter` is in seconds, null if the server did not say.
  constructor(title, message, retryAfter = null) {
    super(message);
    this.title = title;
    this.retryAfter = retryAfter;
  }
}

export class Call extends EventTarget {
  state = "idle";
  id = null;
  microphone = null; // MediaStream, from the state "offering" on
  timings = {}; // milliseconds since the offer was posted: answered, connected, channel, audio
  #peer = null;
  #channel = null;
  #location = null;
  #posted = 0;
  #timer = 0;

  // Returns when the answer is applied; the rest is told by events. Throws nothing: what goes wrong
  // ends in the state "failed". `session` is sent with the offer.
  async start({ session, processing }) {
    try {
      this.#become("microphone");
      this.microphone = await openMicrophone(processing);
      if (this.#over) return this.#release();
      this.#become("offering");
      const offer = await this.#offer();
      this.#posted = performance.now();
      const { answer, location } = await post(offer, session);
      this.#location = location;
      this.id = location.split("/").at(-1);
      if (this.#over) return this.#hangUp();
      this.#mark("answered");
      this.#become("connecting");
      this.#timer = setTimeout(() => this.#fail(noPath()), CONNECT_MS_MAX);
      await this.#peer.setRemoteDescription({ type: "answer", sdp: answer });
    } catch (error) {
      this.#fail(error instanceof CallError ? error : unexpected(error));
    }
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

  async #offer() {
    const peer = (this.#peer = new RTCPeerConnection({ bundlePolicy: "max-bundle" }));
    for (const track of this.microphone.getTracks()) {
      peer.addTrack(track, this.microphone);
      track.onended = () => this.#fail(microphoneGone());
    }
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
    return peer.localDescription.sdp;
  }

  #connection(state) {
    if (this.#over) return;
    if (state === "connected") {
      clearTimeout(this.#timer);
      this.#mark("connected");
      this.#become("live");
    } else if (state === "disconnected") {
      // Nothing heard for some seconds. ICE goes on trying by itself and often succeeds.
      this.#become("reconnecting");
    } else if (state === "failed") {
      this.#fail("connected" in this.timings ? pathLost() : noPath());
    }
  }

  #received(data) {
    let event = null;
    try {
      if (data.length <= MESSAGE_CHARACTERS_MAX) event = JSON.parse(data);
    } catch {
      // Shown as unreadable below: a server's mistake must be seen, and must not end the call.
    }
    if (typeof event?.type !== "string") event = { type: "(unreadable)", text: String(data).slice(0, 500) };
    this.#tell("message", { direction: "received", event });
  }

  #closedByServer() {
    if (this.#over) return;
    this.#fail(new CallError("The call has ended", "The server closed it."));
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
    fetch(`${this.#location}/hangup`, { method: "POST", keepalive: true }).catch(() => {
      // The server finds out by itself: nothing has been heard of this client for 30 s.
    });
    this.#location = null;
  }

  #release() {
    clearTimeout(this.#timer);
    for (const track of this.microphone?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    this.#peer?.close();
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
async function post(offer, session) {
  const form = new FormData();
  form.set("sdp", offer);
  form.set("session", JSON.stringify(session));
  let response, text;
  try {
    const signal = AbortSignal.timeout(ANSWER_MS_MAX);
    response = await fetch("/v1/realtime/calls", { method: "POST", body: form, signal });
    text = await response.text();
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new CallError("The server does not answer", "It took too long. Please try again.");
    }
    throw new CallError(
      "The server cannot be reached",
      "Check your network, or whether the server is running.",
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
  if (response.status === 503) {
    const retryAfter = Number.parseInt(response.headers.get("Retry-After"), 10);
    return new CallError("All lines are busy", message, retryAfter > 0 ? retryAfter : null);
  }
  return new CallError("The server refused the call", message);
}

const noPath = () => new CallError(
  "No sound gets through",
  "The server answered, but its UDP address cannot be reached from here. A firewall may block it.",
);
const pathLost = () => new CallError(
  "The connection was lost",
  "Nothing has come from the server for a while. Check your network, then press Start again.",
);
const microphoneGone = () => new CallError(
  "The microphone has gone",
  "It was unplugged, or another program took it.",
);
const unexpected = (error) => new CallError("That did not work", `${error.name}: ${error.message}`);

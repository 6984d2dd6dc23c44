// Listening to two sounds on one clock: the microphone and the reply.
//
// What it owns: the audio context and the worklet nodes in it. Everything that the page measures in
// sound uses this clock (`now`), so that differences between the two sounds mean something.

export class Ears {
  #context;
  #ready;
  #nodes = new Map(); // by whose sound it is: [source, levels]

  // To be made in a click handler: browsers start audio only after a gesture.
  constructor() {
    this.#context = new AudioContext({ latencyHint: "interactive" });
    // False if it could not be loaded, or the call ended before: it then goes on without levels.
    this.#ready = this.#context.audioWorklet.addModule("levels.js").then(
      () => true,
      () => false,
    );
  }

  // Seconds on the clock of the sounds. It stands still while the page has no audio device.
  get now() {
    return this.#context.currentTime;
  }

  // Call `heard({at, rms, peak})` for every 10 ms of a stream, until `close`, or until there is
  // another stream of the same `name`.
  async listen(name, stream, heard) {
    if (!(await this.#ready) || this.#context.state === "closed") return;
    this.#drop(name);
    const source = this.#context.createMediaStreamSource(stream);
    const node = new AudioWorkletNode(this.#context, "levels", { channelCount: 1 });
    // Chromium runs only what leads to the destination; the node's output is silence.
    source.connect(node).connect(this.#context.destination);
    node.port.onmessage = ({ data }) => heard(data);
    this.#nodes.set(name, [source, node]);
  }

  close() {
    for (const name of [...this.#nodes.keys()]) this.#drop(name);
    if (this.#context.state !== "closed") this.#context.close();
  }

  #drop(name) {
    for (const node of this.#nodes.get(name) ?? []) {
      node.disconnect();
      if (node.port) node.port.onmessage = null; // levels on their way would come after the end
    }
    this.#nodes.delete(name);
  }
}

// The tape: the last seconds of both sounds on a canvas, you above the line, the reply below it, with
// marks where speech ended, how long the reply took, and where it was interrupted.
//
// What it owns: the canvas. Times are seconds of `Ears`; levels are peaks from 0 to 1.

// Ten seconds, or fewer on a narrow screen: a second must stay wide enough to see words.
const WINDOW_S_MAX = 10;
const SECOND_PIXELS_MIN = 60;
const BAR_S = 0.06; // sound in one bar
const BARS_MAX = 256; // ring of bars: more than the window holds
const MARKS_MAX = 40;

// Peaks in dB, drawn from silence to full scale: an ear hears ratios.
const FLOOR_DB = -54;

// A resting bar, so that silence still looks alive.
const REST = 0.02;

export class Tape {
  #canvas;
  #clock;
  #lanes = { you: new Lane(), reply: new Lane() };
  #marks = [];
  #colours = {};
  #running = false;
  #frozenAt = 0;

  // `clock()` is the present on the clock of the levels.
  constructor(canvas, clock) {
    this.#canvas = canvas;
    this.#clock = clock;
    new ResizeObserver(() => this.#fit()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#fit());
    this.#fit();
  }

  heard(lane, { at, peak }) {
    this.#lanes[lane].add(at, peak);
  }

  // Marks: {kind: "wait", from, until, text} and {kind: "cut", at, text}.
  mark(mark) {
    this.#marks.push(mark);
    if (this.#marks.length > MARKS_MAX) this.#marks.shift();
  }

  start() {
    this.#lanes = { you: new Lane(), reply: new Lane() };
    this.#marks = [];
    this.#running = true;
    requestAnimationFrame(() => this.#frame());
  }

  // The picture stays as it was at the end of the call.
  stop() {
    this.#frozenAt = this.#clock();
    this.#running = false;
  }

  #frame() {
    if (!this.#running) return;
    this.#draw(this.#clock());
    requestAnimationFrame(() => this.#frame());
  }

  #fit() {
    const { clientWidth, clientHeight } = this.#canvas;
    const scale = globalThis.devicePixelRatio || 1;
    this.#canvas.width = clientWidth * scale;
    this.#canvas.height = clientHeight * scale;
    this.#canvas.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(this.#canvas);
    for (const name of ["you", "reply", "line", "muted", "danger", "card"]) {
      this.#colours[name] = style.getPropertyValue(`--${name}`);
    }
    if (!this.#running) this.#draw(this.#frozenAt);
  }

  #draw(now) {
    const context = this.#canvas.getContext("2d");
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const middle = height / 2;
    const span = Math.min(WINDOW_S_MAX, width / SECOND_PIXELS_MIN);
    const x = (at) => width - ((now - at) / span) * width;
    context.clearRect(0, 0, width, height);
    context.fillStyle = this.#colours.line;
    context.fillRect(0, middle - 0.5, width, 1);
    this.#bars(context, "you", now, x, middle);
    this.#bars(context, "reply", now, x, middle);
    for (const mark of this.#marks) {
      if (mark.kind === "wait") this.#wait(context, mark, x, middle);
      else this.#cut(context, mark, x(mark.at), height);
    }
  }

  #bars(context, name, now, x, middle) {
    const lane = this.#lanes[name];
    const direction = name === "you" ? -1 : 1;
    const pitch = x(BAR_S) - x(0);
    const thick = Math.max(1.5, pitch * 0.55);
    const room = middle - 14;
    context.strokeStyle = this.#colours[name];
    context.lineWidth = thick;
    context.lineCap = "round";
    context.beginPath();
    const newest = Math.floor(now / BAR_S);
    for (let bar = newest - Math.ceil(WINDOW_S_MAX / BAR_S); bar <= newest; bar += 1) {
      const at = x((bar + 0.5) * BAR_S);
      const length = Math.max(REST, loudness(lane.peak(bar))) * room;
      context.moveTo(at, middle + direction * (thick / 2 + 2));
      context.lineTo(at, middle + direction * (thick / 2 + 2 + length));
    }
    context.stroke();
  }

  // A bracket from the end of speech to the reply, with the milliseconds over it.
  #wait(context, { from, until, text }, x, middle) {
    const [left, right] = [x(from), x(until)];
    if (right < 0) return;
    context.strokeStyle = this.#colours.muted;
    context.lineWidth = 1;
    context.beginPath();
    for (const edge of [left, right]) {
      context.moveTo(edge, middle - 26);
      context.lineTo(edge, middle + 26);
    }
    context.moveTo(left, middle - 20);
    context.lineTo(right, middle - 20);
    context.stroke();
    this.#label(context, text, (left + right) / 2, middle - 34, this.#colours.muted);
  }

  #cut(context, { text }, at, height) {
    if (at < 0) return;
    context.strokeStyle = this.#colours.danger;
    context.lineWidth = 1.5;
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(at, height / 2);
    context.lineTo(at, height - 22);
    context.stroke();
    context.setLineDash([]);
    this.#label(context, text, at, height - 12, this.#colours.danger);
  }

  #label(context, text, wanted, y, colour) {
    context.font = "600 12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const half = context.measureText(text).width / 2 + 6;
    const at = Math.min(wanted, this.#canvas.clientWidth - half);
    context.fillStyle = this.#colours.card;
    context.globalAlpha = 0.85;
    context.fillRect(at - half, y - 9, 2 * half, 18);
    context.globalAlpha = 1;
    context.fillStyle = colour;
    context.fillText(text, at, y);
  }
}

// The bars of one sound: a ring in which every slot knows which bar it holds.
class Lane {
  #peaks = new Float32Array(BARS_MAX);
  #bars = new Int32Array(BARS_MAX).fill(-1);

  add(at, peak) {
    const bar = Math.floor(at / BAR_S);
    const slot = bar % BARS_MAX;
    if (this.#bars[slot] !== bar) {
      this.#bars[slot] = bar;
      this.#peaks[slot] = 0;
    }
    this.#peaks[slot] = Math.max(this.#peaks[slot], peak);
  }

  peak(bar) {
    const slot = bar % BARS_MAX;
    return bar >= 0 && this.#bars[slot] === bar ? this.#peaks[slot] : 0;
  }
}

// 0 for silence to 1 for full scale; the power gives speech, which lives in the upper half, shape.
function loudness(peak) {
  return Math.max(0, 1 - (20 * Math.log10(Math.max(peak, 1e-6))) / FLOOR_DB) ** 1.6;
}

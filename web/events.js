// The timeline: every event of the data channel, newest last, bounded, to be filtered and paused.

// Rows kept. A turn has about twenty events; beyond some hundreds nobody scrolls, and browsers slow.
const ROWS_MAX = 400;

// While paused, events wait here; beyond this the oldest are dropped, as they would be in the list.
const WAITING_MAX = ROWS_MAX;

// Characters of an event that are shown when it is opened.
const SHOWN_CHARACTERS_MAX = 4000;

export class Timeline {
  #list = document.querySelector("#events");
  #empty = document.querySelector("#events-empty");
  #pause = document.querySelector("#events-pause");
  #text = document.querySelector("#events-text");
  #kind = document.querySelector("#events-kind");
  #rows = []; // {element, direction, event, search}
  #waiting = [];
  #paused = false;

  constructor() {
    this.#pause.onclick = () => this.#toggle();
    document.querySelector("#events-clear").onclick = () => this.clear();
    this.#text.oninput = () => this.#filter();
    this.#kind.oninput = () => this.#filter();
  }

  // `seconds` is the time since the call began.
  add(seconds, direction, event) {
    if (this.#paused) {
      this.#waiting.push([seconds, direction, event]);
      if (this.#waiting.length > WAITING_MAX) this.#waiting.shift();
      this.#pause.textContent = `Resume (${this.#waiting.length} new)`;
      return;
    }
    const atEnd = this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 40;
    const last = this.#rows.at(-1);
    if (last?.event.type === event.type && event.type.endsWith(".delta")) {
      this.#repeat(last, event);
    } else {
      this.#append(seconds, direction, event);
    }
    if (atEnd) this.#list.scrollTop = this.#list.scrollHeight;
  }

  clear() {
    this.#rows = [];
    this.#waiting = [];
    this.#list.replaceChildren();
    this.#empty.hidden = false;
    if (this.#paused) this.#pause.textContent = "Resume";
  }

  #append(seconds, direction, event) {
    const row = { direction, event, count: 1, search: JSON.stringify(event).toLowerCase() };
    row.element = element("li", { className: direction });
    const details = element("details");
    const summary = element("summary");
    row.times = element("span", { className: "times" });
    summary.append(
      element("time", { textContent: seconds.toFixed(2) }),
      element("span", {
        className: "arrow",
        textContent: direction === "sent" ? "↑" : "↓",
        ariaLabel: direction,
        role: "img",
      }),
      typeOf(event),
      row.times,
      element("span", { className: "brief", textContent: brief(event) }),
    );
    details.append(summary);
    // The text of an event is made when somebody looks at it.
    details.ontoggle = () => {
      details.querySelector("pre")?.remove();
      if (details.open) details.append(element("pre", { textContent: pretty(row.event) }));
    };
    row.element.append(details);
    if (event.type === "error") row.element.classList.add("error");
    row.element.hidden = !this.#matches(row);
    this.#rows.push(row);
    this.#list.append(row.element);
    this.#empty.hidden = true;
    if (this.#rows.length > ROWS_MAX) this.#rows.shift().element.remove();
  }

  // Deltas come by the dozen: one row that counts them says as much.
  #repeat(row, event) {
    row.event = event;
    row.count += 1;
    row.times.textContent = `×${row.count}`;
  }

  #toggle() {
    this.#paused = !this.#paused;
    this.#pause.setAttribute("aria-pressed", this.#paused);
    this.#pause.textContent = this.#paused ? "Resume" : "Pause";
    for (const waiting of this.#waiting.splice(0)) this.add(...waiting);
  }

  #filter() {
    for (const row of this.#rows) row.element.hidden = !this.#matches(row);
    this.#list.scrollTop = this.#list.scrollHeight;
  }

  #matches({ direction, event, search }) {
    const kind = this.#kind.value;
    const wanted = kind === "all" || kind === direction || kind === event.type;
    return wanted && search.includes(this.#text.value.trim().toLowerCase());
  }
}

// The type, which a narrow list may break after its dots and underscores only.
function typeOf({ type }) {
  const shown = element("span", { className: "type" });
  for (const part of type.split(/(?<=[._])/)) shown.append(part, element("wbr"));
  return shown;
}

// What is worth seeing without opening a row.
function brief(event) {
  switch (event.type) {
    case "error":
      return event.error?.message ?? "";
    case "input_audio_buffer.speech_started":
      return `at ${event.audio_start_ms} ms`;
    case "input_audio_buffer.speech_stopped":
      return `at ${event.audio_end_ms} ms`;
    case "conversation.item.truncated":
      return `at ${event.audio_end_ms} ms`;
    case "response.done":
      return [event.response?.status, event.response?.status_details?.reason].filter(Boolean).join(": ");
    default:
      return event.transcript ?? "";
  }
}

function pretty(event) {
  const text = JSON.stringify(event, null, 2);
  return text.length > SHOWN_CHARACTERS_MAX ? `${text.slice(0, SHOWN_CHARACTERS_MAX)}\n…` : text;
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

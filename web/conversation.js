// The list of turns on the page: one entry a turn, changed in place as it goes on.

import { between } from "./turns.js";

const STATUS = {
  listening: "Listening…",
  thinking: "Waiting for the reply…",
  aside: "Heard; the reply went on",
  replying: "Replying…",
  done: "",
  interrupted: "Interrupted",
  silent: "No reply",
  failed: "The reply failed",
  lost: "The line was lost here",
};

export class ConversationView {
  #list = document.querySelector("#turns");
  #empty = document.querySelector("#turns-empty");
  #entries = new Map();

  clear() {
    this.#entries.clear();
    this.#list.replaceChildren();
    this.#empty.hidden = false;
  }

  // Show a turn as it is now. Only the newest entries stay, as many as there are turns kept.
  show(turn, kept) {
    this.#empty.hidden = true;
    let entry = this.#entries.get(turn.number);
    if (turn.status === "dropped") {
      entry?.remove();
      this.#entries.delete(turn.number);
      return;
    }
    if (!entry) {
      entry = make();
      this.#entries.set(turn.number, entry);
      this.#list.prepend(entry);
    }
    entry.dataset.status = turn.status;
    const heard = turn.status === "listening" ? "…" : "Speech, without a transcript";
    part(entry, "heard").textContent = turn.heard || heard;
    part(entry, "said").textContent = turn.said;
    part(entry, "said").hidden = !turn.said;
    part(entry, "wait").textContent = waits(turn);
    part(entry, "wait").hidden = turn.replyBegan === null;
    part(entry, "status").textContent = statusOf(turn);
    for (const number of this.#entries.keys()) {
      if (number > turn.number - kept) break;
      this.#entries.get(number).remove();
      this.#entries.delete(number);
    }
  }
}

function make() {
  const entry = document.createElement("li");
  for (const [name, tag] of [["heard", "p"], ["said", "p"], ["wait", "span"], ["status", "span"]]) {
    const child = document.createElement(tag);
    child.className = name;
    entry.append(child);
  }
  return entry;
}

function part(entry, name) {
  return entry.querySelector(`.${name}`);
}

function waits(turn) {
  const audible = between(turn.speechEnd, turn.replyHeard);
  const began = between(turn.speechEnd, turn.replyBegan);
  return audible === null
    ? `reply ${began} ms after your last word`
    : `reply ${began} ms after your last word, audible after ${audible} ms`;
}

function statusOf(turn) {
  const played = between(turn.replyHeard ?? turn.replyBegan, turn.replyEnd);
  if (turn.status === "interrupted" && played !== null) {
    return `Interrupted after ${(Math.max(0, played) / 1000).toFixed(1)} s`;
  }
  return STATUS[turn.status];
}

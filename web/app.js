// The page's story: buttons to a call, the call's events to what is seen.
//
//   call.js          the connection and its errors; lifeline.js: whether the server is still there
//   key.js           the key for servers that ask for one
//   sound.js         levels of both sounds on one clock (levels.js runs on the audio thread)
//   turns.js         turns and their waits, from events and levels; conversation.js shows them
//   tape.js          the picture of both sounds
//   events.js        the list of events
//   stats.js         figures of the connection
//
// For tests and for the curious, `window.earshot` shows, read-only, what the page knows:
//   state      one of STATES in call.js
//   callId     "rtc_…" or null
//   levels     {microphone, reply}: root mean square of the last 10 ms, 0 to 1
//   timings    {answered, connected, channel, audio}: milliseconds since the offer was posted, as
//              far as they have happened (`audio` is its first packet); and `reply`, the first
//              sound of a reply, since Start was pressed
//   counters   {sent, received, turns, interruptions, errors, packetsIn, packetsOut}
//   resumptions  [{noticed, resumed}]: the line was lost and found again, each in milliseconds since
//              the last packet from before
//   turns      the turns, oldest first: {status, heard, said, replyAfterMs, audibleAfterMs,
//              interruptedBy, silentAfterMs}; the last is from the press or the first sound of the
//              speech that interrupted the reply to the end of the reply's own sound
//   events     [{direction, event}], the last 500, oldest first

import { Call } from "./call.js";
import { ConversationView } from "./conversation.js";
import { Timeline } from "./events.js";
import { currentKey, setKey } from "./key.js";
import { Ears } from "./sound.js";
import { Stats } from "./stats.js";
import { Tape } from "./tape.js";
import { between, Loudness, Turns } from "./turns.js";

const STATS_PERIOD_MS = 1000;

// The slider speaks after a rest: a drag would send dozens of updates.
const SLIDER_REST_MS = 150;

// The end of a word is still on its way when the button is let go: captured, encoded, sent.
const RELEASE_TAIL_MS = 150;

// A shorter press is a slip, and its commit would be an error of an empty buffer.
const PRESS_MS_MIN = 250;

// The sliders, and the fields of turn detection that they set. The last two are Earshot's own.
const SLIDERS = {
  delay: "silence_duration_ms",
  patience: "response_delay_ms",
  interruption: "min_interruption_duration_ms",
};

// What the browser has buffered of a reply that is cut off would still be heard: some 20 to 60 ms.
// Nothing of it is left after this long, and no other reply begins before it is announced.
const HUSH_MS = 250;

const TURNS_SHOWN = 20;
const EVENTS_KEPT = 500;

const $ = (id) => document.getElementById(id);

const STATUS = {
  idle: "Ready",
  microphone: "Waiting for the microphone",
  offering: "Calling",
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Connection interrupted, trying again",
  ended: "Ended",
  failed: "Ended",
};

const page = {
  call: null,
  ears: null,
  sounds: { you: new Loudness(), reply: new Loudness() },
  turns: null,
  levels: { microphone: 0, reply: 0 },
  counters: { sent: 0, received: 0, errors: 0, packetsIn: 0, packetsOut: 0 },
  events: [],
  firstReplyMs: null,
  posted: 0, // performance.now() when the call began
  timers: [],
  stats: null,
  muted: false,
  hushTimer: 0,
  press: null, // {at, released}: the talk button is down, or its last word is still on its way
};

const tape = new Tape($("tape"), () => page.ears?.now ?? 0);
const timeline = new Timeline();
const conversation = new ConversationView();

// --- a call, from start to end ------------------------------------------------------------------

function startCall() {
  const call = (page.call = new Call());
  const ears = (page.ears = new Ears());
  page.sounds = { you: new Loudness(), reply: new Loudness() };
  page.turns = new Turns(page.sounds.you, page.sounds.reply, showTurn);
  page.counters = { sent: 0, received: 0, errors: 0, packetsIn: 0, packetsOut: 0 };
  page.events = [];
  page.firstReplyMs = null;
  page.posted = performance.now();
  page.muted = false;
  conversation.clear();
  timeline.clear();
  hideNotice();
  tape.start();
  call.addEventListener("state", ({ detail }) => stateChanged(call, ears, detail));
  call.addEventListener("message", ({ detail }) => message(detail));
  call.addEventListener("reply", ({ detail }) => hearReply(ears, detail.stream));
  call.addEventListener("lost", lineLost);
  call.addEventListener("resumed", lineResumed);
  call.start({ session, processing: $("processing").checked });
}

function stateChanged(call, ears, { state, error }) {
  if (state === "offering") {
    gateMicrophone();
    ears.listen("you", call.microphone, (level) => {
      page.levels.microphone = level.rms;
      page.sounds.you.heard(level);
      tape.heard("you", level);
    });
  }
  if (state === "live" && page.timers.length === 0) {
    page.stats = new Stats();
    page.timers = [setInterval(showStats, STATS_PERIOD_MS, call), setInterval(showClock, 500)];
    showStats(call);
    showClock();
  }
  if (state === "ended" || state === "failed") endOf(ears);
  if (error) showNotice(error);
  showState(state);
  if (error?.key) askForKey();
}

function lineLost() {
  page.turns.lost(page.ears.now);
  endPress();
  hush(false);
  page.levels.reply = 0;
  showNotice({ title: "The line was lost", message: "Looking for another one…" });
}

function lineResumed() {
  page.stats = new Stats();
  showNotice({ title: "The line was lost", message: "Reconnected: the conversation goes on." });
}

function endOf(ears) {
  clearTimeout(page.hushTimer);
  page.timers.forEach(clearInterval);
  page.timers = [];
  endPress();
  page.levels = { microphone: 0, reply: 0 };
  tape.stop();
  ears.close();
  $("speaker").srcObject = null;
}

function hearReply(ears, stream) {
  $("speaker").srcObject = stream;
  ears.listen("reply", stream, (level) => {
    page.levels.reply = level.rms;
    page.sounds.reply.heard(level);
    tape.heard("reply", level);
    if (page.firstReplyMs === null && page.sounds.reply.onset > 0) {
      page.firstReplyMs = Math.round(performance.now() - page.posted);
    }
    page.turns.listen();
  });
}

function message({ direction, event }) {
  const now = page.ears.now;
  page.counters[direction] += 1;
  page.events.push({ direction, event });
  if (page.events.length > EVENTS_KEPT) page.events.shift();
  timeline.add((performance.now() - page.posted) / 1000, direction, event);
  if (direction === "sent") return;
  page.turns.event(event, now);
  if (event.type === "error") page.counters.errors += 1;
  if (event.error?.code === "resume_unavailable") {
    const lost = "Reconnected, but what was said before is not known any more.";
    showNotice({ title: "The line was lost", message: lost });
  }
  if (event.type === "input_audio_buffer.speech_started") $("hint").textContent = "";
  if (event.type === "session.updated") sessionUpdated(event.session);
  if (event.type === "output_audio_buffer.started") hush(false);
  if (event.type === "output_audio_buffer.cleared") {
    hush(true);
    tape.mark({ kind: "cut", at: now, text: "interrupted" });
  }
}

// --- turns --------------------------------------------------------------------------------------

function showTurn(turn) {
  conversation.show(turn, TURNS_SHOWN);
  if (turn.replyBegan !== null && !turn.marked) {
    turn.marked = true;
    const text = `${between(turn.speechEnd, turn.replyBegan)} ms`;
    tape.mark({ kind: "wait", from: turn.speechEnd, until: turn.replyBegan, text });
  }
  $("interrupt").disabled = page.call.state !== "live" || !page.turns.replying;
}

function interrupt() {
  if (!page.turns?.replying) return;
  page.turns.press(page.ears.now);
  hush(true);
  page.call.send({ type: "response.cancel" });
  page.call.send({ type: "output_audio_buffer.clear" });
}

// Silence the reply here, before what the server does about it arrives; or let it sound again.
function hush(on) {
  clearTimeout(page.hushTimer);
  if (on) page.hushTimer = setTimeout(hush, HUSH_MS, false);
  for (const track of $("speaker").srcObject?.getAudioTracks() ?? []) track.enabled = !on;
}

// --- settings of the session ----------------------------------------------------------------------

const pushToTalk = () => document.querySelector("input[name=mode]:checked").value === "push";

function session() {
  const set = Object.entries(SLIDERS).map(([id, field]) => [field, $(id).valueAsNumber]);
  const turn_detection = pushToTalk() ? null : { type: "server_vad", ...Object.fromEntries(set) };
  // Transcripts have to be asked for; servers that know other models take this name for theirs.
  const transcription = { model: "whisper-1" };
  return { type: "realtime", audio: { input: { turn_detection, transcription } } };
}

function updateSession() {
  const sent = page.call?.send({ type: "session.update", session: session() });
  if (!sent) return;
  for (const id of Object.keys(SLIDERS)) $(`${id}-state`).textContent = "Telling the server…";
}

function sessionUpdated(updated) {
  const detection = updated?.audio?.input?.turn_detection;
  for (const [id, field] of Object.entries(SLIDERS)) {
    const value = detection?.[field];
    $(`${id}-state`).textContent = value === undefined ? "" : `In effect: ${value} ms.`;
  }
}

let sliderTimer = 0;
function slide() {
  for (const id of Object.keys(SLIDERS)) $(`${id}-text`).textContent = `${$(id).value} ms`;
  clearTimeout(sliderTimer);
  sliderTimer = setTimeout(updateSession, SLIDER_REST_MS);
}

function modeChanged() {
  endPress();
  updateSession();
  showState(page.call?.state ?? "idle");
}

// --- push-to-talk ---------------------------------------------------------------------------------

function press() {
  if (page.press || !pushToTalk() || page.call?.state !== "live") return;
  interrupt();
  page.press = { at: performance.now(), released: false };
  page.call.send({ type: "input_audio_buffer.clear" });
  page.turns.begin(page.ears.now);
  gateMicrophone();
  $("talk").dataset.pressed = "";
}

// One release comes as several browser events: the first one counts.
async function release() {
  const press = page.press;
  if (!press || press.released) return;
  press.released = true;
  delete $("talk").dataset.pressed;
  if (performance.now() - press.at < PRESS_MS_MIN) {
    endPress();
    page.turns.drop();
    page.call.send({ type: "input_audio_buffer.clear" });
    $("hint").textContent = "Hold the button, or the space bar, while you speak.";
    return;
  }
  $("hint").textContent = "";
  await new Promise((resolve) => setTimeout(resolve, RELEASE_TAIL_MS));
  if (page.press !== press) return; // the call or the mode has ended meanwhile
  endPress();
  if (!page.call.send({ type: "input_audio_buffer.commit" })) return;
  page.turns.endSpeech(page.ears.now);
  page.call.send({ type: "response.create" });
}

function endPress() {
  page.press = null;
  delete $("talk").dataset.pressed;
  gateMicrophone();
}

// In push-to-talk nothing leaves the microphone unless the button is down.
function gateMicrophone() {
  const open = !page.muted && (!pushToTalk() || page.press !== null);
  for (const track of page.call?.microphone?.getTracks() ?? []) track.enabled = open;
}

function mute() {
  page.muted = !page.muted;
  gateMicrophone();
  showState(page.call.state);
}

// --- what is seen ---------------------------------------------------------------------------------

function showState(state) {
  const idle = state === "idle" || state === "ended" || state === "failed";
  const live = state === "live" || state === "reconnecting";
  $("status").dataset.state = state;
  $("status-text").textContent = STATUS[state];
  $("start").textContent = idle ? "Start" : "Hang up";
  $("start").classList.toggle("danger", !idle);
  $("mute").disabled = idle || pushToTalk();
  $("mute").textContent = page.muted ? "Unmute" : "Mute";
  $("mute").setAttribute("aria-pressed", page.muted);
  $("talk").hidden = !pushToTalk();
  $("talk").disabled = !live;
  for (const id of Object.keys(SLIDERS)) {
    $(`${id}-box`).classList.toggle("off", pushToTalk());
    $(id).disabled = pushToTalk();
  }
  $("processing").disabled = !idle;
  if (!live) $("interrupt").disabled = true;
  if (state === "idle") $("hint").textContent = "Press Start, allow the microphone, and say something.";
  else if (live && pushToTalk()) $("hint").textContent = "Hold the button, or the space bar, and speak.";
  else $("hint").textContent = live ? "Say something, then pause." : "";
}

function showClock() {
  const seconds = Math.floor((performance.now() - page.posted) / 1000);
  $("clock").hidden = false;
  $("clock").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

async function showStats(call) {
  if (call.state !== "live") return;
  const stats = page.stats;
  const read = stats.read(await call.getStats());
  page.counters.packetsIn = read.packetsIn;
  page.counters.packetsOut = read.packetsOut;
  const setup = `answer ${call.timings.answered} ms, media ${call.timings.connected} ms`;
  for (const [name, text] of Object.entries({ ...read.figures, setup })) {
    document.querySelector(`[data-figure=${name}]`).textContent = text;
  }
}

// The field is seen once a server has asked for a key: most that one tries this on do not.
function askForKey() {
  $("key-box").hidden = false;
  $("key").value = currentKey();
  $("key").select();
}

let noticeTimer = 0;
function showNotice({ title, message, retryAfter }) {
  clearInterval(noticeTimer);
  $("notice-title").textContent = title;
  $("notice").hidden = false;
  let seconds = retryAfter;
  const tick = () => {
    const wait = seconds > 0 ? ` Try again in ${seconds} s.` : " You can try again now.";
    $("notice-text").textContent = message + (retryAfter ? wait : "");
    if (!(seconds > 0)) clearInterval(noticeTimer);
    seconds -= 1;
  };
  tick();
  if (retryAfter) noticeTimer = setInterval(tick, 1000);
}

function hideNotice() {
  clearInterval(noticeTimer);
  $("notice").hidden = true;
}

// --- hands ----------------------------------------------------------------------------------------

$("start").onclick = () => {
  const state = page.call?.state ?? "ended";
  if (state === "ended" || state === "failed") startCall();
  else page.call.end();
};
$("mute").onclick = mute;
$("interrupt").onclick = interrupt;
$("notice-close").onclick = hideNotice;
for (const id of Object.keys(SLIDERS)) $(id).oninput = slide;
$("key").oninput = () => setKey($("key").value);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.onchange = modeChanged;

const talk = $("talk");
talk.onpointerdown = (event) => {
  talk.setPointerCapture(event.pointerId);
  press();
};
talk.onpointerup = talk.onpointercancel = talk.onlostpointercapture = release;
talk.oncontextmenu = (event) => event.preventDefault(); // a long press is not a right click
addEventListener("blur", release); // the key's release would go to another window

// The space bar talks wherever the focus is, except where it already means something.
const takesSpace = "input, select, textarea, summary, button:not(#talk)";
addEventListener("keydown", (event) => {
  if (event.key === "Escape") interrupt();
  if (event.key !== " " || !pushToTalk() || event.target.closest(takesSpace)) return;
  event.preventDefault();
  if (!event.repeat) press();
});
addEventListener("keyup", (event) => {
  if (event.key === " ") release();
});
addEventListener("pagehide", () => page.call?.end());

slide();
showState("idle");
if (currentKey()) askForKey();

Object.defineProperty(window, "earshot", {
  value: Object.freeze({
    get state() {
      return page.call?.state ?? "idle";
    },
    get callId() {
      return page.call?.id ?? null;
    },
    get levels() {
      return { ...page.levels };
    },
    get timings() {
      const reply = page.firstReplyMs;
      return { ...page.call?.timings, ...(reply === null ? {} : { reply }) };
    },
    get counters() {
      const { list, interruptions } = page.turns ?? { list: [], interruptions: 0 };
      return { ...page.counters, turns: list.length, interruptions };
    },
    get turns() {
      return (page.turns?.list ?? []).map((turn) => ({
        status: turn.status,
        heard: turn.heard,
        said: turn.said,
        replyAfterMs: between(turn.speechEnd, turn.replyBegan),
        audibleAfterMs: between(turn.speechEnd, turn.replyHeard),
        interruptedBy: turn.interruptedBy,
        silentAfterMs: between(turn.interruptedFrom, turn.silentAt),
      }));
    },
    get resumptions() {
      return structuredClone(page.call?.resumptions ?? []);
    },
    get events() {
      return structuredClone(page.events);
    },
  }),
});

// Turns: what was heard, what was said, and how long the reply took.
//
// What it owns: the turns of a call, made from two sources on one clock: the server's events (what
// happened) and the levels of both sounds (when it was heard). All times are seconds of `Ears`.
//
// The figure that matters is the wait from the end of speech to the reply. The end of speech is the
// last loud moment of the microphone, not the event about it: that one comes after the pause which
// the server waits for. The reply begins with `output_audio_buffer.started`, sent with its first
// packet; `audible` is when it was first loud here, after whatever silence it begins with.

// Turns kept. The page shows the newest; a call of two hours has some hundreds.
const TURNS_MAX = 50;

// Loud is above this, and above the quietest of late by a factor: rooms and microphones differ.
const LOUD_RMS = 0.008;
const LOUD_OVER_FLOOR = 4;

// A reply that begins after this much silence is a new sound and not a pause within one.
const ONSET_SILENCE_S = 0.15;

// Follows when a sound is loud. One for each of the two sounds.
export class Loudness {
  lastLoud = -Infinity; // end of the last loud block
  onset = -Infinity; // start of the sound that is heard now, or was last
  #floor = 0.002;

  heard({ at, rms }) {
    // The floor falls at once and rises slowly (doubles in some seconds), so that speech itself
    // does not lift it by much.
    this.#floor = Math.min(Math.max(rms, 1e-5), this.#floor * 1.002);
    if (rms > Math.max(LOUD_RMS, this.#floor * LOUD_OVER_FLOOR)) {
      if (at - this.lastLoud > ONSET_SILENCE_S) this.onset = at;
      this.lastLoud = at;
    }
  }
}

export class Turns {
  list = [];
  interruptions = 0;
  #microphone;
  #reply;
  #changed;
  #interrupted = null; // the turn whose reply was last cut short

  // `changed(turn)` is called whenever a turn is new or has changed.
  constructor(microphone, reply, changed) {
    this.#microphone = microphone;
    this.#reply = reply;
    this.#changed = changed;
  }

  get last() {
    return this.list.at(-1);
  }

  // The turn whose reply is being played. Not always the last: a short "hm" is a turn, too.
  get replying() {
    return this.list.findLast((turn) => turn.status === "replying");
  }

  // A turn begins: the server heard speech, or the button was pressed.
  begin(now) {
    this.list.push({
      number: (this.last?.number ?? 0) + 1,
      began: now,
      speechEnd: null,
      replyBegan: null,
      replyHeard: null,
      replyEnd: null,
      interruptedBy: null, // "press" or "speech"
      interruptedFrom: null, // when the button was pressed, or the speech was first loud
      silentAt: null, // of an interrupted reply: when it was last loud
      responseId: null,
      heard: "",
      said: "",
      status: "listening", // then: thinking or aside, replying, done, interrupted, silent, failed, lost
    });
    if (this.list.length > TURNS_MAX) this.list.shift();
    this.#changed(this.last);
  }

  // Speech has ended. The last loud moment counts, unless the microphone was never loud.
  endSpeech(now) {
    const turn = this.last;
    if (!turn || turn.status !== "listening") return;
    const loud = this.#microphone.lastLoud;
    turn.speechEnd = loud > turn.began - 1 ? Math.min(loud, now) : now;
    // What did not interrupt a reply need not be answered; if it is, that event will say so.
    turn.status = this.replying ? "aside" : "thinking";
    this.#changed(turn);
  }

  // The button that interrupts was pressed; `output_audio_buffer.cleared` is the server's answer.
  press(now) {
    const turn = this.replying;
    if (!turn) return;
    turn.interruptedBy = "press";
    turn.interruptedFrom = now;
  }

  // A press too short to be speech: no turn after all.
  drop() {
    const turn = this.list.pop();
    turn.status = "dropped";
    this.#changed(turn);
  }

  // The line is lost: what was under way will not be finished.
  lost(now) {
    for (const turn of this.list) {
      if (!["listening", "thinking", "replying"].includes(turn.status)) continue;
      if (turn.status === "replying") turn.replyEnd = now;
      turn.status = "lost";
      this.#changed(turn);
    }
  }

  // Levels of the reply have come in: was it the first sound of a reply, or the last of one?
  listen() {
    const [turn, cut] = [this.last, this.#interrupted];
    if (cut && this.#reply.onset <= cut.replyEnd) {
      cut.silentAt = Math.max(cut.interruptedFrom, this.#reply.lastLoud);
    }
    if (turn?.status !== "replying" || turn.replyHeard !== null) return;
    if (this.#reply.onset < turn.speechEnd) return;
    turn.replyHeard = this.#reply.onset;
    this.#changed(turn);
  }

  // Take in a server's event.
  event(event, now) {
    const turn = this.#of(event);
    switch (event.type) {
      case "input_audio_buffer.speech_started":
        this.begin(now);
        return;
      case "input_audio_buffer.speech_stopped":
        this.endSpeech(now);
        return;
    }
    if (!turn) return;
    switch (event.type) {
      case "conversation.item.input_audio_transcription.completed":
        turn.heard = String(event.transcript ?? "");
        break;
      case "response.created":
        turn.responseId = event.response?.id ?? null;
        break;
      case "output_audio_buffer.started":
        turn.speechEnd ??= now;
        turn.replyBegan = now;
        turn.status = "replying";
        break;
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta":
        turn.said += String(event.delta ?? "");
        break;
      case "response.output_audio_transcript.done":
        turn.said = String(event.transcript ?? turn.said);
        break;
      case "output_audio_buffer.stopped":
        turn.replyEnd = now;
        turn.status = "done";
        break;
      case "output_audio_buffer.cleared":
        turn.replyEnd = now;
        turn.status = "interrupted";
        if (!turn.interruptedBy) {
          turn.interruptedBy = "speech";
          turn.interruptedFrom = Math.min(this.#microphone.onset, now);
        }
        this.#interrupted = turn;
        this.interruptions += 1;
        break;
      case "response.done":
        if (turn.replyBegan === null) {
          turn.status = event.response?.status === "failed" ? "failed" : "silent";
        }
        break;
      default:
        return;
    }
    this.#changed(turn);
  }

  // The turn that an event is about: by its response, or else the last one.
  #of(event) {
    const id = event.response_id ?? event.response?.id;
    return this.list.findLast((turn) => id && turn.responseId === id) ?? this.last;
  }
}

// Milliseconds between two moments, null if one of them is not known.
export function between(from, until) {
  return from === null || until === null ? null : Math.round((until - from) * 1000);
}

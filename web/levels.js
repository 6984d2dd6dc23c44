// Audio worklet: the level of one sound, about a hundred times a second.
//
// It runs on the audio thread, so its times are those of the sound itself: what is measured with
// them does not suffer from a busy page. A message is {at, rms, peak}: the context's time in
// seconds at the end of the block, and levels from 0 to 1.
// https://www.w3.org/TR/webaudio/#AudioWorkletProcessor

/* global AudioWorkletProcessor, registerProcessor, currentTime, sampleRate */

// Render quanta of 128 samples in a message: 10.7 ms at 48 kHz. Fewer would only be more messages.
const QUANTA = 4;

class Levels extends AudioWorkletProcessor {
  #quanta = 0;
  #samples = 0;
  #squares = 0;
  #peak = 0;

  process([input]) {
    const samples = input[0];
    if (samples) {
      for (const sample of samples) {
        this.#squares += sample * sample;
        this.#peak = Math.max(this.#peak, Math.abs(sample));
      }
      this.#samples += samples.length;
    }
    this.#quanta += 1;
    if (this.#quanta === QUANTA) {
      const rms = this.#samples ? Math.sqrt(this.#squares / this.#samples) : 0;
      this.port.postMessage({ at: currentTime + 128 / sampleRate, rms, peak: this.#peak });
      this.#quanta = this.#samples = this.#squares = this.#peak = 0;
    }
    return true;
  }
}

registerProcessor("levels", Levels);

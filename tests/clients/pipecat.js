// A page that speaks through Pipecat's client and its small WebRTC transport, as their documentation
// shows it, and keeps what it hears: `guest` is what a test calls and looks at.
//
// The transport's own media manager loads a part of itself from a server on the Internet; this is the
// other one that comes with it, made to look as if it could share a screen: so the offer has two video
// lines, as with the first one.
import { PipecatClient } from "@pipecat-ai/client-js";
import { SmallWebRTCTransport, WavMediaManager } from "@pipecat-ai/small-webrtc-transport";

const guest = { heard: [], errors: [], states: [], asked: [], client: null, peers: [] };
window.guest = guest;

// Every connection that the transport makes, so that a test can look at one, or break it.
const Connection = window.RTCPeerConnection;
window.RTCPeerConnection = class extends Connection {
  constructor(...options) {
    super(...options);
    guest.peers.push(this);
  }
};

// How loud the loudspeaker is, 0 to 1, since the last look.
function listen(track) {
  const stream = new MediaStream([track]);
  const element = new Audio(); // without one Chromium decodes nothing
  element.srcObject = stream;
  element.muted = true;
  element.play();
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  guest.loudness = () => {
    analyser.getFloatTimeDomainData(samples);
    return samples.reduce((loudest, sample) => Math.max(loudest, Math.abs(sample)), 0);
  };
}
guest.loudness = () => 0;

const kept = [
  "onConnected", "onDisconnected", "onBotConnected", "onBotReady", "onBotDisconnected",
  "onUserStartedSpeaking", "onUserStoppedSpeaking", "onUserTranscript", "onUserLlmText",
  "onBotStartedSpeaking", "onBotStoppedSpeaking", "onBotTranscript", "onBotOutput", "onBotLlmStarted",
  "onBotLlmStopped", "onBotLlmText", "onBotTtsStarted", "onBotTtsStopped", "onBotTtsText",
  "onServerMessage", "onLLMFunctionCallStarted", "onLLMFunctionCallInProgress",
  "onLLMFunctionCallStopped",
];

guest.connect = async ({ url, start = null, headers = {}, data = null, transport = {} }) => {
  const request = { endpoint: url, headers: new Headers(headers) };
  if (data) request.requestData = data;
  const callbacks = Object.fromEntries(
    kept.map((name) => [name, (found) => guest.heard.push([name, found ?? null])]),
  );
  const mediaManager = new WavMediaManager();
  mediaManager._supportsScreenShare = true;
  const client = new PipecatClient({
    transport: new SmallWebRTCTransport({ mediaManager, ...transport }),
    enableMic: true,
    callbacks: {
      ...callbacks,
      onError: (message) => guest.errors.push(JSON.stringify(message)),
      onMessageError: (message) => guest.errors.push(JSON.stringify(message)),
      onTransportStateChanged: (state) => guest.states.push(state),
      onTrackStarted: (track, participant) => {
        if (track.kind === "audio" && !participant?.local) listen(track);
      },
    },
  });
  client.registerFunctionCallHandler("weather", async ({ arguments: { city } }) => {
    guest.asked.push(city);
    return `Sunny in ${city}.`;
  });
  guest.client = client;
  if (start) return client.startBotAndConnect({ endpoint: start, requestData: { body: data } });
  return client.connect({ webrtcRequestParams: request });
};

guest.names = () => guest.heard.map(([name]) => name);
guest.all = (name) => guest.heard.filter(([each]) => each === name).map(([, found]) => found);

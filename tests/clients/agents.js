// A page that speaks through OpenAI's Agents SDK, as its documentation shows it, and keeps what it
// hears: `guest` is what a test calls and looks at.
import {
  OpenAIRealtimeWebRTC,
  OpenAIRealtimeWebSocket,
  RealtimeAgent,
  RealtimeSession,
  tool,
} from "@openai/agents-realtime";
import { z } from "zod";

const guest = { events: [], errors: [], history: [], changes: [], asked: [], sideband: [] };
window.guest = guest;

const weather = tool({
  name: "weather",
  description: "The weather of a city.",
  parameters: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    guest.asked.push(city);
    return `Sunny in ${city}.`;
  },
});

// How loud the loudspeaker is just now, 0 to 1.
function listen(element) {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(element.srcObject).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  guest.loudness = () => {
    analyser.getFloatTimeDomainData(samples);
    return samples.reduce((loudest, sample) => Math.max(loudest, Math.abs(sample)), 0);
  };
}

guest.connect = async ({ url, apiKey, insecure = false, config = {}, tools = false }) => {
  const audioElement = document.createElement("audio");
  const transport = new OpenAIRealtimeWebRTC({
    baseUrl: url,
    audioElement,
    useInsecureApiKey: insecure,
  });
  const agent = new RealtimeAgent({
    name: "Guest",
    instructions: "Repeat what you hear.",
    tools: tools ? [weather] : [],
  });
  const session = new RealtimeSession(agent, { transport, model: "parrot", config });
  session.on("error", (error) => guest.errors.push(JSON.stringify(error)));
  session.on("history_updated", (history) => (guest.history = structuredClone(history)));
  transport.on("*", (event) => guest.events.push(event));
  transport.on("connection_change", (status) => guest.changes.push(status));
  guest.session = session;
  guest.transport = transport;
  await session.connect({ apiKey });
  // The SDK is connected once its channel is; on a busy machine the track's event may come later.
  for (let tries = 0; !audioElement.srcObject && tries < 500; tries += 1) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  listen(audioElement);
  return transport.callId;
};

// What the browser itself counts of the audio that comes.
guest.heard = async () => {
  const report = await guest.transport.connectionState.peerConnection.getStats();
  const inbound = [...report.values()].find(({ type }) => type === "inbound-rtp");
  return { packets: inbound?.packetsReceived ?? 0, energy: inbound?.totalAudioEnergy ?? 0 };
};

// The same call once more, by the SDK's WebSocket: as its server-side controls do.
guest.attend = async ({ url, apiKey }) => {
  const transport = new OpenAIRealtimeWebSocket({ url });
  transport.on("*", (event) => guest.sideband.push(event));
  await transport.connect({ apiKey, initialSessionConfig: { instructions: "Sing." } });
  guest.attending = transport;
};

guest.types = () => guest.events.map((event) => event.type);
guest.last = (type) => guest.events.findLast((event) => event.type === type) ?? null;

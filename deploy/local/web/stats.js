// One sample a second from getStats: rates are differences to the sample before.

const selectedPair = (report) => {
  for (const entry of report.values()) {
    if (entry.type === "transport" && entry.selectedCandidatePairId) return report.get(entry.selectedCandidatePairId);
  }
  // Firefox marks the pair itself.
  for (const entry of report.values()) if (entry.type === "candidate-pair" && entry.selected) return entry;
  return undefined;
};

const candidate = (entry) =>
  entry && {
    type: entry.candidateType,
    protocol: entry.protocol,
    relayProtocol: entry.relayProtocol,
    url: entry.url,
    address: entry.address ?? entry.ip ?? "",
    port: entry.port,
  };

const rate = (now, before, seconds) => (before === undefined || seconds <= 0 ? 0 : Math.max(0, now - before) / seconds);

/** Takes samples of one peer connection. */
export class Sampler {
  constructor(pc) {
    this.pc = pc;
    this.raw = {};
  }

  /**
   * `{ at, rttMs, bytesIn, bytesOut, inPerSecond, outPerSecond, lossIn, lossOut, framesDecoded, framesPerSecond,
   * width, height, pair: { id, local, remote } }`; loss is 0..=1, rates are bytes a second, `pair` may be undefined.
   */
  async take() {
    const report = await this.pc.getStats();
    const pair = selectedPair(report);
    const raw = { at: performance.now(), pairId: pair?.id, bytesIn: pair?.bytesReceived ?? 0, bytesOut: pair?.bytesSent ?? 0, lost: 0, received: 0 };
    const sample = { at: Date.now(), rttMs: pair?.currentRoundTripTime === undefined ? undefined : pair.currentRoundTripTime * 1000, bytesIn: raw.bytesIn, bytesOut: raw.bytesOut, framesDecoded: 0, lossOut: 0 };
    for (const entry of report.values()) {
      if (entry.type === "inbound-rtp") {
        raw.lost += entry.packetsLost ?? 0;
        raw.received += entry.packetsReceived ?? 0;
        if (entry.kind === "video") {
          sample.framesDecoded += entry.framesDecoded ?? 0;
          sample.framesPerSecond = entry.framesPerSecond ?? 0;
          sample.width = entry.frameWidth;
          sample.height = entry.frameHeight;
        }
      } else if (entry.type === "remote-inbound-rtp") {
        sample.lossOut = Math.max(sample.lossOut, entry.fractionLost ?? 0);
      }
    }
    const before = this.raw.pairId === raw.pairId ? this.raw : { ...this.raw, bytesIn: undefined, bytesOut: undefined };
    const seconds = (raw.at - (before.at ?? raw.at)) / 1000;
    sample.inPerSecond = rate(raw.bytesIn, before.bytesIn, seconds);
    sample.outPerSecond = rate(raw.bytesOut, before.bytesOut, seconds);
    const lost = Math.max(0, raw.lost - (before.lost ?? 0));
    const expected = lost + Math.max(0, raw.received - (before.received ?? 0));
    sample.lossIn = expected > 0 ? lost / expected : 0;
    sample.pair = pair && { id: pair.id, local: candidate(report.get(pair.localCandidateId)), remote: candidate(report.get(pair.remoteCandidateId)) };
    this.raw = raw;
    return sample;
  }
}

/** How often the last picture's time is looked at. */
const LOOK_MS = 100;

/** The longest time in which no picture came in. A hidden page's timers are too slow to tell, so it does not count. */
export class PauseWatch {
  constructor(pc) {
    this.longestMs = 0;
    this.last = null;
    this.timer = setInterval(() => this.look(pc), LOOK_MS);
  }

  look(pc) {
    const receiver = pc.getReceivers().find(({ track }) => track.kind === "video");
    const [source] = receiver?.getSynchronizationSources() ?? [];
    if (!source || document.hidden) {
      this.last = null;
      return;
    }
    if (this.last !== null) this.longestMs = Math.max(this.longestMs, Math.round(source.timestamp - this.last));
    this.last = source.timestamp;
  }

  stop() {
    clearInterval(this.timer);
  }
}

// One RTCPeerConnection with perfect negotiation (W3C webrtc-pc, section 10.7): either side may offer at any time.

/** Without a candidate after this long the user is told; a relay answers within a round trip. */
const GATHER_MS = 4000;

export class Peer {
  /**
   * `polite`: gives way when both offer at once, and waits with its tracks for the first offer.
   * `send(data)` hands something to the other side; `on` has `state(name)`, `track(stream)`, `gathered()` for the
   * first candidate, and `nothingGathered(errors, isOver)`.
   */
  constructor({ configuration, stream, polite, send, on }) {
    this.polite = polite;
    this.stream = stream;
    this.send = send;
    this.on = on;
    this.gathered = 0;
    this.errors = [];
    this.beganAt = performance.now();
    this.pc = new RTCPeerConnection(configuration);
    this.listen();
    if (!polite) this.addTracks();
  }

  addTracks() {
    if (this.hasTracks) return;
    this.hasTracks = true;
    for (const track of this.stream.getTracks()) this.pc.addTrack(track, this.stream);
  }

  listen() {
    const { pc } = this;
    pc.addEventListener("negotiationneeded", () => this.offer());
    pc.addEventListener("track", ({ streams }) => this.on.track(streams[0]));
    pc.addEventListener("icecandidate", ({ candidate }) => {
      if (candidate?.candidate && ++this.gathered === 1) this.on.gathered();
      if (candidate) this.send({ candidate });
    });
    pc.addEventListener("icecandidateerror", ({ url, errorCode, errorText }) => this.errors.push({ url, errorCode, errorText }));
    pc.addEventListener("icegatheringstatechange", () => {
      clearTimeout(this.gathering);
      if (this.gathered > 0) return;
      if (pc.iceGatheringState === "complete") this.on.nothingGathered(this.errors, true);
      if (pc.iceGatheringState === "gathering") this.gathering = setTimeout(() => this.gathered === 0 && this.on.nothingGathered(this.errors, false), GATHER_MS);
    });
    pc.addEventListener("connectionstatechange", () => this.changed());
    pc.addEventListener("iceconnectionstatechange", () => this.on.state(this.state));
  }

  changed() {
    const { pc } = this;
    if (pc.connectionState === "connected") this.connectMs ??= Math.round(performance.now() - this.beganAt);
    if (pc.connectionState === "connected" || pc.connectionState === "failed") this.restarting = false;
    this.on.state(this.state);
  }

  /** `connecting`, `connected`, `interrupted`, `reconnecting`, `failed` or `closed`. */
  get state() {
    const state = this.pc.connectionState;
    if (this.restarting && state !== "connected" && state !== "closed") return "reconnecting";
    return { new: "connecting", disconnected: "interrupted" }[state] ?? state;
  }

  /** The connection was told to look for new candidates. */
  restarts() {
    this.restarting = true;
    this.gathered = 0;
    this.on.state(this.state);
  }

  async offer() {
    try {
      this.offering = true;
      await this.pc.setLocalDescription();
      this.send({ description: this.pc.localDescription });
    } catch (error) {
      // Hung up meanwhile.
      if (this.pc.signalingState !== "closed") throw error;
    } finally {
      this.offering = false;
    }
  }

  /** Takes what the other side sent. */
  async take({ description, candidate }) {
    const { pc } = this;
    if (description) {
      // While an answer is being taken in the connection is as good as stable.
      const isBusy = this.offering || (pc.signalingState !== "stable" && !this.answering);
      this.ignoring = !this.polite && description.type === "offer" && isBusy;
      if (this.ignoring) return;
      this.answering = description.type === "answer";
      try {
        await pc.setRemoteDescription(description);
      } finally {
        this.answering = false;
      }
      if (description.type === "offer") {
        this.addTracks();
        await pc.setLocalDescription();
        this.send({ description: pc.localDescription });
      }
    } else if (candidate) {
      try {
        await pc.addIceCandidate(candidate);
      } catch (error) {
        if (!this.ignoring) throw error;
      }
    }
  }

  close() {
    clearTimeout(this.gathering);
    this.pc.close();
    this.on.state("closed");
  }
}

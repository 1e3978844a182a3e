// Signalling: a WebSocket that comes back by itself. What the server says is in src/page/rooms.rs.

const BACKOFF_MS = [300, 1000, 2000, 4000];

/** A name for this page load; the server knows a peer that reconnects by it. */
const randomName = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class Signal {
  /** `on(message)` gets what the server says; `onLink(up)` hears of the connection itself. */
  constructor(room, { on, onLink }) {
    this.room = room;
    this.name = randomName();
    this.on = on;
    this.onLink = onLink;
    this.attempts = 0;
    this.waiting = [];
    this.open();
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/signal?room=${encodeURIComponent(this.room)}&peer=${this.name}`);
    this.socket = socket;
    socket.addEventListener("open", () => {
      this.attempts = 0;
      this.onLink(true);
    });
    socket.addEventListener("message", (event) => {
      const message = JSON.parse(event.data);
      if (message.type === "full" || message.type === "replaced") this.closed = true;
      this.on(message);
      if (message.type === "welcome" && message.peer) this.flush();
    });
    socket.addEventListener("close", () => {
      if (this.closed || socket !== this.socket) return;
      this.onLink(false);
      const wait = BACKOFF_MS[Math.min(this.attempts, BACKOFF_MS.length - 1)];
      this.attempts += 1;
      setTimeout(() => !this.closed && this.open(), wait);
    });
  }

  /** To the other one. While the connection is away messages wait for it. */
  send(data) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type: "signal", data }));
    else this.waiting.push(data);
  }

  flush() {
    for (const data of this.waiting.splice(0)) this.send(data);
  }

  /** Leaves the room. */
  bye() {
    this.closed = true;
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type: "bye" }));
    this.socket.close();
  }
}

// Keeps the console true: one event stream from the controller, a snapshot each second, redrawn in place.
import { Refusal, follow } from "./api.js";
import { startActing } from "./acting.js";
import { startExplaining } from "./explain.js";
import { startSession } from "./session.js";
import { away, render, startSearching } from "./view.js";

/** After this long without a snapshot the picture is called old, whatever the connection says. */
const STALE_MS = 4000;
/** A stream that ended is opened again after this long. */
const REOPEN_MS = 2000;

let lastSnapshotAt = 0;
let current = new AbortController();

const take = (data) => {
  lastSnapshotAt = Date.now();
  render(JSON.parse(data));
  away(null);
};

/** Follows the stream for ever; a change of key opens another one at once. */
const run = async () => {
  for (;;) {
    current = new AbortController();
    const ended = await follow("/v1/console/events", take, current.signal).catch((error) => error);
    if (current.signal.aborted) continue;
    away(lastSnapshotAt, ended instanceof Refusal && ended.status === 401 ? "Sign in to see the cluster." : undefined);
    await new Promise((done) => setTimeout(done, REOPEN_MS));
  }
};

setInterval(() => {
  if (Date.now() - lastSnapshotAt > STALE_MS && lastSnapshotAt) away(lastSnapshotAt);
}, 1000);

startSession(() => current.abort());
startActing();
startExplaining();
startSearching();
run();

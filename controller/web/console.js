// Keeps the console true: one event stream from the controller, a snapshot each second, redrawn in place.
import { away, render } from "./view.js";

/** After this long without a snapshot the picture is called old, whatever the connection says. */
const STALE_MS = 4000;
/** An event stream that ended for good is opened again after this long. */
const REOPEN_MS = 2000;

// An API key given in the page's own address is handed on.
const address = `/v1/console/events${location.search}`;
let lastSnapshotAt = 0;

const open = () => {
  const stream = new EventSource(address);
  const take = (event) => {
    lastSnapshotAt = Date.now();
    render(JSON.parse(event.data));
    away(null);
  };
  stream.addEventListener("message", take);
  stream.addEventListener("snapshot", take);
  stream.addEventListener("error", () => {
    away(lastSnapshotAt);
    // The browser tries again by itself, but not after an HTTP error.
    if (stream.readyState === EventSource.CLOSED) setTimeout(open, REOPEN_MS);
  });
};

setInterval(() => {
  if (Date.now() - lastSnapshotAt > STALE_MS) away(lastSnapshotAt);
}, 1000);

open();

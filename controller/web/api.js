// The controller's answers, asked for with whatever key this tab has.

const KEPT = "turnpike.console.key";
/** An API key in the page's own address is handed on where something is only looked at. */
const given = new URLSearchParams(location.search);
const addressKey = given.get("key") ?? given.get("api");

/** The console key of this tab, or `null`. */
export const key = () => sessionStorage.getItem(KEPT);

/** Keeps a key for as long as the tab is open; `null` forgets it. */
export const keep = (value) => (value === null ? sessionStorage.removeItem(KEPT) : sessionStorage.setItem(KEPT, value));

const headers = (own) => (own ? { authorization: `Bearer ${own}` } : {});

const address = (path, query) => {
  const wanted = Object.entries({ ...query, key: addressKey ?? "" }).filter(([, value]) => value !== "");
  const search = new URLSearchParams(wanted).toString();
  return search ? `${path}?${search}` : path;
};

/** An answer that is no success: its status and the sentence in it. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const answer = async (response) => {
  const said = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(response.status, said.error ?? `the controller answered ${response.status}`);
  return said;
};

const reach = (path, options) =>
  fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the controller does not answer");
  });

/** `GET`, as JSON. `own` is a key to try instead of the kept one. */
export const ask = async (path, query = {}, { own = key(), signal } = {}) =>
  answer(await reach(address(path, query), { headers: headers(own), signal }));

/** `POST` of JSON. */
export const act = async (path, body) =>
  answer(await reach(path, { method: "POST", headers: { ...headers(key()), "content-type": "application/json" }, body: JSON.stringify(body) }));

/** Calls `take` with the data of every event of a stream, until it ends or breaks. Not an EventSource: that cannot send the key. */
export const follow = async (path, take, signal) => {
  const response = await fetch(address(path, {}), { headers: headers(key()), signal });
  if (!response.ok) await answer(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) take(data.join("\n"));
    }
  }
};

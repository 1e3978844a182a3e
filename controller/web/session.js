// Who is at the console: signs in and out, and tells the rest of the page what that person may do.
import { Refusal, ask, keep, key } from "./api.js";
import { text } from "./keyed.js";

const byId = (id) => document.getElementById(id);

/** `{ name, role, may_act, can_sign_in }`. */
export let session = { name: "console", role: "viewer", may_act: false, can_sign_in: false };
const listeners = [];

/** Calls `listener` now and whenever the session changes. */
export const onSession = (listener) => {
  listeners.push(listener);
  listener(session);
};

/** Why the buttons that act are off; empty when they are not. */
export const mayNot = () => {
  if (session.may_act) return "";
  if (!session.can_sign_in) return "Only looking: to drain here, give somebody a key in console_keys; turnctl drain works always.";
  return key() ? `Only looking: ${session.name} has the role ${session.role}; draining takes the role operator.` : "Only looking: draining takes the key of an operator.";
};

const show = (next) => {
  session = next;
  const signedIn = key() !== null && next.name !== "console";
  byId("sign-in").hidden = signedIn || !next.can_sign_in;
  byId("sign-out").hidden = !signedIn;
  byId("who").hidden = !signedIn;
  text(byId("who"), signedIn ? `${next.name} · ${next.role}` : "");
  text(byId("may-not"), mayNot());
  document.body.dataset.acts = String(next.may_act);
  for (const listener of listeners) listener(next);
};

/** Asks who this tab is to the controller, again and again until it answers. */
const refresh = async () => {
  try {
    show(await ask("/v1/console/session"));
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) {
      keep(null);
      show({ name: "console", role: "viewer", may_act: false, can_sign_in: true });
    } else {
      setTimeout(refresh, 2000);
    }
  }
};

/** Wires the sign-in dialog; `changed` is called when another key is in use. */
export const startSession = (changed) => {
  const dialog = byId("sign-in-dialog");
  const problem = byId("sign-in-problem");
  byId("sign-in").addEventListener("click", () => {
    byId("sign-in-form").reset();
    problem.hidden = true;
    dialog.showModal();
  });
  byId("sign-in-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const given = byId("key").value.trim();
    try {
      const next = await ask("/v1/console/session", {}, { own: given });
      keep(given);
      byId("key").value = "";
      dialog.close();
      show(next);
      changed();
    } catch (error) {
      text(problem, error.status === 401 ? "Nobody has this key." : error.message);
      problem.hidden = false;
      byId("key").select();
    }
  });
  byId("sign-out").addEventListener("click", () => {
    keep(null);
    refresh();
    changed();
    byId("sign-in").focus();
  });
  for (const button of document.querySelectorAll("dialog [data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  refresh();
};

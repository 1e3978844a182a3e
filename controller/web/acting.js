// What an operator does here: drain, uncordon, end an allocation. Each asks first, says what came of it, and leaves the focus
// where it was.
import { Refusal, act } from "./api.js";
import { person } from "./format.js";
import { text } from "./keyed.js";

const byId = (id) => document.getElementById(id);
let draining = null;
let ending = null;

/** Says what has been done, until the next thing is. */
const say = (sentence, tone = "good") => {
  const said = byId("said");
  text(said, sentence);
  said.dataset.tone = tone;
  said.hidden = false;
};

const complain = (id, error) => {
  const problem = byId(id);
  text(problem, error instanceof Refusal ? error.message : String(error));
  problem.hidden = false;
};

/** Asks how to drain a relay. */
export const askToDrain = (node) => {
  draining = node.id;
  byId("drain-form").reset();
  byId("drain-problem").hidden = true;
  byId("drain-force-row").hidden = true;
  text(byId("drain-title"), `Drain ${node.id}`);
  byId("drain-dialog").showModal();
};

/** Takes back that a relay drains. */
export const uncordon = async (node) => {
  try {
    await act("/v1/console/uncordon", { node: node.id });
    say(`${node.id} takes new clients again.`);
  } catch (error) {
    say(`${node.id} was not uncordoned: ${error.message}`, "bad");
  }
};

/** Asks whether to end an allocation. */
export const askToEnd = (allocation) => {
  ending = allocation;
  byId("end-problem").hidden = true;
  text(byId("end-what"), `${person(allocation.user)} on ${allocation.node}, from ${allocation.client}. What it carries stops at once; its client may make another.`);
  byId("end-dialog").showModal();
};

/** Wires the dialogs. */
export const startActing = () => {
  byId("drain-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const confirm = byId("drain-confirm");
    confirm.disabled = true;
    try {
      const force = byId("drain-force").checked;
      await act("/v1/console/drain", { node: draining, deadline_seconds: Number(byId("drain-deadline").value), force });
      byId("drain-dialog").close();
      say(`${draining} takes no new clients from now on.`);
    } catch (error) {
      complain("drain-problem", error);
      // It would leave a region without a relay: that can be wanted.
      byId("drain-force-row").hidden = error.status !== 409;
    } finally {
      confirm.disabled = false;
    }
  });
  byId("end-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await act("/v1/console/end", { allocation: ending.id });
      byId("end-dialog").close();
      say(`The allocation of ${person(ending.user)} on ${ending.node} ends.`);
    } catch (error) {
      complain("end-problem", error);
    }
  });
};

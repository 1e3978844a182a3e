// The steering explainer: what discovery would answer to a client, and why, as `turnctl explain` says it.
import { ask } from "./api.js";
import { duration } from "./format.js";
import { keyed, text } from "./keyed.js";

const byId = (id) => document.getElementById(id);

/** Offers the regions there are in both lists, and keeps what is chosen. */
export const offerRegions = (names) => {
  for (const select of document.querySelectorAll("#explain select")) {
    const offered = [...select.options].slice(1).map((option) => option.value);
    if (offered.join("\n") === names.join("\n")) continue;
    const chosen = select.value;
    select.replaceChildren(select.options[0], ...names.map((name) => new Option(name, name)));
    select.value = names.includes(chosen) ? chosen : "";
  }
};

const make = () => {
  const row = document.createElement("tr");
  for (const [name, kind] of [["Relay", ""], ["Region", ""], ["Round trip", "number"], ["Known by", ""], ["Load", "number"], ["Score", "number"], ["What became of it", "wide"]]) {
    const cell = row.insertCell();
    cell.dataset.name = name;
    cell.className = kind;
  }
  return row;
};

const draw = (row, relay) => {
  const [node, region, rtt, basis, load, score, outcome] = row.cells;
  row.dataset.chosen = String(relay.place !== null);
  text(node, relay.node);
  text(region, relay.region);
  text(rtt, `${relay.rtt_ms} ms`);
  text(basis, relay.age_s === null ? relay.basis : `${relay.basis}, ${duration(relay.age_s)} ago`);
  text(load, `${(relay.load_permille / 10).toFixed(1)} %`);
  text(score, `${relay.score_ms} ms`);
  const more = [relay.penalty_ms && `${relay.penalty_ms} ms for its load`, relay.session_ms && `${relay.session_ms} ms to the other end`].filter(Boolean);
  text(outcome, more.length ? `${relay.outcome} (${more.join(", ")} in its score)` : relay.outcome);
};

const show = (answer) => {
  byId("explained").hidden = false;
  const who = answer.client ? `A client at ${answer.client}` : "Such a client";
  const verdict = byId("explain-verdict");
  verdict.dataset.tone = answer.relays.length ? "good" : "bad";
  text(verdict, answer.relays.length ? `${who} is sent to ${answer.relays.join(", then ")}.` : `${who} gets no relay: ${answer.refusal}.`);
  keyed(byId("explain-evidence"), answer.evidence, (sentence) => sentence, () => document.createElement("li"), text);
  byId("explain-table").hidden = answer.considered.length === 0;
  keyed(byId("considered"), answer.considered, (relay) => relay.node, make, draw);
};

/** Wires the form. */
export const startExplaining = () => {
  const form = byId("explain");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const fields = Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, value.trim()]));
    try {
      show(await ask("/v1/console/explain", fields));
    } catch (error) {
      byId("explained").hidden = false;
      byId("explain-table").hidden = true;
      byId("explain-evidence").replaceChildren();
      byId("explain-verdict").dataset.tone = "bad";
      text(byId("explain-verdict"), `No answer: ${error.message}.`);
    }
  });
};

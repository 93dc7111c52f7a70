// Settings of a conversation: the system prompt, thinking and samplers. A new conversation begins with the last ones.

import { element } from "./elements.js";

const LAST = "moetier.settings";
const FIELDS = [
  // name in requests, label, least, most, step, what it does
  ["temperature", "Temperature", 0, 2, "any", "0 always takes the most likely token"],
  ["top_p", "Top-p", 0.001, 1, "any", "only the most likely tokens with this probability together"],
  ["top_k", "Top-k", 0, 1_000_000, 1, "only so many of the most likely tokens; 0: all"],
  ["min_p", "Min-p", 0, 1, "any", "only tokens at least this likely, compared with the likeliest"],
  ["repetition_penalty", "Repetition penalty", 0.01, 100, "any", "1 changes nothing"],
  ["presence_penalty", "Presence penalty", -2, 2, "any", "0 changes nothing"],
  ["frequency_penalty", "Frequency penalty", -2, 2, "any", "0 changes nothing"],
  ["max_tokens", "Longest answer", 1, 1_000_000, 1, "in tokens"],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "makes an answer the same each time"],
];
const id = (name) => document.getElementById(name);

/** Return the settings with which a new conversation begins. */
export function lastSettings() {
  try {
    return JSON.parse(localStorage.getItem(LAST)) ?? {};
  } catch {
    return {};
  }
}

/** Return the fields of a request that settings ask for. */
export function requestFields({ thinking, samplers = {} }) {
  return { ...samplers, ...(thinking ? { enable_thinking: thinking === "on" } : {}) };
}

/** The dialog that changes settings. */
export class SettingsDialog {
  /** `changed` is called with the new settings. */
  constructor(changed) {
    this.dialog = id("settings");
    id("samplers").append(...FIELDS.map(field));
    id("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close();
      const settings = shown();
      localStorage.setItem(LAST, JSON.stringify(settings));
      changed(settings);
    });
    id("reset-settings").addEventListener("click", () => fill({}));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside the form
    });
  }

  open(settings) {
    fill(settings);
    this.dialog.showModal();
  }
}

function field([name, label, min, max, step, hint]) {
  const input = { id: `set-${name}`, type: "number", inputmode: "decimal", min, max, step, "aria-describedby": `hint-${name}` };
  return element(
    "div", { class: "field" },
    element("label", { for: input.id }, label),
    element("input", { ...input, autocomplete: "off" }),
    element("span", { id: `hint-${name}`, class: "small" }, hint),
  );
}

function fill({ system = "", thinking = "", samplers = {} }) {
  id("system").value = system;
  id("thinking").value = thinking;
  for (const [name] of FIELDS) id(`set-${name}`).value = samplers[name] ?? "";
}

function shown() {
  const values = FIELDS.map(([name]) => [name, id(`set-${name}`).valueAsNumber]);
  const samplers = Object.fromEntries(values.filter(([, value]) => Number.isFinite(value)));
  return { system: id("system").value.trim() ? id("system").value : "", thinking: id("thinking").value, samplers };
}

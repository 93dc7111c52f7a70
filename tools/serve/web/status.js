// The line below the conversation: the prompt's progress, where the experts come from, and the speed.

import { metrics } from "./api.js";
import { show } from "./elements.js";

const SECONDS = 1; // between two looks at the metrics while an answer is computed
const WAITING = "Waiting";
const id = (name) => document.getElementById(name);

/** Return the value of a server's gauge for a model. */
function gaugeOf(samples, name, model) {
  return samples.find((each) => each.name === `moetier_serve_${name}` && each.labels.model === model)?.value ?? 0;
}

/** Return the counters of a model's tiers, by tier: {hits, misses}. Names of counters end in _total. */
function tiersIn(samples, model) {
  const tiers = {};
  for (const { name, labels, value } of samples) {
    const counter = /^moetier_tier_(hits|misses)_total$/.exec(name)?.[1];
    const tier = labels.tier === "daemon" ? "host" : labels.tier; // a daemon's experts are in the host's memory
    if (counter && labels.model === model) (tiers[tier] ??= { hits: 0, misses: 0 })[counter] = value;
  }
  return tiers;
}

/** Return which shares of the demands between two looks came from the device, the host and the disk; null: none. */
function sharesOf(before, after) {
  const grown = (tier, counter) => (after[tier]?.[counter] ?? 0) - (before[tier]?.[counter] ?? 0);
  const part = (hits, misses) => (hits + misses > 0 ? hits / (hits + misses) : 0);
  const hasDevice = "device" in after;
  const first = hasDevice ? "device" : "host";
  const demands = grown(first, "hits") + grown(first, "misses");
  if (demands <= 0) return null;
  const device = hasDevice ? part(grown("device", "hits"), grown("device", "misses")) : 0;
  const host = (1 - device) * part(grown("host", "hits"), grown("host", "misses"));
  return { device, host, disk: Math.max(0, 1 - device - host) };
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 1 ? 1 : 0)} %`;

/** Return shares as a text. */
export function sharesText({ device, host, disk }) {
  const parts = [["device", device], ["host", host], ["disk", disk]].filter(([name, share]) => share > 0 || name !== "device");
  return parts.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
}

/** Show what the server does for one answer, from `begin` to `end`. */
export class Status {
  #timer = null;
  #before = {};
  #after = {};
  #most = 0; // prompt tokens that were left at the first look

  /** Watch the metrics while an answer of `model` is computed. */
  async begin(model) {
    this.model = model;
    this.shares = null;
    this.#most = 0;
    this.#before = this.#after = null;
    this.hasText = false;
    this.phase(WAITING);
    this.speed("");
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#look(), 1000 * SECONDS);
    await this.#look();
  }

  /** Take the last look, and stop. Return the shares of the whole answer; null if they are not known. */
  async end() {
    clearInterval(this.#timer);
    this.#timer = null;
    await this.#look();
    this.phase("");
    show(id("prompt"), false);
    return this.shares;
  }

  /** The first text has come: the prompt is computed. */
  begun() {
    this.hasText = true;
    this.phase("Answering");
    show(id("prompt"), false);
  }

  /** Show a comment of the stream. */
  comment(text) {
    if (this.hasText) return;
    const match = /^computing: ([\d,]+) of ([\d,]+) prompt tokens(.*)/.exec(text);
    if (match) {
      const [done, total] = match.slice(1, 3).map((count) => Number(count.replaceAll(",", "")));
      this.#progress(done / total, `Reading the prompt: ${match[1]} of ${match[2]} tokens${match[3]}`);
    } else if (!text.startsWith("computing")) this.phase(text[0].toUpperCase() + text.slice(1));
  }

  phase(text) {
    id("phase").textContent = text;
  }

  speed(text) {
    id("speed").textContent = text;
  }

  async #look() {
    const samples = await metrics().catch(() => null);
    if (samples === null) return;
    this.#after = tiersIn(samples, this.model);
    this.#before ??= this.#after;
    const shares = sharesOf(this.#before, this.#after);
    if (shares) this.#show((this.shares = shares));
    if (this.#timer === null || this.hasText) return;
    if (id("phase").textContent.startsWith(WAITING)) {
      this.phase(gaugeOf(samples, "loaded", this.model) ? WAITING : `${WAITING} until ${this.model} is loaded`);
    }
    this.#left(samples);
  }

  /** Show how much of the prompts under way is left. The server's comments, which come seldom, are exact. */
  #left(samples) {
    const value = (name) => gaugeOf(samples, name, this.model);
    const left = value("prompt_tokens_left");
    this.#most = Math.max(this.#most, left);
    if (!left || this.#most < 256) return;
    const seconds = Math.ceil(value("prompt_seconds_left"));
    const [done, total] = [this.#most - left, this.#most].map((count) => count.toLocaleString("en"));
    const more = seconds > 0 ? `, ${seconds} s left` : "";
    this.#progress(1 - left / this.#most, `Reading the prompt: ${done} of ${total} tokens${more}`);
  }

  #progress(share, text) {
    id("prompt").value = share;
    show(id("prompt"), true);
    this.phase(text);
  }

  #show(shares) {
    for (const part of document.querySelectorAll("#tiers i")) {
      part.style.flexGrow = shares[part.className];
    }
    id("tiers-text").textContent = `Experts: ${sharesText(shares)}`;
    show(id("experts"), true);
  }
}

// One conversation: its tree of messages, which of its branches is shown, and the answer that is being written.

import { ApiError, answer } from "./api.js";
import { lastSettings, requestFields } from "./settings.js";
import { newId } from "./store.js";

const SAVE_MS = 500; // an answer that is being written is saved so often
const TITLE = 60; // letters

export class Talk {
  running = null; // {id, message, controller} of the answer that this tab is writing

  /** `on` has the functions changed(), wrote(message), failed(error), began(model), comment(text), text(), ended(). */
  constructor(store, on) {
    this.store = store;
    this.on = on;
    this.reset();
  }

  /** Begin a new conversation, which is saved with its first message. */
  reset() {
    this.conversation = null;
    this.settings = lastSettings();
    this.messages = new Map();
    this.leaf = null;
  }

  /** Show a conversation. Returns false if there is none of this id. */
  async open(id) {
    const [conversation, messages] = await Promise.all([this.store.conversation(id), this.store.messages(id)]);
    if (!conversation) return false;
    const isSame = this.conversation?.id === id;
    this.conversation = conversation;
    this.settings = conversation.settings ?? {};
    this.messages = new Map(messages.map((message) => [message.id, message]));
    if (this.isRunningHere) this.messages.set(this.running.id, this.running.message);
    if (!isSame) this.leaf = this.isRunningHere ? this.running.id : conversation.leaf;
    if (!this.messages.has(this.leaf)) this.leaf = messages.at(-1)?.id ?? null;
    if (!this.isRunningHere) this.leaf = this.#lastBelow(this.leaf);
    return true;
  }

  /** Whether the answer that is being written belongs to the conversation that is shown. */
  get isRunningHere() {
    return this.running !== null && this.running.message.conversation === this.conversation?.id;
  }

  /** The messages of the branch that is shown. */
  get path() {
    const path = [];
    for (let message = this.messages.get(this.leaf); message; message = this.messages.get(message.parent)) path.push(message);
    return path.reverse();
  }

  /** Return the number of a message among its versions, and how many there are. */
  versionsOf(message) {
    const versions = this.#below(message.parent);
    return [versions.indexOf(message) + 1, versions.length];
  }

  /** Show the version of a message that is `step` versions away. */
  async choose(message, step) {
    const versions = this.#below(message.parent);
    const chosen = versions[versions.indexOf(message) + step];
    if (!chosen) return;
    this.leaf = this.isRunningHere && chosen.id === this.running.id ? chosen.id : this.#lastBelow(chosen.id);
    this.on.changed();
    await this.store.update(this.conversation.id, { leaf: this.leaf });
  }

  /** Send a message, and write the answer. */
  async send(text, model) {
    if (this.running) return;
    let added;
    if (!this.conversation) {
      const title = text.trim().split("\n")[0].slice(0, TITLE);
      const now = Date.now();
      this.conversation = { id: newId(), title, created: now, updated: now, leaf: null, model, settings: this.settings };
      added = this.store.add(this.conversation); // the browser carries out later changes behind this one
    }
    await Promise.all([added, this.#ask(text, this.leaf, model)]);
  }

  /** Send another version of a message of the user. */
  async edit(message, text, model) {
    if (!this.running) await this.#ask(text, message.parent, model);
  }

  /** Write another answer to the question before `message`. */
  async regenerate(message, model) {
    if (!this.running) await this.#answer(message.parent, model);
  }

  /** Stop the answer. What it has so far is kept. */
  stop() {
    this.running?.controller.abort();
  }

  /** Change the settings. */
  async set(settings) {
    this.settings = settings;
    if (this.conversation) await this.store.update(this.conversation.id, { settings });
  }

  #ask(text, parent, model) {
    const question = this.#made({ parent, role: "user", content: text });
    return this.#answer(question.id, model, [question]);
  }

  /** Write an answer to `parent`. Save it, and the messages `made` before it. */
  async #answer(parent, model, made = []) {
    const message = this.#made({ parent, role: "assistant", content: "", reasoning: "", model, finish: null });
    const controller = new AbortController();
    this.running = { id: message.id, message, controller };
    const body = { model, messages: this.#prompt(message), ...requestFields(this.settings) };
    this.on.began(model);
    this.on.changed();
    const saved = [...made, message].map((each) => this.store.save(each));
    saved.push(this.store.update(this.conversation.id, { leaf: message.id, updated: Date.now(), model }));
    try {
      await this.#write(message, answer(body, controller.signal));
      await Promise.all(saved);
    } catch (error) {
      message.finish = error.name === "AbortError" ? "stopped" : "error";
      if (error.name !== "AbortError") {
        message.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
        this.on.failed(error);
      }
    }
    message.shares = await this.on.ended(message);
    this.running = null;
    await this.store.save(message);
    this.on.changed();
  }

  /** Add what comes of an answer to its message. */
  async #write(message, events) {
    const begun = performance.now();
    const since = () => (performance.now() - begun) / 1000;
    let [first, tokens, saved] = [null, 0, begun];
    for await (const { comment, data } of events) {
      if (comment !== undefined) {
        this.on.comment(comment);
        continue;
      }
      const [choice] = data.choices;
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      if (content || reasoning) {
        first ??= since();
        tokens += 1; // mostly a piece is one token; the last piece has the right number
        message.content += content ?? "";
        message.reasoning += reasoning ?? "";
        this.on.wrote(message, tokens > 1 ? (tokens - 1) / (since() - first) : null);
      }
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (data.usage) {
        const { prompt_tokens: prompt, completion_tokens: made, prompt_tokens_details: details } = data.usage;
        message.usage = { prompt, cached: details?.cached_tokens ?? 0, new: made };
        message.seconds = { first: first ?? since(), total: since() };
      }
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        this.store.save(message);
      }
    }
    message.finish ??= "stop";
  }

  /** Return the messages of a request for an answer. A question without an answer is left out: templates want pairs. */
  #prompt(message) {
    const said = [];
    const [question, ...before] = this.#before(message);
    for (let at = 0; at < before.length; at += 2) {
      if (before[at].content) said.unshift(before[at + 1], before[at]);
    }
    said.push(question);
    const system = this.settings.system ? [{ role: "system", content: this.settings.system }] : [];
    const sent = said.map(({ role, content, reasoning }) => ({
      role, content, ...(reasoning ? { reasoning_content: reasoning } : {}),
    }));
    return [...system, ...sent];
  }

  /** Return the messages before one, the last one first. */
  #before(message) {
    const before = [];
    for (let each = this.messages.get(message.parent); each; each = this.messages.get(each.parent)) before.push(each);
    return before;
  }

  #made(fields) {
    const message = { id: newId(), conversation: this.conversation.id, created: Date.now(), ...fields };
    this.messages.set(message.id, message);
    this.leaf = message.id;
    return message;
  }

  #below(parent) {
    return [...this.messages.values()].filter((message) => message.parent === parent);
  }

  #lastBelow(id) {
    let last = id;
    for (let below; (below = this.#below(last)).length; ) last = below.at(-1).id;
    return last;
  }
}

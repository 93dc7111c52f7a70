// Shows the messages of a conversation.

import { button, element, show } from "./elements.js";
import { showMarkdown } from "./markdown.js";
import { sharesText } from "./status.js";

const log = document.getElementById("log");
const shown = new Map(); // message id -> Shown

/** Whether the end of the conversation is in sight, so that the page follows an answer. */
export const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

/** Scroll to the end of the conversation. */
export function scrollToEnd() {
  log.scrollTop = log.scrollHeight;
}

/** Show `messages`, in order. `versions` has, for each message, [its number, number of versions]. */
export function showMessages(messages, versions, running) {
  const list = document.getElementById("messages");
  const wanted = new Set(messages.map((message) => message.id));
  for (const [id, each] of shown) {
    if (!wanted.has(id)) {
      each.article.remove();
      shown.delete(id);
    }
  }
  messages.forEach((message, number) => {
    let each = shown.get(message.id);
    if (!each) shown.set(message.id, (each = new Shown(message.role)));
    if (list.children[number] !== each.article) list.insertBefore(each.article, list.children[number] ?? null);
    each.article.dataset.id = message.id;
    each.show(message, versions[number], running);
  });
  show(document.getElementById("empty"), messages.length === 0);
}

/** Show what has changed of a message, if it is on the page. */
export function showMessage(message, running) {
  shown.get(message.id)?.show(message, null, running);
}

/** Replace a message by a field in which it can be edited. `done` is called with the new text, or with null. */
export function editMessage(message, done) {
  const { article } = shown.get(message.id);
  if (article.classList.contains("editing")) return;
  const area = element("textarea", { "aria-label": "Edit the message", rows: Math.min(12, message.content.split("\n").length + 1) });
  area.value = message.content;
  const form = element(
    "form", { class: "edit" }, area,
    element("div", { class: "row" }, button("Cancel", "cancel-edit"), element("button", { class: "primary" }, "Send")),
  );
  const end = (text) => {
    form.remove();
    article.classList.remove("editing");
    done(text);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) end(area.value);
  });
  form.querySelector("[data-action=cancel-edit]").addEventListener("click", () => end(null));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      end(null);
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  article.classList.add("editing");
  article.append(form);
  area.focus();
}

/** A message on the page. */
class Shown {
  constructor(role) {
    const isUser = role === "user";
    this.thoughts = element("div", { class: "prose" });
    this.summary = element("summary", {});
    this.thinking = element("details", { class: "thinking", hidden: true }, this.summary, this.thoughts);
    this.body = element("div", { class: isUser ? "body" : "body prose" });
    this.error = element("p", { class: "error", hidden: true });
    this.meta = element("span", { class: "meta" });
    this.count = element("span", { class: "count" });
    this.versions = element(
      "span", { class: "versions", hidden: true },
      button("‹", "previous", { "aria-label": "Previous version" }), this.count,
      button("›", "next", { "aria-label": "Next version" }),
    );
    const actions = isUser ? [button("Edit", "edit")] : [button("Regenerate", "regenerate")];
    this.foot = element("footer", {}, this.versions, button("Copy", "copy"), ...actions, this.meta);
    this.article = element(
      "article", { class: role }, element("h2", { class: "unseen" }, isUser ? "You" : "Answer"),
      this.thinking, this.body, this.error, this.foot,
    );
    this.isUser = isUser;
  }

  show(message, versions, running) {
    const isRunning = running?.id === message.id;
    this.article.classList.toggle("running", isRunning);
    this.article.setAttribute("aria-busy", String(isRunning));
    if (this.isUser) this.body.textContent = message.content;
    else showMarkdown(this.body, message.content);
    show(this.thinking, Boolean(message.reasoning));
    if (message.reasoning) {
      showMarkdown(this.thoughts, message.reasoning);
      this.summary.textContent = isRunning && !message.content ? "Thinking" : "Thoughts";
    }
    this.error.textContent = message.error ?? "";
    show(this.error, Boolean(message.error));
    show(this.foot, !isRunning);
    this.meta.textContent = this.isUser ? "" : metaText(message, isRunning);
    if (versions) {
      const [number, count] = versions;
      this.count.textContent = `${number} of ${count}`;
      show(this.versions, count > 1);
      this.versions.firstChild.disabled = number === 1;
      this.versions.lastChild.disabled = number === count;
    }
  }
}

const ENDS = { length: "cut at the limit of tokens", stopped: "stopped" };

/** Return the tokens a second behind the first one; null if there are none. */
export function speedOf(usage, seconds) {
  return usage?.new > 1 && seconds.total > seconds.first ? (usage.new - 1) / (seconds.total - seconds.first) : null;
}

/** Return what is known of an answer: its tokens, speed and experts. */
function metaText({ finish, usage, seconds, shares, model }, isRunning) {
  const parts = [];
  if (!finish && !isRunning) parts.push("unfinished");
  if (ENDS[finish]) parts.push(ENDS[finish]);
  if (usage) {
    const count = (tokens) => `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;
    parts.push(count(usage.new));
    const speed = speedOf(usage, seconds);
    if (speed) parts.push(`${speed.toFixed(1)} tokens/s`);
    if (seconds) parts.push(`first after ${seconds.first.toFixed(seconds.first < 10 ? 2 : 0)} s`);
    if (usage.cached) parts.push(`${usage.cached.toLocaleString("en")} of ${count(usage.prompt)} of the prompt kept`);
  }
  if (shares) parts.push(`experts: ${sharesText(shares)}`);
  if (model && parts.length) parts.push(model);
  return parts.join(" · ");
}

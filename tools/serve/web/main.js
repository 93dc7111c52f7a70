// The page: what its buttons, keys and fields do.

import { isPossibleKey, isReachable, modelNames, setKey } from "./api.js";
import { element, show } from "./elements.js";
import { SettingsDialog } from "./settings.js";
import { Status } from "./status.js";
import { Store } from "./store.js";
import { Talk } from "./talk.js";
import { editMessage, isAtEnd, scrollToEnd, showMessage, showMessages, speedOf } from "./view.js";

const RETRY_MS = 2000; // between two tries to reach a server that is gone
const UNDO_MS = 10_000; // in which a removed conversation can be restored
const DRAFT = "moetier.draft";
const id = (name) => document.getElementById(name);
const input = id("input");
const status = new Status();
let store;
let talk;
let isRetrying = false;
let undo = null; // restores the conversation that was removed last
let undoTimer;
let frame = null; // of the answer's next text

// -- the server -------------------------------------------------------------------------------------------------------

/** Read the names of the models, and show the conversations; or ask for a key. */
async function connect() {
  try {
    showModels(await modelNames());
  } catch (error) {
    failed(error);
    if (error.status === 401) return;
  }
  show(id("gate"), false);
  show(id("app"), true);
  input.focus();
}

function failed(error) {
  if (error.status === 401) {
    setKey(null);
    show(id("app"), false);
    show(id("gate"), true);
    id("key").focus();
  } else if (error.status === 0) retry();
  else if (error.status === undefined) notice(`The page failed: ${error.message}`);
}

async function retry() {
  if (isRetrying) return;
  isRetrying = true;
  notice("The server can't be reached. Trying again …");
  while (!(await isReachable())) await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  isRetrying = false;
  notice("");
  await connect();
}

function notice(text) {
  id("notice").textContent = text;
  show(id("notice"), Boolean(text));
}

id("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = id("key").value.trim();
  id("key").value = id("key-error").textContent = "";
  if (isPossibleKey(key)) {
    setKey(key);
    await connect();
  }
  if (!id("gate").hidden) id("key-error").textContent = "The server does not take this key.";
});

function showModels(names) {
  const select = id("model");
  const wanted = talk.conversation?.model ?? (select.value || localStorage.getItem("moetier.model"));
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(wanted)) select.value = wanted;
  select.classList.toggle("only", names.length < 2);
}

id("model").addEventListener("change", () => {
  localStorage.setItem("moetier.model", id("model").value);
  if (talk.conversation) store.update(talk.conversation.id, { model: id("model").value });
});

// -- the conversation -------------------------------------------------------------------------------------------------

/** Show the conversation that the address names, or a new one. */
async function openAddress() {
  const wanted = location.hash.slice(1);
  if (!wanted || !(await talk.open(wanted))) talk.reset();
  if (wanted && !talk.conversation) history.replaceState(null, "", location.pathname);
  const names = [...id("model").options].map((option) => option.value);
  if (names.includes(talk.conversation?.model)) id("model").value = talk.conversation.model;
  closeSide();
  await changed();
  scrollToEnd();
}

async function changed() {
  const path = talk.path;
  const follows = isAtEnd();
  showMessages(path, path.map((message) => talk.versionsOf(message)), talk.running);
  if (follows) scrollToEnd();
  const title = talk.conversation?.title ?? "New conversation";
  id("title").textContent = title;
  document.title = talk.conversation ? `${title} · moetier` : "moetier";
  show(id("send"), !talk.running);
  show(id("stop"), Boolean(talk.running));
  document.body.classList.toggle("running", Boolean(talk.running));
  if (talk.conversation && location.hash.slice(1) !== talk.conversation.id) {
    history.replaceState(null, "", `#${talk.conversation.id}`);
  }
  await showList();
}

async function showList() {
  const items = (await store.conversations()).map(({ id: key, title }) => {
    const isCurrent = key === talk.conversation?.id;
    return element(
      "li", {},
      element("a", { href: `#${key}`, "aria-current": isCurrent ? "page" : undefined }, title),
      element("button", { type: "button", class: "icon", "data-remove": key, "aria-label": `Delete “${title}”` }, "×"),
    );
  });
  id("conversations").replaceChildren(...items);
}

/** Show the text that has come since the last frame. */
function wrote(message, speed) {
  if (!status.hasText) status.begun();
  if (speed !== null) status.speed(`${speed.toFixed(1)} tokens/s`);
  frame ??= requestAnimationFrame(() => {
    frame = null;
    const follows = isAtEnd();
    showMessage(message, talk.running);
    if (follows) scrollToEnd();
  });
}

function began(model) {
  id("announce").textContent = "Answering";
  status.begin(model);
}

async function ended(message) {
  id("announce").textContent = { stopped: "Answer stopped", error: "The answer failed" }[message.finish] ?? "Answer complete";
  const speed = speedOf(message.usage, message.seconds);
  if (speed) status.speed(`${speed.toFixed(1)} tokens/s`);
  return status.end();
}

async function send() {
  const text = input.value;
  if (!text.trim() || talk.running) return;
  input.value = "";
  saveDraft();
  requestAnimationFrame(scrollToEnd);
  await talk.send(text, id("model").value);
}

id("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send().catch(failed);
});
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  id("composer").requestSubmit();
});
input.addEventListener("input", saveDraft);

function saveDraft() {
  sessionStorage.setItem(DRAFT, input.value);
  input.style.height = "auto"; // for browsers without field-sizing
  input.style.height = `${input.scrollHeight}px`;
}

function stop() {
  talk.stop();
  input.focus();
}

id("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && talk?.running && !id("settings").open) stop();
});

id("messages").addEventListener("click", (event) => {
  const pressed = event.target.closest("[data-action]");
  const message = talk.messages.get(event.target.closest("article")?.dataset.id);
  if (!pressed || !message) return;
  act(pressed, message).catch(failed);
});

async function act(pressed, message) {
  const model = id("model").value;
  switch (pressed.dataset.action) {
    case "copy":
      return copy(pressed, message.content);
    case "copy-code":
      return copy(pressed, pressed.closest(".code").querySelector("code").textContent);
    case "regenerate":
      return talk.regenerate(message, model);
    case "edit":
      return editMessage(message, (text) => (text === null ? input.focus() : talk.edit(message, text, model).catch(failed)));
    case "previous":
    case "next":
      return talk.choose(message, pressed.dataset.action === "next" ? 1 : -1);
  }
}

async function copy(pressed, text) {
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  pressed.textContent = done ? "Copied" : "Not allowed here"; // browsers allow it over TLS and on this machine
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

// -- the list of conversations ----------------------------------------------------------------------------------------

id("new").addEventListener("click", async () => {
  history.pushState(null, "", location.pathname);
  await openAddress();
  input.focus();
});
id("conversations").addEventListener("click", (event) => {
  const key = event.target.closest("[data-remove]")?.dataset.remove;
  if (key) remove(key).catch(failed);
});

async function remove(key) {
  const [conversation, messages] = await Promise.all([store.conversation(key), store.messages(key)]);
  if (talk.running?.message.conversation === key) talk.stop();
  await store.remove(key);
  await left(key);
  undo = () => store.add(conversation, messages).then(showList);
  toast(`“${conversation.title}” was deleted.`, true);
  id("toast-undo").focus();
}

/** Show another conversation than the one that was removed. */
async function left(key) {
  if (talk.conversation?.id !== key) return showList();
  history.replaceState(null, "", location.pathname);
  return openAddress();
}

function toast(text, canUndo) {
  clearTimeout(undoTimer);
  id("toast-text").textContent = text;
  show(id("toast-undo"), canUndo);
  show(id("toast"), true);
  undoTimer = setTimeout(() => show(id("toast"), false), UNDO_MS);
}

id("toast-undo").addEventListener("click", async () => {
  show(id("toast"), false);
  await undo?.();
  undo = null;
  input.focus();
});

async function changedElsewhere(key) {
  if (key !== talk.conversation?.id) return showList();
  if (await talk.open(key)) return changed();
  if (talk.isRunningHere) talk.stop();
  await left(key);
  return toast("This conversation was deleted in another tab.", false);
}

function closeSide() {
  document.body.classList.remove("side-open");
  id("open-side").setAttribute("aria-expanded", "false");
}

id("open-side").addEventListener("click", () => {
  document.body.classList.add("side-open");
  id("open-side").setAttribute("aria-expanded", "true");
  id("new").focus();
});
for (const name of ["close-side", "shade"]) {
  id(name).addEventListener("click", () => {
    closeSide();
    id("open-side").focus();
  });
}
id("side").addEventListener("keydown", (event) => {
  if (event.key === "Escape") id("close-side").click();
});

// -- the rest ---------------------------------------------------------------------------------------------------------

const dialog = new SettingsDialog((settings) => talk.set(settings).catch(failed));
id("open-settings").addEventListener("click", () => dialog.open(talk.settings));
id("log").addEventListener("scroll", () => show(id("to-end"), !isAtEnd()), { passive: true });
id("to-end").addEventListener("click", scrollToEnd);
window.addEventListener("hashchange", () => openAddress().catch(failed));

async function begin() {
  input.value = sessionStorage.getItem(DRAFT) ?? "";
  store = await Store.open();
  store.onchange = (key) => changedElsewhere(key).catch(failed);
  talk = new Talk(store, {
    changed: () => changed().catch(failed),
    comment: (text) => status.comment(text),
    wrote,
    failed,
    began,
    ended,
  });
  await openAddress();
  await connect();
  saveDraft();
}

begin().catch((error) => {
  show(id("app"), true);
  notice(`This browser does not let the page keep conversations (${error.message}). Allow site data for this address.`);
});

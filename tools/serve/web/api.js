// Requests to the server that sent this page. The key stays in this tab's sessionStorage, and goes into a header only.

const KEY = "moetier.key";

/** A request that failed. `status` is 0 if the server can't be reached. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Use `key` for all further requests of this tab. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Send a request. Throws ApiError if it fails, and AbortError if `signal` is aborted. */
async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    throw lost(error);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error?.message ?? `The server answered with status ${response.status}.`);
}

function lost(error) {
  return error.name === "AbortError" ? error : new ApiError(0, "The connection to the server was lost.");
}

/** Return the names of the models that the server has. */
export async function modelNames() {
  const list = await (await request("v1/models")).json();
  return list.data.map((model) => model.id);
}

/** Return whether a header can hold `key`. */
export function isPossibleKey(key) {
  return /^[\x20-\x7e\x80-\xff]+$/.test(key);
}

/** Return whether the server can be reached. It asks without the key, which /health does not need. */
export async function isReachable() {
  try {
    return (await fetch("health", { cache: "no-store", credentials: "omit", redirect: "error" })).ok;
  } catch {
    return false;
  }
}

/** Return the server's metrics as a list of {name, labels, value}. */
export async function metrics() {
  const text = await (await request("metrics")).text();
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, label, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = value.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** Ask for an answer. Yields {comment} and {data} as they come. Throws ApiError if the answer fails. */
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw lost(error);
    }
    if (piece.done) throw new ApiError(0, "The connection to the server was lost.");
    const parts = (rest + piece.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) {
        yield { comment: part.slice(1).trim() };
        continue;
      }
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      const data = JSON.parse(text);
      if (data.error) throw new ApiError(500, data.error.message);
      yield { data };
    }
  }
}

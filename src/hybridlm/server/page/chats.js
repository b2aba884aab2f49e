// What the page knows besides its looks: conversations and settings kept in the browser, and the server's API.

const KEY = "hybridlm.conversations";
const SETTINGS = "hybridlm.settings";

export const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1,
                          max_tokens: null, seed: null, theme: "", model: "" };

const read = (key, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

export class Store {
  constructor() {
    this.chats = read(KEY, []).filter(sound);
    this.settings = { ...DEFAULTS, ...read(SETTINGS, {}) };
  }

  // Keep everything; where the browser's space is used up the oldest conversations go. Returns how many went.
  save() {
    let dropped = 0;
    localStorage.setItem(SETTINGS, JSON.stringify(this.settings));
    for (;;) {
      try {
        localStorage.setItem(KEY, JSON.stringify(this.chats.filter((c) => c.messages.length || c.text)));
        return dropped;
      } catch {
        if (this.chats.length < 2) return dropped;
        this.chats.sort((a, b) => b.changed - a.changed).pop();
        dropped += 1;
      }
    }
  }

  add() {
    const chat = { id: crypto.randomUUID?.() ?? String(Math.random()), created: Date.now(), changed: Date.now(),
                   messages: [], text: "" };
    this.chats.unshift(chat);
    return chat;
  }

  export() {
    return JSON.stringify({ format: "hybridlm conversations", version: 1, conversations: this.chats }, null, 1);
  }

  // Add the conversations of an exported file that are not here yet. Returns how many.
  import(text) {
    const data = JSON.parse(text);
    const known = new Set(this.chats.map((c) => c.id));
    const more = data.conversations.filter((c) => sound(c) && !known.has(c.id));
    this.chats = [...this.chats, ...more].sort((a, b) => b.changed - a.changed);
    this.save();
    return more.length;
  }
}

function sound(chat) {
  return typeof chat?.id === "string" && Array.isArray(chat.messages) && chat.messages.every(
    (m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string");
}

export const nameOf = (chat) => {
  const text = (chat.messages[0]?.content || chat.text || "").trim().replace(/\s+/g, " ");
  return text ? text.slice(0, 60) : "New conversation";
};

// -- the server -----------------------------------------------------------------------------------------------------

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function call(path, body, signal) {
  const key = sessionStorage.getItem("hybridlm.key");
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET", signal, body: body && JSON.stringify(body),
      headers: { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
  if (answer.ok) return answer;
  let message = `The server answers with error ${answer.status}.`;
  try {
    const told = (await answer.json()).error;
    message = told.message ?? told;
  } catch { /* not one of ours */ }
  const after = answer.headers.get("retry-after");
  if (answer.status === 429 && after) message = `Many are waiting. Try again in about ${after} s.`;
  throw new ServerError(message, answer.status);
}

// The objects of a stream of server-sent events, as they come.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice(6);
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new ServerError(object.error.message, 500);
      yield object;
    }
  }
}

// What a request says about sampling.
export function sampling(settings) {
  const out = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]) out[name] = settings[name];
  for (const name of ["max_tokens", "seed"]) if (settings[name] !== null) out[name] = settings[name];
  return out;
}

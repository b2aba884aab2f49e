// The chat page: what is shown and what the buttons do. Conversations and the server's API are in chats.js.

import { DEFAULTS, ServerError, Store, call, events, nameOf, sampling } from "./chats.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const el = (name, className, ...children) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
};
const button = (text, className, onclick, label) => {
  const node = el("button", className, text);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  node.addEventListener("click", onclick);
  return node;
};
const number = (n, digits = 0) => n.toLocaleString("en", { maximumFractionDigits: digits });
const say = (text) => { $("status").textContent = text; };

const store = new Store();
let chat = store.chats[0] ?? store.add();
let models = [];
let running = null; // an AbortController while an answer comes

// -- models ---------------------------------------------------------------------------------------------------------

const model = () => models.find((m) => m.id === $("model").value);
const textMode = () => model()?.chat === false;

async function loadModels() {
  try {
    models = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) return askKey(loadModels);
    return problem(error);
  }
  const wanted = $("model").value || store.settings.model;
  $("model").replaceChildren(...models.map((m) => {
    const option = el("option", "", m.id);
    option.value = m.id;
    return option;
  }));
  if (models.some((m) => m.id === wanted)) $("model").value = wanted;
  $("welcome-note").textContent = "";
  if (model() && model().chat === null) await openModel();
  show();
}

// A model that is not open yet is opened by asking what it can do.
async function openModel() {
  $("welcome-note").textContent = `Opening ${$("model").value} …`;
  try {
    await call("/api/show", { model: $("model").value });
    models = (await (await call("/v1/models")).json()).data;
    $("welcome-note").textContent = "";
  } catch (error) {
    problem(error);
  }
}

function askKey(then) {
  $("key-dialog").showModal();
  $("key-dialog").addEventListener("close", () => {
    sessionStorage.setItem("hybridlm.key", $("key").value);
    then();
  }, { once: true });
}

// -- showing --------------------------------------------------------------------------------------------------------

function show() {
  const text = textMode();
  $("composer").dataset.mode = text ? "text" : "chat";
  $("document-box").hidden = !text;
  $("messages").hidden = text;
  $("send").textContent = text ? "Continue" : "Send";
  $("hint").textContent = text ? "Ctrl+Enter continues the text, Esc stops." :
    "Enter sends, Shift+Enter starts a new line, Esc stops.";
  document.querySelectorAll("[data-mode='chat'].row").forEach((row) => { row.hidden = text; });
  $("welcome").hidden = text || chat.messages.length > 0;
  if ($("document").value !== chat.text) $("document").value = chat.text;
  $("undo").hidden = !text || chat.before === undefined || Boolean(running);
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("title").textContent = nameOf(chat);
  document.title = chat.messages.length || chat.text ? `${nameOf(chat)} · hybridlm` : "hybridlm";
  $("messages").replaceChildren(...chat.messages.map(messageNode));
  $("document-stats").replaceChildren(...(text && chat.stats ? [statsNode(chat.stats)] : []));
  showChats();
  showContext();
}

function showChats() {
  $("chats").replaceChildren(...store.chats.map((c) => {
    const open = button(nameOf(c), "open", () => { choose(c); closeSide(); });
    const li = el("li", "", open, button("✕", "icon delete", () => remove(c), `Delete ${nameOf(c)}`));
    if (c === chat) {
      li.dataset.current = "";
      open.setAttribute("aria-current", "true");
    }
    return li;
  }));
}

function showContext() {
  const stats = textMode() ? chat.stats : chat.messages.findLast((m) => m.stats)?.stats;
  const limit = model()?.context_length ?? stats?.context;
  $("context").hidden = !stats || !limit;
  if (!stats || !limit) return;
  const used = stats.cache_n + stats.prompt_n + stats.predicted_n;
  $("context-meter").value = used / limit;
  $("context-text").textContent = `${number(used)} of ${number(limit)}`;
  $("context").title = `${number(used)} of ${number(limit)} tokens of the context are used`;
}

function statsNode(s) {
  const total = Math.max(1, s.cache_n + s.prompt_n + s.predicted_n);
  const bar = el("span", "reuse", ...[["reused", s.cache_n], ["read", s.prompt_n], ["written", s.predicted_n]]
    .filter(([, n]) => n).map(([name, n]) => {
      const part = el("i", name);
      part.style.width = `${100 * n / total}%`;
      return part;
    }));
  const words = `${number(s.cache_n)} prompt tokens reused from the cache, ${number(s.prompt_n)} read, ` +
    `${number(s.predicted_n)} written`;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", words);
  bar.title = words;
  const counted = (name, n) => el("span", "", el("i", `dot ${name}`), `${number(n)} ${name}`);
  const parts = [bar, counted("reused", s.cache_n), counted("read", s.prompt_n), counted("written", s.predicted_n)];
  if (s.predicted_per_second) parts.push(el("span", "", `${number(s.predicted_per_second, 1)} tokens/s`));
  if (s.first_ms) parts.push(el("span", "", `first after ${number(s.first_ms / 1000, 2)} s`));
  return el("span", "stats", ...parts);
}

function messageNode(message, index) {
  const li = el("li", message.role);
  const body = el("div", "body");
  const tools = el("div", "tools");
  li.append(el("span", "hidden", message.role === "user" ? "You:" : "Answer:"), body, tools);
  if (message.role === "user") {
    body.textContent = message.content;
    if (!running) tools.append(button("Edit", "quiet", () => edit(li, index), "Edit this message"));
    return li;
  }
  fill(body, message);
  if (message.error) body.append(el("p", "error", message.error));
  if (message.growing) return li;
  tools.append(button("Copy", "quiet", async (event) => {
    await navigator.clipboard.writeText(message.content);
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
  }, "Copy this answer"));
  if (!running) {
    tools.append(button(message.error ? "Try again" : "Regenerate", "quiet", () => regenerate(index),
                        message.error ? "Try again" : "Regenerate this answer"));
  }
  if (message.stats) tools.append(statsNode(message.stats));
  if (message.stopped) tools.append(el("span", "", "stopped"));
  else if (message.finish === "length") tools.append(el("span", "", "cut at its limit"));
  return li;
}

function fill(body, message) {
  const nodes = [];
  if (message.reasoning) {
    const thoughts = el("details", "thoughts", el("summary", "", "Thoughts"), el("div", "", message.reasoning.trim()));
    thoughts.open = Boolean(message.growing && !message.content);
    nodes.push(thoughts);
  }
  nodes.push(...render(message.content));
  if (message.growing && !message.content) nodes.push(el("span", "waiting"));
  body.replaceChildren(...nodes);
}

function problem(error) {
  $("welcome").hidden = chat.messages.length > 0;
  $("welcome-note").textContent = error.message;
  say(error.message);
}

// -- doing ----------------------------------------------------------------------------------------------------------

function choose(other) {
  running?.abort();
  chat = other;
  show();
  $("main").scrollTop = $("main").scrollHeight;
}

function startNew() {
  const empty = store.chats.find((c) => !c.messages.length && !c.text);
  choose(empty ?? store.add());
  closeSide();
  (textMode() ? $("document") : $("input")).focus();
}

function remove(c) {
  store.chats = store.chats.filter((other) => other !== c);
  keep();
  if (c === chat) choose(store.chats[0] ?? store.add());
  else showChats();
  $("new").focus();
}

function keep() {
  const dropped = store.save();
  if (dropped) say(`The browser's space is full: ${dropped} of the oldest conversations were dropped.`);
}

function send(text) {
  chat.messages.push({ role: "user", content: text });
  answer();
}

function regenerate(index) {
  chat.messages.length = index;
  answer();
}

function edit(li, index) {
  const area = el("textarea");
  area.value = chat.messages[index].content;
  area.setAttribute("aria-label", "Edit your message");
  const leave = () => { box.remove(); li.classList.remove("editing"); li.querySelector(".tools button").focus(); };
  const done = () => {
    if (!area.value.trim()) return;
    chat.messages.length = index;
    send(area.value.trim());
    $("input").focus();
  };
  const box = el("div", "edit", area, el("div", "", button("Cancel", "quiet", leave), button("Send again", "", done)));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); leave(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
  });
  li.classList.add("editing");
  li.append(box);
  area.focus();
}

// One output of the server: `grow(delta)` for each part; resolves with the last chunk's figures.
async function stream(path, body, grow) {
  running = new AbortController();
  const began = performance.now();
  let first = null, stats = null, finish = null, written = 0, last = began;
  show();
  try {
    const reply = await call(path, { model: $("model").value, stream: true, stream_options: { include_usage: true },
                                     ...sampling(store.settings), ...body }, running.signal);
    for await (const chunk of events(reply)) {
      const choice = chunk.choices[0];
      const text = choice && (choice.text ?? choice.delta?.content ?? choice.delta?.reasoning_content);
      if (text) {
        last = performance.now();
        first ??= last - began;
        written += 1;
        grow(choice);
      }
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (chunk.timings) stats = { ...chunk.timings, first_ms: first };
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    finish = "stopped"; // the server's figures are lost with the connection; what was seen is told
    if (first !== null) {
      stats = { cache_n: 0, prompt_n: 0, predicted_n: written, first_ms: first,
                predicted_per_second: written > 1 ? (written - 1) / (last - began - first) * 1000 : 0 };
    }
  } finally {
    running = null;
  }
  return { stats, finish };
}

async function answer() {
  const here = chat;
  const message = { role: "assistant", content: "", growing: true };
  here.messages.push(message);
  here.changed = Date.now();
  store.chats.sort((a, b) => b.changed - a.changed);
  const history = here.messages.slice(0, -1).filter((m) => m.role === "user" || m.content)
    .map(({ role, content }) => ({ role, content }));
  if (store.settings.system.trim()) history.unshift({ role: "system", content: store.settings.system });
  say("Answering");
  let planned = false;
  const paint = () => {
    planned = false;
    const body = $("messages").lastElementChild?.querySelector(".body");
    if (here !== chat || !body || !message.growing) return;
    const main = $("main");
    const follow = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    fill(body, message);
    if (follow) main.scrollTop = main.scrollHeight;
  };
  setTimeout(() => { $("main").scrollTop = $("main").scrollHeight; });
  try {
    const done = await stream("/v1/chat/completions", { messages: history }, ({ delta }) => {
      message.content += delta.content ?? "";
      if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
      if (!planned) {
        planned = true;
        setTimeout(() => requestAnimationFrame(paint), 30);
      }
    });
    if (done.finish === "stopped") message.stopped = true;
    Object.assign(message, { stats: done.stats, finish: done.finish });
  } catch (error) {
    message.error = error instanceof ServerError ? error.message : "The answer broke off.";
    if (error.status === 401) askKey(() => {});
  }
  delete message.growing;
  here.changed = Date.now();
  keep();
  if (here === chat) show();
  $("main").scrollTop = $("main").scrollHeight;
  say(message.error ?? (message.content || "No answer"));
}

async function proceed() {
  const here = chat;
  here.text = here.before = $("document").value;
  here.changed = Date.now();
  delete here.stats;
  $("document").readOnly = true;
  say("Writing");
  try {
    const body = { prompt: here.text, max_tokens: store.settings.max_tokens ?? 200 };
    const done = await stream("/v1/completions", body, ({ text }) => {
      here.text += text;
      if (here !== chat) return;
      const area = $("document");
      const follow = area.scrollHeight - area.scrollTop - area.clientHeight < 80;
      area.value = here.text;
      if (follow) area.scrollTop = area.scrollHeight;
    });
    here.stats = done.stats;
    say("The text goes on.");
  } catch (error) {
    say(error.message);
    $("document-stats").replaceChildren(el("p", "error", error.message));
  }
  $("document").readOnly = false;
  keep();
  if (here === chat && here.stats) show();
  else { $("send").hidden = false; $("stop").hidden = true; }
  $("document").focus();
}

// -- the page's parts -------------------------------------------------------------------------------------------------

const narrow = matchMedia("(max-width: 56rem)");

function shade() {
  $("shade").hidden = !narrow.matches || !("open" in $("side").dataset || !$("settings").hidden);
}

function closeSide() {
  delete $("side").dataset.open;
  $("open-side").setAttribute("aria-expanded", "false");
  shade();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
  shade();
  (open ? $("settings").querySelector(".row:not([hidden]) :is(input, textarea)") : $("open-settings")).focus();
}

function fillSettings() {
  for (const name of Object.keys(DEFAULTS)) if (name !== "model") $(name).value = store.settings[name] ?? "";
  if (store.settings.theme) document.documentElement.dataset.theme = store.settings.theme;
  else delete document.documentElement.dataset.theme;
}

for (const name of Object.keys(DEFAULTS).filter((n) => n !== "model")) {
  $(name).addEventListener("change", () => {
    const field = $(name);
    if (!field.checkValidity()) { field.reportValidity(); return; }
    const value = typeof DEFAULTS[name] === "string" ? field.value : field.value === "" ? DEFAULTS[name] : +field.value;
    store.settings[name] = value;
    keep();
    fillSettings();
  });
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  if (textMode()) { proceed(); return; }
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  grow();
  send(text);
});
const grow = () => {
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight, innerHeight * 0.4)}px`;
};
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("document").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("composer").requestSubmit();
});
$("document").addEventListener("change", () => { chat.text = $("document").value; chat.changed = Date.now(); keep(); showChats(); });
$("undo").addEventListener("click", () => {
  chat.text = chat.before;
  delete chat.before;
  delete chat.stats;
  keep();
  show();
  $("document").focus();
});
$("stop").addEventListener("click", () => { running?.abort(); (textMode() ? $("document") : $("input")).focus(); });
$("new").addEventListener("click", startNew);
$("model").addEventListener("change", async () => {
  store.settings.model = $("model").value;
  keep();
  if (model().chat === null) await openModel();
  show();
});
$("open-side").addEventListener("click", () => {
  $("side").dataset.open = "";
  $("open-side").setAttribute("aria-expanded", "true");
  shade();
  $("new").focus();
});
$("close-side").addEventListener("click", () => { closeSide(); $("open-side").focus(); });
$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => openSettings(false));
$("shade").addEventListener("click", () => { closeSide(); $("settings").hidden = true; shade(); });
$("reset").addEventListener("click", () => {
  store.settings = { ...DEFAULTS, model: store.settings.model };
  keep();
  fillSettings();
  say("Settings are back to the defaults.");
});
$("export").addEventListener("click", () => {
  const link = el("a");
  link.href = URL.createObjectURL(new Blob([store.export()], { type: "application/json" }));
  link.download = `hybridlm-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async () => {
  try {
    const count = store.import(await $("import-file").files[0].text());
    say(`${count} conversations were added.`);
    showChats();
  } catch {
    say("This file holds no conversations of this page.");
  }
  $("import-file").value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) { running.abort(); return; }
  if ("open" in $("side").dataset) { closeSide(); $("open-side").focus(); }
  else if (!$("settings").hidden) openSettings(false);
});
narrow.addEventListener("change", shade);
addEventListener("online", () => { if (!models.length) loadModels(); });

fillSettings();
show();
loadModels().then(() => {
  $("main").scrollTop = $("main").scrollHeight;
  if (!narrow.matches) (textMode() ? $("document") : $("input")).focus();
});

// The page: what is chosen, what is asked, and what then stands on the screen.

import { fields } from "./settings.js";
import * as store from "./store.js";
import { ask, models as listModels, Trouble } from "./stream.js";
import { button, el, emptyView, turnView, updateAnswer } from "./view.js";

const at = (id) => document.getElementById(id);
const [talk, question, ask_form, nav] = ["talk", "question", "ask", "conversations"].map(at);

let kept = store.load();
let settings = { sampling: {}, models: [], theme: "", ...store.settings() };
let served = null; // models that can be asked in turns, once the server told them
let current = null;
const running = new Map(); // of an answer, {conversation, stop}

// ---------------------------------------------------------------------------------------------- asking

const busy = (conversation = current) => [...running.values()].some((run) => run.conversation === conversation);
const fresh = (model) => ({
  model, content: "", reasoning: "", finish: null, trouble: "", kind: "", pieces: 0, tokens: null, first: 0, seconds: 0, thought: 0, context: 0, room: 0,
});

// What was typed, as long as it cannot be sent, stays in its field.
function sendTyped() {
  const text = question.value;
  if (!text.trim() || busy() || !current.models.length) return;
  question.value = "";
  send(text);
}

function send(text) {
  if (!current.turns.length) current.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
  current.turns.push({ question: text, columns: current.models.map((model) => ({ shown: 0, tries: [fresh(model)] })) });
  const place = current.turns.length - 1;
  drawConversation();
  talk.scrollTop = talk.scrollHeight;
  current.turns[place].columns.forEach((_, number) => answer(current, place, number));
}

async function answer(conversation, place, number) {
  const one = store.shown(conversation.turns[place].columns[number]);
  const [stop, begin] = [new AbortController(), performance.now()];
  const draw = () => drawAnswer(conversation, place, number);
  running.set(one, { conversation, stop });
  keep(conversation);
  drawRunning();
  let finish = "stop";
  let waits = false;
  try {
    const body = { model: one.model, messages: store.messages(conversation, place, number), ...settings.sampling };
    for await (const piece of ask(body, store.key(), stop.signal)) {
      finish = piece.finish ?? finish;
      take(one, piece, (performance.now() - begin) / 1000);
      if (!waits) requestAnimationFrame(() => { waits = false; draw(); });
      waits = true;
    }
  } catch (error) {
    finish = error.name === "AbortError" ? "stopped" : "trouble";
    if (finish === "trouble") Object.assign(one, { trouble: error.message, kind: error.kind ?? "" });
  }
  one.finish ??= finish;
  running.delete(one);
  if (kept.includes(conversation)) keep(conversation); // it may have been deleted
  draw();
  drawRunning();
  at("status").textContent = `${one.model}: ${one.content} ${finish === "stopped" ? "Stopped." : one.trouble}`;
}

function take(one, piece, seconds) {
  if (piece.usage) {
    one.tokens = piece.usage.completion_tokens;
    one.context = piece.usage.total_tokens;
    one.room = served?.find((model) => model.id === one.model)?.context_length ?? 0;
  } else if (!piece.finish) {
    one.first ||= seconds;
    one.seconds = seconds;
    one.pieces += 1;
    one.reasoning += piece.reasoning ?? "";
    one.content += piece.content ?? "";
    if (!one.content) one.thought = seconds - one.first;
  }
}

function stopAll() {
  for (const run of running.values()) if (run.conversation === current) run.stop.abort();
  question.focus();
}

const act = {
  send,
  enterKey: () => openSettings("key"),
  regenerate(place, number) {
    if (busy()) return;
    const column = current.turns[place].columns[number];
    const made = fresh(current.models[number] ?? store.shown(column).model);
    column.tries = column.tries.filter((one) => one.content || one.reasoning); // what only failed is no try
    column.shown = column.tries.push(made) - 1;
    drawAnswer(current, place, number);
    question.focus();
    answer(current, place, number);
  },
  shorten(place, number) {
    if (busy()) return;
    current.first = Math.min(current.first + 1, place);
    drawConversation();
    act.regenerate(place, number);
  },
  choose(place, number, choice) {
    current.turns[place].columns[number].shown = choice;
    const label = document.activeElement.ariaLabel;
    drawAnswer(current, place, number);
    const again = [...answerAt(place, number).querySelectorAll(".foot button:enabled")];
    (again.find((one) => one.ariaLabel === label) ?? again[0]).focus();
    keep(current);
  },
  async copy(text, from) {
    await navigator.clipboard?.writeText(text).then(() => { from.textContent = "Copied"; }, () => { from.textContent = "Not allowed"; });
  },
  edit(place) {
    if (busy()) return;
    const later = current.turns.length - place - 1;
    const asked = talk.querySelector(`[data-place="${place}"] .asked`);
    const field = el("textarea", { value: current.turns[place].question, rows: 3, dir: "auto", ariaLabel: "Edit the question" });
    const done = () => { drawConversation(); talk.querySelector(`[data-place="${place}"] .asked button`).focus(); };
    const again = () => field.value.trim() && askAgain(place, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(); }
      if (sends(event)) { event.preventDefault(); again(); }
    });
    const told = later ? `What follows (${later}) stays in a copy of this conversation.` : "The answer is replaced.";
    asked.replaceChildren(asked.firstChild, field, el("p", { className: "quiet" }, told), el("p", { className: "actions" }, button("Ask again", again, { className: "main" }), button("Cancel", done)));
    field.focus();
    asked.scrollIntoView({ block: "nearest" });
  },
};

function askAgain(place, text) {
  if (current.turns.length > place + 1) {
    const copy = { ...structuredClone(current), id: store.create([]).id, title: `${current.title} (before an edit)` };
    kept.push(copy);
    keep(copy);
  }
  current.turns.length = place;
  current.first = Math.min(current.first, place);
  send(text);
  question.focus();
}

const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// ---------------------------------------------------------------------------------------------- keeping

function keep(conversation) {
  conversation.changed = Date.now();
  if (!kept.includes(conversation)) kept.unshift(conversation);
  kept.sort((a, b) => b.changed - a.changed);
  at("notice").textContent = store.save(conversation);
  drawList();
}

function keepSettings() {
  at("notice").textContent = store.saveSettings(settings);
  const count = Object.keys(settings.sampling).length;
  at("open-settings").textContent = count ? `Settings (${count} set)` : "Settings";
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function confirmed(text, word) {
  const dialog = at("confirm");
  at("confirm-text").textContent = text;
  at("yes").textContent = word;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function forget(conversations, text) {
  if (!conversations.length || !(await confirmed(text, "Delete"))) return;
  for (const one of conversations) {
    for (const run of running.values()) if (run.conversation === one) run.stop.abort();
    store.remove(one.id);
  }
  kept = kept.filter((one) => !conversations.includes(one));
  if (conversations.includes(current)) open(kept[0] ?? null);
  drawList();
  (at("new").checkVisibility() ? at("new") : at("menu")).focus();
}

function exportAll() {
  const data = new Blob([JSON.stringify({ version: 1, conversations: kept }, null, 1)], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(data), download: "argonne-conversations.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href));
}

// ---------------------------------------------------------------------------------------------- showing

function open(conversation) {
  current = conversation ?? store.create([]);
  for (const turn of current.turns) {
    for (const one of turn.columns.flatMap((column) => column.tries)) {
      if (one.finish === null && !running.has(one)) one.finish = "left"; // the browser was closed over it
    }
  }
  if (!current.models.length) current.models = settings.models;
  if (served) {
    const known = current.models.filter((name) => served.some((model) => model.id === name));
    current.models = known.length ? known : served.slice(0, 1).map((model) => model.id);
  }
  at("model").value = current.models[0] ?? "";
  at("beside").value = current.models[1] ?? "";
  at("system").value = current.system;
  showList(false);
  drawConversation();
  drawList();
  talk.scrollTop = talk.scrollHeight;
  if (matchMedia("(pointer: fine)").matches) question.focus();
}

function drawConversation() {
  const views = current.turns.map((turn, place) => turnView(turn, place, current, act));
  if (current.first) views.splice(current.first, 0, el("p", { className: "cut" }, "What stands above is no longer sent to the model."));
  if (current.system) views.unshift(el("p", { className: "system quiet text", dir: "auto" }, `System prompt: ${current.system}`));
  talk.replaceChildren(...views, ...(current.turns.length ? [] : [emptyView(current.models, served, act)]));
  document.title = current.turns.length ? `${current.title} – argonne chat` : "argonne chat";
  drawRunning();
}

const answerAt = (place, number) => talk.querySelector(`[data-place="${place}"] [data-column="${number}"]`);

function drawAnswer(conversation, place, number) {
  const made = conversation === current && answerAt(place, number);
  if (!made) return;
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  updateAnswer(made, conversation.turns[place].columns[number], place, number, conversation, act);
  if (follows) talk.scrollTop = talk.scrollHeight;
}

function drawRunning() {
  talk.dataset.running = String(busy());
  at("send").hidden = busy();
  at("stop").hidden = !busy();
  at("send").disabled = !current.models.length;
}

function drawList() {
  const focused = [...at("list").querySelectorAll("button")].indexOf(document.activeElement);
  at("list").replaceChildren(...kept.map((one) => el("li", {},
    button(one.title, () => open(one), { className: "open", ariaCurrent: one === current ? "true" : null }),
    button("×", () => forget([one], `Delete “${one.title}” from this browser? It cannot be brought back.`), { className: "small", ariaLabel: `Delete ${one.title}` }))));
  at("list").querySelectorAll("button")[focused]?.focus();
}

function showList(wanted) {
  nav.classList.toggle("shown", wanted);
  at("menu").setAttribute("aria-expanded", String(wanted));
  talk.inert = ask_form.inert = wanted; // on a phone it lies over them
}

function openSettings(focus = "system") {
  at("fields").replaceChildren(...fields(settings.sampling, (name, value) => {
    if (value === undefined) delete settings.sampling[name];
    else settings.sampling[name] = value;
    keepSettings();
  }));
  at("key").value = store.key();
  at("theme").value = settings.theme;
  at("settings").showModal();
  at(focus).focus();
}

// ---------------------------------------------------------------------------------------------- beginning

async function readModels() {
  try {
    const all = await listModels(store.key());
    served = all.filter((model) => model.chat);
    const options = () => all.map((model) => el("option", { value: model.id, disabled: !model.chat }, model.chat ? model.id : `${model.id} (base model: continues a text only)`));
    at("model").replaceChildren(...options());
    at("beside").replaceChildren(el("option", { value: "" }, "none"), ...options());
    at("notice").replaceChildren();
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    const help = error.kind === "key" ? button("Enter the key", act.enterKey) : button("Try again", start);
    at("notice").replaceChildren(`${error.message} `, help);
  }
}

async function start() {
  await readModels();
  open(current?.turns.length ? current : kept[0] ?? current);
}

function listen() {
  const on = (id, name, does) => at(id).addEventListener(name, does);
  ask_form.addEventListener("submit", (event) => { event.preventDefault(); sendTyped(); });
  question.addEventListener("keydown", (event) => { if (sends(event)) { event.preventDefault(); sendTyped(); } });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (nav.classList.contains("shown")) { showList(false); at("menu").focus(); } else if (busy()) stopAll();
  });
  on("stop", "click", stopAll);
  on("new", "click", () => open(null));
  on("menu", "click", () => { showList(!nav.classList.contains("shown")); if (nav.classList.contains("shown")) at("new").focus(); });
  on("open-settings", "click", () => openSettings());
  on("export", "click", exportAll);
  on("delete-all", "click", () => forget([...kept], `Delete all ${kept.length} conversations from this browser? They cannot be brought back.`));
  for (const id of ["model", "beside"]) {
    on(id, "change", () => {
      current.models = [at("model").value, at("beside").value].filter(Boolean);
      settings.models = current.models;
      keepSettings();
      if (current.turns.length) keep(current);
      else drawConversation();
    });
  }
  on("system", "change", () => { current.system = at("system").value.trim(); if (current.turns.length) keep(current); drawConversation(); });
  on("defaults", "click", () => { settings.sampling = {}; keepSettings(); at("settings").close(); openSettings("defaults"); });
  on("theme", "change", () => { settings.theme = at("theme").value; keepSettings(); });
  on("key", "change", () => { store.saveKey(at("key").value.trim()); start(); });
  at("settings").querySelector(".close").addEventListener("click", () => at("settings").close());
  on("no", "click", () => at("confirm").close("no"));
  on("yes", "click", () => at("confirm").close("yes"));
  addEventListener("pagehide", () => {
    for (const [one, run] of running) {
      one.finish = "left";
      store.save(run.conversation);
      run.stop.abort();
    }
  });
  addEventListener("storage", (event) => { if (store.isConversation(event.key) && !running.size) refresh(); });
}

// Another tab wrote or deleted conversations.
function refresh() {
  kept = store.load();
  const found = kept.findIndex((one) => one.id === current.id);
  if (found >= 0 && kept[found].changed === current.changed) kept[found] = current;
  else if (found >= 0) open(kept[found]);
  else if (current.turns.length) open(null);
  drawList();
}

keepSettings();
listen();
await start();

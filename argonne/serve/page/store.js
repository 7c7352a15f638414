// Conversations and settings, in this browser's storage: one entry a conversation, so that two tabs do not undo one another.
//
// A conversation: {id, changed, title, system, models: [names], first, turns: [{question, columns: [{shown, tries}]}]}.
// first: the first turn that is still sent. A column holds the answers of one model to a question, the last one tried last.

const PREFIX = "argonne.conversation.1."; // with the version of the shape above
const SETTINGS = "argonne.settings";
const KEY = "argonne.key";

export const create = (models) => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // there at loopback and over https only
  changed: Date.now(), title: "New conversation", system: "", models, first: 0, turns: [],
});

export const shown = (column) => column.tries[column.shown];

// All that is kept, the newest first. What is no conversation is left alone.
export function load() {
  const found = [];
  for (const name of Object.keys(storage("local") ?? {})) {
    const one = name.startsWith(PREFIX) ? read(name) : null;
    if (Array.isArray(one?.turns)) found.push(one);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

// "" or why it could not be kept.
export const save = (conversation) => write(PREFIX + conversation.id, conversation);
export const remove = (id) => storage("local")?.removeItem(PREFIX + id);
export const settings = () => read(SETTINGS) ?? {};
export const saveSettings = (values) => write(SETTINGS, values);
export const isConversation = (name) => name === null || name.startsWith(PREFIX);

// The API key never leaves this tab's session.
export const key = () => storage("session")?.getItem(KEY) ?? "";
export const saveKey = (text) => storage("session")?.setItem(KEY, text);

// The messages that ask a turn, for one column. A turn without an answer is left out: the model never saw how it ended.
export function messages(conversation, place, column) {
  const said = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  for (const turn of conversation.turns.slice(conversation.first, place)) {
    const { content, reasoning } = shown(turn.columns[column] ?? turn.columns[0]);
    if (!content && !reasoning) continue;
    said.push({ role: "user", content: turn.question });
    said.push({ role: "assistant", content, ...(reasoning ? { reasoning_content: reasoning } : {}) });
  }
  return [...said, { role: "user", content: conversation.turns[place].question }];
}

function storage(kind) {
  try {
    return window[`${kind}Storage`];
  } catch {
    return null; // the browser forbids it
  }
}

function read(name) {
  try {
    return JSON.parse(storage("local").getItem(name));
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    storage("local").setItem(name, JSON.stringify(value));
    return "";
  } catch (error) {
    return error.name === "QuotaExceededError"
      ? "This browser's storage is full: what you write now is not kept. Export, then delete conversations."
      : "This browser keeps nothing for this page: conversations end with the tab.";
  }
}

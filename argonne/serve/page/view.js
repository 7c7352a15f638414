// What a conversation looks like. Text becomes text nodes and nothing else: no string here is ever markup.

import { shown } from "./store.js";

export function el(tag, properties = {}, ...children) {
  const { data, aria, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria ?? {})) made.setAttribute(`aria-${name}`, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const button = (text, onclick, more = {}) => el("button", { type: "button", onclick, ...more }, text);

// do: {edit(place), regenerate(place, column), choose(place, column, number), fixes}
export function turnView(turn, place, conversation, act) {
  const answers = turn.columns.map((column, number) => answerView(column, place, number, conversation, act));
  return el("section", { className: "turn", data: { place }, aria: { label: `Question ${place + 1}` } },
    el("div", { className: "asked" },
      el("h2", { className: "unseen" }, "You asked"),
      el("p", { className: "text question", dir: "auto" }, turn.question),
      button("Edit", () => act.edit(place), { className: "small", data: { needs: "rest" }, ariaLabel: `Edit question ${place + 1}` })),
    el("div", { className: "answers", data: { columns: answers.length } }, ...answers));
}

function answerView(column, place, number, conversation, act) {
  const made = el("article", { className: "answer", data: { column: number } });
  made.append(
    el("h3", {}, shown(column).model),
    el("details", { className: "thinking", hidden: true }, el("summary"), el("p", { className: "text", dir: "auto" })),
    el("div", { className: "said", dir: "auto" }),
    el("p", { className: "waiting", hidden: true }, el("span", { className: "unseen" }, "The answer has not begun"), "…"),
    el("div", { className: "trouble", hidden: true }),
    el("div", { className: "foot" }));
  updateAnswer(made, column, place, number, conversation, act);
  return made;
}

// Bring an answer's element up to date with what has come. Nodes that are right already stay, and with them a selection.
export function updateAnswer(made, column, place, number, conversation, act) {
  const one = shown(column);
  const running = one.finish === null;
  const thinking = made.querySelector(".thinking");
  thinking.hidden = !one.reasoning;
  grow(thinking.querySelector(".text"), one.reasoning);
  thinking.firstChild.textContent = thoughtTitle(one, running);
  sayText(made.querySelector(".said"), one.content);
  made.querySelector(".waiting").hidden = !running || Boolean(one.content || one.reasoning);
  made.setAttribute("aria-busy", String(running));
  if (running) {
    made.querySelector(".trouble").hidden = true;
    const foot = made.querySelector(".foot");
    foot.replaceChildren(one.pieces ? el("span", { className: "facts" }, speed(one)) : "");
    return;
  }
  showTrouble(made.querySelector(".trouble"), one, place, number, conversation, act);
  showFoot(made.querySelector(".foot"), column, place, number, conversation, act);
}

function thoughtTitle(one, running) {
  if (running && !one.content) return "Thinking…";
  return one.thought ? `Thought for ${one.thought.toFixed(1)} s` : "Thoughts";
}

function showTrouble(made, one, place, number, conversation, act) {
  made.hidden = !one.trouble;
  if (!one.trouble) return;
  const again = button("Try again", () => act.regenerate(place, number));
  let help = null;
  if (one.kind === "key") help = ["Enter the key", () => act.enterKey()];
  if (one.kind === "context" && conversation.first < place) help = ["Leave the oldest question out and try again", () => act.shorten(place, number)];
  made.replaceChildren(el("p", {}, one.trouble), el("p", { className: "actions", data: { needs: "rest" } }, ...(help ? [button(...help)] : []), again));
}

const ENDS = {
  length: "cut: the most tokens were reached",
  stopped: "stopped",
  left: "cut: the page was left",
};

function showFoot(made, column, place, number, conversation, act) {
  const one = shown(column);
  const silent = one.content || one.trouble ? "" : one.reasoning ? "thought, and said nothing" : "said nothing";
  const facts = [silent, ENDS[one.finish], one.pieces || one.tokens ? speed(one) : "", one.context ? `context ${counted(one.context)} of ${counted(one.room)}` : ""];
  const last = place === conversation.turns.length - 1;
  const count = column.tries.length;
  const step = (by) => act.choose(place, number, column.shown + by);
  made.replaceChildren(
    ...(count > 1
      ? [button("‹", () => step(-1), { className: "small", disabled: column.shown === 0, ariaLabel: "Answer before this one" }),
        el("span", { className: "facts" }, `${column.shown + 1} of ${count}`),
        button("›", () => step(1), { className: "small", disabled: column.shown === count - 1, ariaLabel: "Answer after this one" })]
      : []),
    ...(last && !one.trouble ? [button("Regenerate", () => act.regenerate(place, number), { className: "small", data: { needs: "rest" } })] : []),
    ...(one.content && navigator.clipboard ? [button("Copy", (event) => act.copy(one.content, event.target), { className: "small" })] : []),
    el("span", { className: "facts" }, facts.filter(Boolean).join(" · ")));
}

const counted = (number) => number.toLocaleString("en");

function speed(one) {
  const count = one.tokens ?? one.pieces;
  const about = one.tokens === null ? "about " : "";
  const rate = count > 1 && one.seconds > one.first ? ` · ${((count - 1) / (one.seconds - one.first)).toFixed(1)} tokens/s` : "";
  return `${about}${counted(count)} token${count === 1 ? "" : "s"}${rate}`;
}

// Paragraphs of text and blocks of code between ``` fences.
function sayText(made, content) {
  const parts = content.split(/^```[^\n`]*(?:\n|$)/m);
  parts.forEach((text, number) => {
    const code = number % 2 === 1;
    let node = made.children[number];
    if (!node) {
      node = code ? el("pre", { tabIndex: 0, ariaLabel: "Code", role: "region" }) : el("p", { className: "text" });
      made.append(node);
    }
    grow(node, code ? text.replace(/\n$/, "") : text.replace(/^\n+|\n+$/g, ""));
    node.hidden = !node.textContent;
  });
  while (made.children.length > parts.length) made.lastChild.remove();
}

function grow(node, text) {
  const held = node.firstChild;
  if (held && text.startsWith(held.data)) held.appendData(text.slice(held.length));
  else node.textContent = text;
}

// served: the models that can be asked in turns, null where that is not known.
export function emptyView(names, served, act) {
  if (!served) return el("section", { className: "empty" }, el("h2", {}, "The server has not told its models"));
  const who = names.length > 1 ? `${names[0]} and ${names[1]}` : names[0];
  const starts = ["Hello! What can you do?", "What is 17 + 25?", "Tell me a short story."];
  return el("section", { className: "empty", aria: { label: "How to begin" } },
    el("h2", {}, who ? `Ask ${who}` : "No model to chat with"),
    el("p", {}, who
      ? "Type a question below, or begin with one of these. Choose a second model above to see two answers side by side."
      : "The models of this server are base models: they continue a text and cannot be asked in turns. Serve one that was tuned on conversations (argonne sft)."),
    el("p", { className: "actions" }, ...(who ? starts.map((text) => button(text, () => act.send(text))) : [])));
}

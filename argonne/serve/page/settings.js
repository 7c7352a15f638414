// How answers are sampled: the words are those of docs/generate.md. What is not filled in is not sent.

import { el } from "./view.js";

const whole = (least) => (value) => Number.isSafeInteger(value) && value >= least;

export const SAMPLING = [
  ["temperature", "Temperature", "0: always the likeliest; higher: more varied", "1", (value) => value >= 0 && value <= 2, "a number from 0 to 2"],
  ["top_p", "Top p", "sample from the likeliest that make up this share", "1", (value) => value > 0 && value <= 1, "more than 0 and at most 1"],
  ["top_k", "Top k", "sample from the N likeliest; 0: from all", "0", whole(0), "a whole number, 0 or more"],
  ["min_p", "Min p", "drop what is less likely than this share of the likeliest", "0", (value) => value >= 0 && value <= 1, "a number from 0 to 1"],
  ["repetition_penalty", "Repetition penalty", "makes what was generated before (not the prompt) less likely; 1: none", "1", (value) => value > 0 && value < Infinity, "a number more than 0"],
  ["max_tokens", "Most tokens", "tokens at most", "what the context leaves", whole(1), "a whole number, 1 or more"],
  ["seed", "Seed", "the same seed gives the same text", "another each time", whole(-Number.MAX_SAFE_INTEGER), "a whole number"],
];

// The fields; `changed(name, value)` is called with what is right, undefined for an empty field.
export function fields(values, changed) {
  return SAMPLING.map(([name, label, meaning, standard, good, expected]) => {
    const input = el("input", { id: name, inputMode: "decimal", autocomplete: "off", placeholder: standard, value: values[name] ?? "" });
    const wrong = el("p", { className: "alert", id: `${name}-wrong`, role: "alert" });
    input.setAttribute("aria-describedby", `${name}-meaning ${name}-wrong`);
    input.addEventListener("change", () => {
      const text = input.value.trim();
      const fits = text === "" || good(Number(text));
      input.setAttribute("aria-invalid", String(!fits));
      wrong.textContent = fits ? "" : `Found ${text}, expected ${expected}. It is not used.`;
      if (fits) changed(name, text === "" ? undefined : Number(text));
    });
    return el("div", { className: "setting" },
      el("label", { htmlFor: name }, label), input,
      el("p", { className: "quiet", id: `${name}-meaning` }, `${meaning}. Default: ${standard}.`), wrong);
  });
}

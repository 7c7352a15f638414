// The server's API: the models it has, and one answer as it comes.

// What went wrong, in words for a person. kind: what may help ("key", "context"), "" where trying again is all.
export class Trouble extends Error {
  constructor(message, kind = "") {
    super(message);
    this.kind = kind;
  }
}

const LOST = "The server cannot be reached. It may have ended, or the network is down.";

async function call(path, key, more = {}) {
  const headers = { ...(more.body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...more, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Trouble(LOST);
  }
  if (!answer.ok) throw await troubleOf(answer);
  return answer;
}

async function troubleOf(answer) {
  const told = await answer.json().then((body) => body.error, () => null);
  const said = told?.message ?? `The server answered with status ${answer.status}.`;
  const wait = answer.headers.get("retry-after");
  const again = wait ? ` Try again in ${wait} s.` : "";
  if (answer.status === 401) return new Trouble("This server wants an API key, and the one given is missing or wrong.", "key");
  if (answer.status === 429) return new Trouble(`The server is busy: too many answers wait already.${again}`);
  if (answer.status === 503) return new Trouble(`The server is about to end and takes no more questions.${again}`);
  if (told?.code === "context_length_exceeded") {
    return new Trouble(`The conversation no longer fits into what the model can read at once: ${said}.`, "context");
  }
  return new Trouble(said);
}

export async function models(key) {
  return (await (await call("/v1/models", key)).json()).data;
}

// Yields {content}, {reasoning}, {finish} and {usage} as they come. Throws Trouble, or AbortError once it was stopped.
export async function* ask(body, key, signal) {
  const sent = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const answer = await call("/v1/chat/completions", key, { method: "POST", body: sent, signal });
  for await (const data of frames(answer.body)) {
    if (data === "[DONE]") return;
    const { error, choices = [], usage } = JSON.parse(data);
    if (error) throw new Trouble(error.message);
    for (const { delta, finish_reason: finish } of choices) {
      if (delta.reasoning_content) yield { reasoning: delta.reasoning_content };
      if (delta.content) yield { content: delta.content };
      // As the model wrote it: this page runs no functions.
      for (const { function: one } of delta.tool_calls ?? []) {
        yield { content: `<tool_call>\n{"name": ${JSON.stringify(one.name)}, "arguments": ${one.arguments}}\n</tool_call>` };
      }
      if (finish) yield { finish };
    }
    if (usage) yield { usage };
  }
  throw new Trouble("The connection ended before the answer did.");
}

async function* frames(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Trouble(LOST);
    });
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

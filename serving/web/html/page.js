"use strict";
// What a model or a server says is set by textContent alone; the page's policy allows no markup from text.

const SLOTS = 8; // colours of experts; base has one more, and who has none the last
const BASE = SLOTS, OTHERS = SLOTS + 1;
const LEAST = 0.005; // an expert with less than this everywhere is folded away
const COLOURED = 0.05; // and one with more than this has a colour, where there is one left
const UNSURE = Math.LN2; // nats of mutual information of a full shade: one bit
const DOTTED = 0.1; // and of a dotted line besides
const REPEAT = 24; // tokens after which the heaviest expert's number stands again
const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥", "": "·" }; // what would not be seen
const ENDS = {
  stop: "ended by itself, or at its stop", length: "ended at its most tokens", content_filter: "the prompt is foreign: nothing was written",
};

const at = (id) => document.getElementById(id);
const made = (name, text = "", of = {}) => Object.assign(document.createElement(name), { textContent: text }, of);
const percent = (share) => `${(100 * share).toFixed(share > 0.0005 && share < 0.0995 ? 1 : 0)}%`;
const fixed = (value) => value.toFixed(3).replace("-", "−");
const nats = (value) => (value === null ? "not known" : `${fixed(value)} nats`);

let running = null; // what aborts the request
let answer = null; // what has come of it

// The experts of an answer: their colours, and a row of the table for each.

class Experts {
  constructor(dispatch) {
    this.names = dispatch.experts;
    const enough = this.names.length <= SLOTS + 1;
    this.slots = this.names.map((name, k) => (name === "base" ? BASE : enough ? k : null));
    this.most = this.names.map(() => 0);
    this.rows = this.names.map((name, k) => this.row(k, dispatch));
    const order = [...this.names.keys()].sort((a, b) => dispatch.mean[b] - dispatch.mean[a]);
    at("rows").replaceChildren(...order.map((k) => this.rows[k].row));
    this.see(dispatch.mean);
    this.see(dispatch.interval_90.map((interval) => interval[1]));
    this.fold();
  }

  row(k, dispatch) {
    const row = made("tr"), [low, high] = dispatch.interval_90[k], mean = dispatch.mean[k];
    const number = made("td"), name = made("th", "", { scope: "row" });
    const graph = made("td", "", { className: "graph" }), weight = made("td", "", { className: "number" });
    const bar = made("div", "", { className: "bar", ariaHidden: "true" });
    name.append(...this.names[k].split(/(?<=[_\W])/).flatMap((part) => [part, made("wbr")]));
    number.append(made("span", String(k + 1), { className: "chip" }));
    bar.append(made("b"), made("i"));
    graph.append(bar, made("span", `${percent(mean)} (${percent(low).slice(0, -1)}–${percent(high)})`, { className: "told" }));
    row.append(number, name, graph, weight);
    for (const [property, value] of Object.entries({ mean, low, high })) row.style.setProperty(`--${property}`, value);
    return { row, weight };
  }

  // Weights that are to be seen: those that are large get a colour; whether that changed what is drawn.
  see(weights) {
    let changed = false;
    weights.forEach((weight, k) => {
      this.most[k] = Math.max(this.most[k], weight);
      if (this.slots[k] === null && weight > COLOURED) {
        const free = [...Array(SLOTS).keys()].map((n) => (k + n) % SLOTS).find((slot) => !this.slots.includes(slot));
        this.slots[k] = free ?? OTHERS;
        changed = true;
      }
    });
    return changed;
  }

  slot(k) {
    return this.slots[k] ?? OTHERS;
  }

  fold(all = at("all").dataset.all === "true") {
    let folded = 0;
    this.rows.forEach(({ row }, k) => {
      const small = this.most[k] < LEAST;
      folded += small;
      row.hidden = small && !all;
      row.style.setProperty("--own", `var(--c${this.slot(k)})`);
      row.style.setProperty("--on", `var(--on${this.slot(k)})`);
    });
    at("all").hidden = folded === 0;
    at("all").textContent = all ? "Hide experts without weight" : `Show ${folded} more without weight`;
  }
}

// An answer while it comes: its text in a span for each token.

class Answer {
  constructor() {
    this.text = "";
    this.length = 0; // of all tokens; the end of the last ones may be a stop, which is no part of the text
    this.whole = 0; // tokens that are all in the text
    this.tokens = [];
    this.experts = this.dispatch = this.reason = null;
    this.since = 0; // the last token that shows a number,
    this.shown = null; // and whose
    this.follow = true; // whether the slider stays at the last token
  }

  begin(dispatch) {
    this.dispatch = dispatch;
    this.experts = new Experts(dispatch);
    at("experts").hidden = false;
    const { p_value: p, foreign } = dispatch, asked = p !== null;
    const told = `this prompt is foreign to all experts: ${at("abstain").checked ? "nothing is written." : "base alone goes on with it."}`;
    at("gate").hidden = !asked;
    at("gate").className = foreign ? "foreign" : "";
    at("gate").textContent = asked ? `p-value ${p.toFixed(4)}: ${foreign ? told : "the gate lets this prompt pass."}` : "";
  }

  add(text, tokens) {
    this.text += text;
    let redraw = false;
    for (const token of tokens) {
      redraw = this.experts.see(token.weights) || redraw;
      const span = made("span"), start = this.length;
      const heaviest = token.weights.indexOf(Math.max(...token.weights));
      this.length += token.text.length;
      this.tokens.push({ ...token, span, start, heaviest });
      const mark = MARKS[/^\s*\n\s*$/.test(token.text) ? "\n" : token.text];
      if (mark) span.dataset.mark = mark;
      this.number(this.tokens.length - 1);
      this.draw(this.tokens.at(-1));
      at("text").append(span);
    }
    if (redraw) this.tokens.forEach((token) => this.draw(token));
    if (tokens.length) this.experts.fold();
    for (; this.whole < this.tokens.length; this.whole++) {
      const token = this.tokens[this.whole], end = token.start + token.text.length;
      token.span.textContent = this.text.slice(token.start, end);
      if (this.text.length < end) break;
    }
    this.look();
  }

  // The number of the heaviest expert: where it changes, where a line begins, and now and then.
  number(n) {
    const token = this.tokens[n];
    const changed = this.shown !== token.heaviest || this.tokens[n - 1].text.endsWith("\n");
    if (token.span.dataset.mark || !(changed || n - this.since >= REPEAT)) return;
    this.shown = token.heaviest;
    const below = token.weights.slice(0, token.heaviest).reduce((sum, weight) => sum + weight, 0);
    this.since = n;
    token.span.dataset.lead = String(token.heaviest + 1);
    token.span.style.setProperty("--middle", below + token.weights[token.heaviest] / 2);
  }

  draw(token) {
    let sum = 0;
    const parts = token.weights.map((weight, k) => {
      const from = sum;
      sum += weight;
      return `var(--c${this.experts.slot(k)}) ${100 * from}% ${100 * sum}%`;
    });
    const part = Math.sqrt(Math.min(1, (token.information ?? 0) / UNSURE)).toFixed(3);
    const shade = `rgba(var(--unsure), calc(var(--unsure-most) * ${part}))`;
    token.span.style.backgroundImage = `linear-gradient(to top, ${parts.join(", ")}), linear-gradient(${shade}, ${shade})`;
    token.span.classList.toggle("unsure", token.information > DOTTED);
    token.span.style.setProperty("--on", `var(--on${this.experts.slot(token.heaviest)})`);
  }

  // Show what is known of the token that the slider is at.
  look() {
    const slider = at("at"), count = this.tokens.length;
    at("look").hidden = count === 0;
    if (count === 0) return;
    slider.max = count;
    if (this.follow) slider.value = count;
    const n = Number(slider.value) - 1, { span, text, information, surprise, weights } = this.tokens[n];
    for (const other of at("text").querySelectorAll("[aria-current]")) if (other !== span) other.removeAttribute("aria-current");
    if (!this.follow) span.setAttribute("aria-current", "true");
    const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).filter((k) => weights[k] >= LEAST).slice(0, 3);
    const told = order.map((k) => `${this.experts.names[k]} ${percent(weights[k])}`).join(", ");
    const shown = JSON.stringify(text);
    at("here").textContent = `${n + 1} of ${count}: ${shown}, log-probability ${fixed(surprise)}, mutual information ${nats(information)}`;
    slider.ariaValueText = `${n + 1} of ${count}: ${shown}; ${told}; mutual information ${nats(information)}`;
    this.experts.rows.forEach(({ weight }, k) => { weight.textContent = percent(weights[k]); });
  }
}

// Requests.

class RefusedError extends Error {
  constructor(error, wait) {
    super(error.message + (wait ? ` Try again in ${wait} seconds.` : ""));
    this.param = error.param;
    this.code = error.code;
  }
}

async function ask(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = told?.error ?? { message: `The server answered with status ${response.status}.` };
  throw new RefusedError(error, response.headers.get("retry-after"));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new RefusedError({ message: "The answer broke off." });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function asked() {
  const way = at("way").value, number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const prompt = at("prompt").value, chat = way === "chat/completions";
  return {
    model: at("model").value,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    ...Object.fromEntries(["max_tokens", "temperature", "seed", "false_alarm_rate"].map((id) => [id, number(id)])),
    stop: at("line").checked ? "\n" : undefined,
    blend: at("blend").disabled ? undefined : at("blend").value.trim() || undefined,
    abstain: at("abstain").checked || undefined,
    logprobs: chat ? true : 0,
    stream: true,
  };
}

// The tokens of a chunk's choice, which each endpoint tells in its own way.
function tokensOf({ logprobs }) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      text: one.token, surprise: one.logprob, information: one.mutual_information, weights: one.weights,
    }));
  }
  return logprobs.tokens.map((text, n) => ({
    text, surprise: logprobs.token_logprobs[n], information: logprobs.mutual_information[n], weights: logprobs.weights[n],
  }));
}

async function write() {
  const abort = (running = new AbortController()), path = `v1/${at("way").value}`;
  const mine = (answer = new Answer());
  at("text").replaceChildren();
  at("text").ariaBusy = "true"; // it is read aloud when it is whole
  at("experts").hidden = at("look").hidden = true;
  refuse(null);
  status("Reading the prompt …");
  if (at("answer").getBoundingClientRect().top > innerHeight / 2) at("answer").scrollIntoView();
  busy(true);
  try {
    for await (const chunk of events(await ask(path, asked(), abort.signal))) {
      if (chunk.error) throw new RefusedError(chunk.error);
      if (chunk.dispatch) mine.begin(chunk.dispatch);
      for (const choice of chunk.choices) {
        mine.add(choice.text ?? choice.delta.content ?? "", tokensOf(choice));
        mine.reason = choice.finish_reason ?? mine.reason;
      }
      status(`Writing: ${count(mine)} …`);
    }
    status(`${count(mine)}; ${ENDS[mine.reason] ?? mine.reason}. Seed ${mine.dispatch.seed}, blend ${mine.dispatch.blend}.`);
  } catch (error) {
    status(mine.tokens.length ? `Stopped after ${count(mine)}.` : "Nothing was written.");
    if (error.name !== "AbortError") refuse(error);
  } finally {
    running = null;
    abort.abort(); // of what the page reads no more
    busy(false);
    at("text").ariaBusy = "false";
    mine.look();
  }
}

const count = ({ tokens }) => `${tokens.length} ${tokens.length === 1 ? "token" : "tokens"}`;
const status = (text) => { at("status").textContent = text; };

function busy(now) {
  const [from, to] = now ? ["write", "stop"] : ["stop", "write"], focused = document.activeElement === at(from);
  at(to).disabled = false;
  if (focused) at(to).focus();
  at(from).disabled = true;
}

// What a server refuses, in its words, and at the field that is at fault; null for nothing.
function refuse(error) {
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const broken = error instanceof TypeError; // what fetch throws
  at("error").textContent = broken ? "The server did not answer, or its answer broke off." : (error?.message ?? "");
  at("error").hidden = error === null;
  if (error === null) return;
  if (error.code === "invalid_api_key") at("key-field").hidden = false;
  const field = error.code === "invalid_api_key" ? "key" : error.param === "messages" ? "prompt" : error.param;
  if (!field || !at(field)?.form) return;
  at(field).setAttribute("aria-invalid", "true");
  at(field).closest("details")?.setAttribute("open", "");
}

async function models() {
  try {
    const { data } = await (await ask("v1/models")).json();
    const [, ...alone] = data.map(({ id }) => made("option", `${id.split(":")[1]} alone`, { value: id }));
    at("model").replaceChildren(at("model").options[0], ...alone);
    refuse(null);
    status("Nothing is written yet.");
  } catch (error) {
    refuse(error);
    if (error.code !== "invalid_api_key" || at("key").value) return;
    refuse(null); // nobody was wrong yet
    status("This server asks for an API key.");
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) write();
});
at("stop").addEventListener("click", () => running?.abort());
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("model").addEventListener("change", () => { at("blend").disabled = at("model").value !== "bundle"; });
at("key").addEventListener("change", models);
at("at").addEventListener("input", () => {
  if (!answer) return;
  answer.follow = false;
  answer.look();
});
at("text").addEventListener("click", (event) => {
  const n = !answer ? -1 : answer.tokens.findIndex(({ span }) => span === event.target);
  if (n < 0) return;
  answer.follow = false;
  at("at").value = n + 1;
  answer.look();
});
at("all").addEventListener("click", () => {
  at("all").dataset.all = at("all").dataset.all === "true" ? "false" : "true";
  answer.experts.fold();
});
at("settings").open = matchMedia("(min-width: 48rem)").matches; // a phone shows the answer instead
models();

// The technologist's view. One scanner is shown large: the newest open alert, else the newest result. Everything on it is
// built once and updated in place, so a hand on a button or a slider is never disturbed.

import { byId, el, replace, setText, svg } from "./dom.js";
import { Live } from "./live.js";
import { adviceOf, affectedOf, alertLine, doingOf, furtherReasons, headlineOf, isOpen, keepTogether, provenance, verdictOf } from "./sentences.js";
import { Viewer } from "./viewer.js";
import { ACKNOWLEDGE, ALERT_STATES, clock, duration, glyph, light, number, roomName, seriesName, sign } from "./words.js";

const LOOK_BACK_MS = 60000;
const SETTLE_MS = 700;
const LOOK_MS = 250;
const ASK_AGAIN_MS = 10000;
const PINNED = new URLSearchParams(location.search).get("scanner");

let state = null;
let slug = PINNED;
let chosen = null;
let chosenAt = 0;
let shownAlert = "";
let settledAt = 0;
let sending = false;
let changing = "";
let asked = "";
let askedAt = 0;
const displayed = new Set();
const live = new Live((next) => {
  state = next;
  render();
});

const openAlerts = (scanner) => scanner.exam.filter(isOpen);

// --- what to show ------------------------------------------------------------------------------------------------------

function pickScanner() {
  const { scanners } = state;
  const current = scanners.find((scanner) => scanner.slug === slug);
  if (PINNED && current) return current;
  if (current && openAlerts(current).length) return current;
  const alarmed = scanners.filter((scanner) => openAlerts(scanner).length);
  const newest = alarmed.sort((a, b) => openAlerts(b)[0].at - openAlerts(a)[0].at)[0];
  if (newest && !displayed.has(openAlerts(newest)[0].alert.alert_id)) return newest;
  return current ?? newest ?? [...scanners].sort((a, b) => lastAt(b) - lastAt(a))[0];
}

const lastAt = (scanner) => Math.max(scanner.progress?.since ?? 0, scanner.exam[0]?.at ?? 0);

function pickEntry(scanner) {
  const open = openAlerts(scanner)[0];
  if (chosen && performance.now() - chosenAt < LOOK_BACK_MS) {
    const entry = scanner.exam.find((each) => each.result.stack_ref === chosen);
    if (entry && (!open || displayed.has(open.alert.alert_id))) return entry;
  }
  chosen = null;
  return open ?? scanner.exam[0];
}

// --- the panel, built once ---------------------------------------------------------------------------------------------

const viewer = new Viewer(["task"]);
const parts = {
  room: el("h1", { class: "room" }),
  doing: el("p", { class: "doing" }),
  bar: el("progress", { class: "bar-progress", max: 1 }),
  scoreNow: el("button", { type: "button", class: "score-now", hidden: true, onclick: scoreNow }, "Score now"),
  back: el("button", { type: "button", class: "plain back", onclick: backToNow, hidden: true }, "Back to now"),
  light: el("div", { class: "light-box" }),
  word: el("p", { class: "word" }),
  says: el("p", { class: "says" }),
  meta: el("p", { class: "meta" }),
  headline: el("p", { class: "headline" }),
  advice: el("p", { class: "advice" }),
  dice: el("div", { class: "dice" }),
  more: el("ul", { class: "more" }),
  small: el("p", { class: "small" }),
  acknowledged: el("p", {}),
  change: el("button", { type: "button", class: "plain", onclick: changeMind }, "Change"),
  held: el("p", { class: "held", hidden: true }),
  exam: el("ol", { class: "exam-list" }),
};
const by = el("input", { type: "text", maxlength: 32, autocomplete: "off", spellcheck: "false", value: localStorage.getItem("rescan-by") ?? "", oninput: () => localStorage.setItem("rescan-by", by.value) });
const ackButtons = Object.entries(ACKNOWLEDGE).map(([reason, { label, says, icon }]) =>
  el("button", { type: "button", class: `ack ack-${reason}`, "data-reason": reason, onclick: () => acknowledge(reason) }, glyph(icon), el("span", { class: "ack-text" }, el("strong", {}, label), el("span", {}, says))),
);
const ackBox = el(
  "section",
  { class: "ack-box", "aria-label": "Acknowledge this alert", hidden: true },
  el("div", { class: "ack-head" }, el("h2", {}, "What happens now?"), el("label", { class: "by" }, el("span", {}, "Your initials"), by)),
  el("div", { class: "ack-grid" }, ackButtons),
);
const ackDone = el("div", { class: "acknowledged", hidden: true }, parts.acknowledged, parts.change);
const idleWord = el("p", { class: "idle-word" });
const idle = el("div", { class: "idle", hidden: true }, idleWord, el("p", { class: "hint" }, "The verdict appears here seconds after the last image."));
const focus = el(
  "article",
  { class: "focus" },
  el(
    "div",
    { class: "say" },
    el("div", { class: "verdict" }, parts.light, el("div", { class: "verdict-text" }, parts.meta, parts.word, parts.headline, parts.says)),
    parts.advice,
    ackBox,
    ackDone,
    parts.dice,
    parts.held,
    parts.more,
    parts.small,
  ),
  viewer.root,
);
const announce = el("p", { class: "sr", role: "alert" });
replace(byId("now"), parts.room, el("div", { class: "now-doing" }, parts.doing, parts.bar), parts.scoreNow);
const panel = el(
  "section",
  { class: "panel", "aria-label": "Scanner" },
  announce,
  focus,
  idle,
  el("section", { class: "exam", "aria-label": "Series of this exam" }, parts.back, parts.exam),
);

// --- rendering ---------------------------------------------------------------------------------------------------------

function render() {
  if (!state) return;
  if (!state.scanners.length) {
    replace(byId("panel"), el("p", { class: "hint" }, "No scanner is configured."));
    return;
  }
  if (!panel.isConnected) replace(byId("panel"), panel);
  const scanner = pickScanner();
  if (slug !== scanner.slug) chosen = null;
  slug = scanner.slug;
  renderTiles();
  renderNow(scanner);
  const entry = pickEntry(scanner);
  focus.hidden = !entry;
  idle.hidden = Boolean(entry);
  panel.dataset.tone = entry ? verdictOf(entry).tone : "none";
  panel.dataset.open = entry && isOpen(entry) ? "yes" : "no";
  if (entry) renderEntry(entry, scanner);
  renderExam(scanner, entry);
  tick();
}

function renderTiles() {
  const tiles = byId("tiles");
  const { scanners } = state;
  tiles.hidden = scanners.length < 2 || Boolean(PINNED);
  if (tiles.hidden) return;
  const had = tiles.contains(document.activeElement) ? document.activeElement.dataset.slug : null;
  replace(tiles, scanners.map(tile));
  if (had) tiles.querySelector(`[data-slug="${CSS.escape(had)}"]`)?.focus({ preventScroll: true });
}

function tile(scanner) {
  const entry = openAlerts(scanner)[0] ?? scanner.exam[0];
  const open = openAlerts(scanner).length > 0;
  const tone = entry ? verdictOf(entry).tone : "none";
  const word = entry ? verdictOf(entry).word : "Waiting";
  return el(
    "button",
    { type: "button", class: `tile tone-${tone}`, "data-slug": scanner.slug, "data-open": open ? "yes" : "no", "aria-pressed": scanner.slug === slug, onclick: () => chooseScanner(scanner.slug) },
    entry ? sign(tone) : el("span", { class: "sign-none", "aria-hidden": "true" }),
    el("span", { class: "tile-text" }, el("span", { class: "tile-room" }, roomName(scanner)), el("strong", { class: "tile-word" }, scanner.progress ? `${word} · ${scanner.progress.phase}` : word)),
  );
}

function renderNow(scanner) {
  const { progress } = scanner;
  setText(parts.room, roomName(scanner));
  parts.bar.hidden = !progress;
  renderScoreNow(scanner);
  setText(idleWord, progress ? doingOf(progress) : "Waiting for a series");
  if (!progress) {
    setText(parts.doing, scanner.shadow ? "Shadow mode: results are recorded, not shown here" : "No series is being received");
    parts.doing.dataset.busy = "no";
    return;
  }
  const count = progress.expected ? `${progress.instances} of ${progress.expected}` : `${progress.instances} images`;
  setText(parts.doing, progress.phase === "judging" ? doingOf(progress) : `${doingOf(progress)} · ${count}`);
  parts.doing.dataset.busy = "yes";
  parts.bar.setAttribute("aria-label", doingOf(progress));
  if (progress.phase === "judging" || !progress.expected) parts.bar.removeAttribute("value");
  else parts.bar.value = progress.instances / progress.expected;
}

// Whoever cannot wait for the last images may ask for the verdict on those that have come.
function renderScoreNow({ progress, shadow }) {
  const receiving = progress?.phase === "receiving" && !shadow;
  if (!receiving || progress.series_ref !== asked || performance.now() - askedAt > ASK_AGAIN_MS) asked = "";
  parts.scoreNow.hidden = !receiving;
  parts.scoreNow.disabled = Boolean(asked) || !live.isLive;
  setText(parts.scoreNow, asked ? "Asked" : "Score now");
}

function renderEntry(entry, scanner) {
  const { result } = entry;
  const verdict = verdictOf(entry);
  const hide = result.shadow;
  focus.dataset.entry = entry.result_id;
  if (parts.light.dataset.tone !== verdict.tone) {
    parts.light.dataset.tone = verdict.tone;
    replace(parts.light, light(verdict.tone));
  }
  setText(parts.word, verdict.word);
  const headline = hide ? "" : headlineOf(entry);
  setText(parts.headline, headline);
  setText(parts.says, headline ? affectedOf(result) : verdict.says);
  parts.headline.hidden = !headline;
  parts.says.hidden = !parts.says.textContent;
  setText(parts.advice, hide ? "" : adviceOf(result).map(keepTogether).join(" "));
  parts.advice.hidden = !parts.advice.textContent;
  replace(parts.more, hide ? [] : furtherReasons(entry).map((text) => el("li", {}, text)));
  replace(parts.dice, hide ? [] : diceOf(result));
  setText(parts.small, provenance(entry));
  parts.held.hidden = !scanner.suppressed;
  setText(parts.held, scanner.suppressed ? `${scanner.suppressed} more ${scanner.suppressed === 1 ? "alert" : "alerts"} of this exam held back: see the series below.` : "");
  renderAlert(entry, scanner);
  viewer.root.hidden = hide || !entry.pictures;
  focus.classList.toggle("alone", viewer.root.hidden);
  viewer.show(hide ? null : entry);
}

function renderAlert(entry, scanner) {
  const open = isOpen(entry);
  const id = open || changing === entry.alert?.alert_id ? entry.alert.alert_id : "";
  ackBox.hidden = !id;
  if (id !== shownAlert) {
    shownAlert = id;
    if (open) {
      settle();
      setText(announce, `${roomName(scanner)}: ${seriesName(entry)}, rescan. ${headlineOf(entry)}`);
    }
  }
  if (open && live.isLive && document.visibilityState === "visible" && !displayed.has(id)) {
    displayed.add(id);
    live.post(`/api/alerts/${encodeURIComponent(id)}/displayed`, {}).catch(() => displayed.delete(id));
  }
  const done = entry.alert && !id && !entry.result.shadow;
  ackDone.hidden = !done;
  parts.change.hidden = entry.alert?.state !== "acknowledged";
  parts.change.dataset.alert = entry.alert?.alert_id ?? "";
  if (done) setText(parts.acknowledged, alertLine(entry.alert));
}

// A new alert under a falling finger must not be acknowledged by it.
function settle() {
  settledAt = performance.now() + SETTLE_MS;
  allowAcknowledge();
}

function allowAcknowledge() {
  const allowed = live.isLive && !sending && performance.now() >= settledAt;
  for (const button of ackButtons) button.disabled = !allowed;
}

// Predicted Dice with its interval against the required one, on a scale that shows the end that matters.
function diceOf(result) {
  const { predicted_dice: dice, predicted_dice_low: low, predicted_dice_high: high } = result.scores;
  if (dice === undefined) return [];
  const needed = result.required_dice;
  const start = Math.max(0, Math.floor(10 * Math.min(low ?? dice, needed ?? dice) - 1) / 10);
  const x = (value) => (300 * (Math.min(Math.max(value, start), 1) - start)) / (1 - start);
  const interval = low === undefined ? "" : ` (${number(low)} to ${number(high)})`;
  const text = el("p", { class: "dice-text" }, el("span", {}, "Predicted Dice ", el("strong", {}, number(dice)), interval), needed === undefined ? null : el("span", {}, "needed ", el("strong", {}, number(needed))));
  const chart = svg(
    "svg",
    { class: "dice-bar", viewBox: "0 0 300 20", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "dice-track", x: 0, y: 8, width: 300, height: 4, rx: 2 }),
    low === undefined ? null : svg("rect", { class: "dice-range", x: x(low), y: 5, width: Math.max(2, x(high) - x(low)), height: 10, rx: 3 }),
    svg("rect", { class: "dice-point", x: x(dice) - 2, y: 2, width: 4, height: 16, rx: 2 }),
    needed === undefined ? null : svg("rect", { class: "dice-needed", x: x(needed) - 1, y: 0, width: 2, height: 20 }),
  );
  return [text, chart];
}

function renderExam(scanner, shown) {
  const had = parts.exam.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  replace(parts.exam, scanner.exam.map((entry) => examItem(entry, entry === shown)));
  if (had) parts.exam.querySelector(`[data-key="${CSS.escape(had)}"]`)?.focus({ preventScroll: true });
  parts.back.hidden = !shown || !chosen || shown === (openAlerts(scanner)[0] ?? scanner.exam[0]);
}

function examItem(entry, isShown) {
  const verdict = verdictOf(entry);
  const badge = entry.alert && !entry.result.shadow ? (ALERT_STATES[entry.alert.state] ?? entry.alert.state) : entry.result.final ? "" : "Provisional";
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", class: `exam-item tone-${verdict.tone}`, "data-key": entry.result.stack_ref, "aria-pressed": isShown, "data-open": isOpen(entry) ? "yes" : "no", onclick: () => chooseEntry(entry) },
      sign(verdict.tone),
      el("span", { class: "exam-text" }, el("span", { class: "exam-name" }, `${seriesName(entry)} · ${clock(entry.at)}`), el("span", { class: "exam-word" }, el("strong", {}, verdict.word), badge ? el("span", { class: "exam-badge" }, badge) : null)),
    ),
  );
}

// --- what a person does ------------------------------------------------------------------------------------------------

function chooseScanner(next) {
  slug = next;
  chosen = null;
  render();
}

function chooseEntry(entry) {
  chosen = entry.result.stack_ref;
  chosenAt = performance.now();
  render();
}

function backToNow() {
  chosen = null;
  render();
}

// A second word replaces the first: a finger slips, a patient changes their mind.
function changeMind() {
  changing = parts.change.dataset.alert;
  render();
  ackButtons[0].focus();
}

async function acknowledge(reason) {
  const id = shownAlert;
  if (!id || !live.isLive) return;
  sending = true;
  allowAcknowledge();
  try {
    await live.post(`/api/alerts/${encodeURIComponent(id)}/acknowledge`, { reason, by: by.value });
    changing = "";
    toast(`Recorded: ${ACKNOWLEDGE[reason].label.toLowerCase()}`);
  } catch (error) {
    toast(`Not recorded. ${error.message}`);
  } finally {
    sending = false;
    render();
    allowAcknowledge();
  }
}

async function scoreNow() {
  const scanner = state.scanners.find((each) => each.slug === slug);
  if (!scanner?.progress || !live.isLive) return;
  asked = scanner.progress.series_ref;
  askedAt = performance.now();
  renderScoreNow(scanner);
  try {
    await live.post(`/api/scanners/${encodeURIComponent(scanner.slug)}/score-now`, {});
    toast("Asked for the verdict on the images that have come");
  } catch (error) {
    asked = "";
    toast(`Not asked. ${error.message}`);
  }
}

let toastTimer = 0;
function toast(text) {
  const node = byId("toast");
  setText(node, text);
  node.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => {
    node.hidden = true;
  }, 5000);
}

// --- time passes -------------------------------------------------------------------------------------------------------

function tick() {
  if (!state || !panel.isConnected) return;
  if (chosen && performance.now() - chosenAt >= LOOK_BACK_MS) {
    chosen = null;
    render();
    return;
  }
  allowAcknowledge();
  const scanner = state.scanners.find((each) => each.slug === slug);
  if (scanner) renderScoreNow(scanner);
  const entry = scanner?.exam.find((each) => each.result_id === focus.dataset.entry);
  if (!entry) return;
  const ended = entry.ended_at ?? entry.at;
  const words = [seriesName(entry), live.isLive ? `ended ${duration(live.now() - ended)} ago` : `ended at ${clock(ended)}`];
  if (!entry.result.final) words.push("provisional");
  setText(parts.meta, words.join(" · "));
  if (!live.isLive) return;
  const open = state.scanners.flatMap(openAlerts).length;
  document.title = open ? `RESCAN · ${roomName(scanner)}` : "Rescan";
}

setInterval(tick, LOOK_MS);
document.addEventListener("visibilitychange", render);

// The physicist's view: every result, filtered; trends with control limits; every number and picture of one result.

import { chart } from "./chart.js";
import { byId, el, replace, setText } from "./dom.js";
import { Live } from "./live.js";
import { Viewer, meter } from "./viewer.js";
import { ACKNOWLEDGE, ALERT_STATES, ARTEFACTS, VERDICTS, dateTime, duration, number, sign, significant } from "./words.js";

const DAY_S = 86400;
const filters = byId("filters");
const detail = byId("detail");
const viewer = new Viewer();
let asked = 0;
let metrics = {};

new Live(() => load());
filters.addEventListener("change", () => load());
filters.addEventListener("reset", () => setTimeout(load));
filters.addEventListener("submit", (event) => event.preventDefault());
detail.addEventListener("click", (event) => {
  if (event.target === detail) detail.close();
});

function query() {
  const values = Object.fromEntries(new FormData(filters));
  const asked = new URLSearchParams();
  for (const name of ["scanner", "protocol", "verdict"]) if (values[name]) asked.set(name, values[name]);
  if (values.since) asked.set("since", dayStart(values.since));
  if (values.until) asked.set("until", dayStart(values.until) + DAY_S);
  return asked;
}

const dayStart = (text) => new Date(`${text}T00:00:00`).getTime() / 1000;

async function load() {
  const mine = ++asked;
  for (const link of byId("export").querySelectorAll("a")) link.href = `/export/${link.dataset.table}.csv?${query()}`;
  const history = await get(`/api/history?${query()}`);
  if (!history || mine !== asked) return;
  metrics = history.metrics;
  options("scanner", history.scanners.map((each) => [each, each]), "All");
  options("protocol", history.protocols.map((each) => [each, each]), "All");
  options("verdict", history.verdicts.map((each) => [each, VERDICTS[each].word]), "All");
  options("metric", Object.entries(metrics), null);
  renderRows(history.entries);
  const wanted = query();
  wanted.set("metric", filters.elements.metric.value);
  wanted.set("limit", "2000");
  const found = await get(`/api/trends?${wanted}`);
  if (found && mine === asked) renderTrends(found.trends);
}

async function get(address) {
  try {
    const answer = await fetch(address, { cache: "no-store" });
    if (answer.status === 401) location.assign("/login?next=/physicist");
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

// Fill a choice, keeping what is chosen.
function options(name, values, all) {
  const select = filters.elements[name];
  const chosen = select.value;
  const wanted = all === null ? values : [["", all], ...values];
  if (select.options.length === wanted.length && wanted.every(([value], i) => select.options[i].value === value)) return;
  replace(select, wanted.map(([value, text]) => el("option", { value }, text)));
  if (wanted.some(([value]) => value === chosen)) select.value = chosen;
}

// --- the table -----------------------------------------------------------------------------------------------------------

function renderRows(entries) {
  const had = document.activeElement?.dataset?.result;
  replace(byId("rows"), entries.map(row));
  if (had) byId("rows").querySelector(`[data-result="${CSS.escape(had)}"]`)?.focus({ preventScroll: true });
  byId("empty").hidden = entries.length > 0;
  setText(byId("count"), entries.length === 500 ? "newest 500" : String(entries.length));
}

function row(entry) {
  const { result } = entry;
  const { scores } = result;
  const verdict = VERDICTS[result.verdict];
  const dice = scores.predicted_dice === undefined ? "–" : `${number(scores.predicted_dice)} (${number(scores.predicted_dice_low)}–${number(scores.predicted_dice_high)})`;
  const volume = scores.gm_volume_ml === undefined ? "–" : `${number(scores.gm_volume_ml, 0)} ± ${number(scores.gm_volume_error_ml, 0)} ml`;
  const number_ = (text) => el("td", { class: "num" }, text);
  return el(
    "tr",
    { onclick: () => open(entry.result_id) },
    el("td", {}, el("button", { type: "button", class: "open-detail", "data-result": entry.result_id, onclick: (event) => { event.stopPropagation(); open(entry.result_id); } }, dateTime(entry.at))),
    el("td", {}, result.scanner, result.shadow ? el("span", { class: "faint" }, " shadow") : null),
    el("td", {}, entry.series_number ?? "–", result.final ? null : el("span", { class: "faint" }, " provisional")),
    el("td", {}, entry.protocol || "–"),
    el("td", { class: `verdict-cell tone-${verdict.tone}` }, sign(verdict.tone), verdict.word),
    number_(dice),
    number_(number(result.required_dice)),
    el("td", {}, result.dominant_artefact ? ARTEFACTS[result.dominant_artefact] : "–"),
    number_(significant(scores.artefact_uncertainty)),
    number_(volume),
    el("td", {}, alertWords(entry.alert)),
  );
}

function alertWords(alert) {
  if (!alert) return "–";
  const words = ALERT_STATES[alert.state] ?? alert.state;
  return alert.reason ? `${words}: ${(ACKNOWLEDGE[alert.reason]?.label ?? alert.reason).toLowerCase()}` : words;
}

// --- trends --------------------------------------------------------------------------------------------------------------

function renderTrends(trends) {
  const metric = filters.elements.metric.value;
  replace(byId("trends"), trends.length ? trends.map((trend) => chart(trend, metrics[metric], open)) : el("p", { class: "hint" }, "No results with this score."));
}

// --- one result ----------------------------------------------------------------------------------------------------------

async function open(resultId) {
  const entry = await get(`/api/results/${encodeURIComponent(resultId)}`);
  if (!entry) return;
  const { result } = entry;
  const verdict = VERDICTS[result.verdict];
  viewer.show(entry);
  replace(
    byId("detail-body"),
    el("div", { class: `detail-head tone-${verdict.tone}` }, sign(verdict.tone), el("h2", { id: "detail-title" }, `${verdict.word} · ${result.scanner} · series ${entry.series_number ?? "–"}`)),
    el(
      "div",
      { class: "detail-grid" },
      el(
        "div",
        { class: "facts" },
        sentences("Reasons", result.reasons),
        sentences("Advice", result.advice),
        list("Result", { time: dateTime(entry.at), final: result.final ? "yes" : "provisional", revision: result.revision, "required Dice": number(result.required_dice), protocol: entry.protocol, shadow: result.shadow ? "yes" : "no", alert: alertWords(entry.alert) }),
        list("Scores", mapValues(result.scores, significant)),
        artefacts(result.artefacts),
        list("Evidence", result.evidence),
        list("Model and policy", { ...result.model, ...result.policy }),
        list("Engine", result.engine),
        list("Seconds", mapValues(result.timing_s ?? {}, (s) => (s < 60 ? s.toFixed(2) : duration(s)))),
        list("References", { result: entry.result_id, series: result.series_ref, exam: entry.exam, supersedes: result.supersedes ?? "–" }),
      ),
      viewer.root,
    ),
  );
  if (!detail.open) detail.showModal();
}

const mapValues = (object, change) => Object.fromEntries(Object.entries(object ?? {}).map(([key, value]) => [key, change(value)]));

function sentences(title, items) {
  return items?.length ? el("section", {}, el("h3", {}, title), el("ul", {}, items.map((item) => el("li", {}, item.text, " ", el("span", { class: "faint" }, item.code))))) : null;
}

function list(title, values) {
  const known = Object.entries(values ?? {}).filter(([, value]) => value !== null && value !== undefined && value !== "");
  if (!known.length) return null;
  return el("section", {}, el("h3", {}, title), el("dl", {}, known.map(([key, value]) => el("div", {}, el("dt", {}, key.replaceAll("_", " ")), el("dd", {}, String(value))))));
}

function artefacts(values) {
  const names = Object.keys(ARTEFACTS).filter((name) => values?.[name]);
  if (!names.length) return null;
  const line = (name) => el("div", {}, el("dt", {}, ARTEFACTS[name], values[name].score === undefined ? null : meter(values[name].score)), el("dd", {}, values[name].score === undefined ? "" : `${number(values[name].score)} · `, `σ² ${significant(values[name].uncertainty)}`));
  return el("section", {}, el("h3", {}, "Artefacts: comparable score and mean variance in grey matter"), el("dl", {}, names.map(line)));
}

// What the technologist's view says of one result, sentence by sentence; a sentence whose ground is unknown is absent.

import { ACKNOWLEDGE, ALERT_STATES, ARTEFACTS, VERDICTS, clock, spell } from "./words.js";

export const verdictOf = (entry) => VERDICTS[entry.result.shadow ? "SHADOW" : entry.result.verdict];
export const isOpen = (entry) => entry.alert?.state === "raised" && !entry.result.shadow;

// What stands for a person who gave no initials.
const NOBODY = "page";

export function doingOf(progress) {
  const name = progress.series_number === null ? "a series" : `series ${progress.series_number}`;
  return `${progress.phase === "judging" ? "Judging" : "Receiving"} ${name}`;
}

export function alertLine(alert) {
  const words = ALERT_STATES[alert.state] ?? alert.state;
  if (!alert.reason) return words;
  const who = alert.by && alert.by !== NOBODY ? ` by ${alert.by}` : "";
  const when = alert.acknowledged_at ? ` at ${clock(alert.acknowledged_at)}` : "";
  const what = ACKNOWLEDGE[alert.reason]?.label ?? alert.reason;
  return alert.state === "acknowledged" ? `${what} · acknowledged${who}${when}` : `${words} · ${what.toLowerCase()}${who}`;
}

export function headlineOf(entry) {
  const { result } = entry;
  const worst = placeOf(entry);
  if (result.verdict === "PASS") return "";
  if (result.dominant_artefact) return [ARTEFACTS[result.dominant_artefact], worst].filter(Boolean).join(", ");
  return result.reasons[0]?.text ?? "";
}

// A number stays on one line with its unit.
export const keepTogether = (text) => text.replace(/(\d) (?=min\b|s\b|mm\b|%)/g, "$1\u00a0").replace(/(min) (?=\d)/g, "$1\u00a0");

export function affectedOf(result) {
  const share = result.scores.gm_affected_share;
  return share === undefined ? "" : `${Math.round(100 * share)} % of grey matter affected`;
}

const placeOf = (entry) => entry.result.worst_slices?.[0]?.place ?? entry.pictures?.planes[0]?.place ?? "";

// What to do, and what it costs where the header tells.
export function adviceOf(result) {
  if (result.verdict === "PASS") return [];
  const cost = result.verdict === "RESCAN" && result.series?.duration_s > 0 ? [`Repeating it takes ${spell(result.series.duration_s)}.`] : [];
  return [...result.advice.map((each) => each.text), ...cost];
}

export function furtherReasons(entry) {
  const { result } = entry;
  if (result.verdict === "PASS") return [];
  const shown = headlineOf(entry);
  const seen = new Set(["grey_matter_only", "dice_below_required", `artefact_${result.dominant_artefact}`]);
  return result.reasons.filter((reason) => !seen.has(reason.code) && reason.text !== shown).map((reason) => reason.text);
}

export function provenance(entry) {
  const { result, alert } = entry;
  const limits = alert?.not_concluded || result.reasons.find((reason) => reason.code === "grey_matter_only")?.text || "";
  const model = result.model?.name ? `${result.model.name} ${result.model.version}` : "";
  const rule = result.policy?.rule ? `rule ${result.policy.rule}` : "";
  return [limits, [model, rule, `revision ${result.revision}`].filter(Boolean).join(" · ")].filter(Boolean).join(" ");
}

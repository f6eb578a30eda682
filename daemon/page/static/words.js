// The words and shapes for people. Each verdict has a word, a shape, a place in the light and a colour: never colour alone.

import { svg } from "./dom.js";

export const VERDICTS = {
  PASS: { word: "PASS", tone: "pass", says: "Good enough for the measurement" },
  REVIEW: { word: "REVIEW", tone: "review", says: "Look at the images" },
  RESCAN: { word: "RESCAN", tone: "rescan", says: "Repeat this scan" },
  CANNOT_JUDGE: { word: "CANNOT JUDGE", tone: "cannot", says: "Judge this scan by eye" },
  SHADOW: { word: "RECORDED", tone: "cannot", says: "Shadow mode: scored for the physicist, not shown here" },
};

export const ARTEFACTS = {
  noise: "Noise",
  spike: "RF spike",
  blur: "Blur",
  wrap: "Wrap-around",
  motion: "Motion",
};

export const LAYERS = { total: "All", ...ARTEFACTS, task: "Task", outline: "Outline" };

export const ACKNOWLEDGE = {
  rescanning: { label: "Repeating it", says: "The scan is being repeated", icon: "repeat" },
  acceptable: { label: "Good enough", says: "Keep the scan as it is", icon: "check" },
  patient_cannot: { label: "Patient cannot", says: "No repeat is possible", icon: "person" },
  wrong: { label: "Alert is wrong", says: "The images are fine", icon: "cross" },
};

export const ALERT_STATES = {
  raised: "Open",
  acknowledged: "Acknowledged",
  resolved: "Resolved by a repeat",
  superseded: "Replaced by a better scan",
  expired: "Expired",
  withdrawn: "Withdrawn",
};

const PATHS = {
  repeat: ["M20 12a8 8 0 1 1-2.6-5.9", "M20.5 3v4.5H16"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  person: ["M12 11a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7z", "M5 20c.6-4 3.4-6 7-6s6.4 2 7 6"],
  cross: ["M6 6l12 12", "M18 6L6 18"],
  eye: ["M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12z", "M12 14.800a2.8 2.8 0 1 0 0-5.6 2.8 2.8 0 0 0 0 5.600z"],
  question: ["M8.5 9a3.5 3.5 0 1 1 5 3.200c-1 .5-1.5 1.2-1.5 2.3", "M12 18.300v.2"],
  clock: ["M12 7v5l3 2"],
};

export function glyph(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "glyph", "aria-hidden": "true" },
    PATHS[name].map((d) => svg("path", { d })),
  );
}

const OCTAGON = "M8 1.500h8l6.5 6.500v8l-6.5 6.500H8L1.5 16V8z";
const TRIANGLE = "M12 1.800a2 2 0 0 1 1.750 1l9 16.200a2 2 0 0 1-1.750 3H3a2 2 0 0 1-1.750-3l9-16.200a2 2 0 0 1 1.750-1z";

function shape(tone) {
  if (tone === "rescan") return svg("path", { class: "shape", d: OCTAGON });
  if (tone === "review") return svg("path", { class: "shape", d: TRIANGLE });
  if (tone === "pass") return svg("circle", { class: "shape", cx: 12, cy: 12, r: 10.5 });
  return svg("rect", { class: "shape", x: 2, y: 2, width: 20, height: 20, rx: 4 });
}

const INNER = { rescan: "repeat", review: "eye", pass: "check", cannot: "question" };
const PLACE = { rescan: "translate(12 12) scale(.62) translate(-12 -12)", review: "translate(12 14.5) scale(.5) translate(-12 -12)", pass: "translate(12 12) scale(.72) translate(-12 -12)", cannot: "translate(12 12) scale(.72) translate(-12 -12)" };

function lampParts(tone) {
  return [shape(tone), svg("g", { class: "ink", transform: PLACE[tone] }, PATHS[INNER[tone]].map((d) => svg("path", { d })))];
}

// One small sign: shape, ink and colour of a verdict.
export function sign(tone) {
  return svg("svg", { viewBox: "0 0 24 24", class: `sign tone-${tone}`, "aria-hidden": "true" }, lampParts(tone));
}

// The light: three lamps in the order of every traffic light; the lit one is filled and carries its sign.
export function light(tone) {
  const lamps = ["rescan", "review", "pass"].map((lamp, row) =>
    svg("g", { transform: `translate(5 ${5 + row * 30})`, class: `lamp tone-${lamp}${lamp === tone ? " lit" : ""}` }, lampParts(lamp)),
  );
  const none = tone === "cannot" ? svg("g", { transform: "translate(5 35)", class: "lamp lit tone-cannot" }, lampParts("cannot")) : null;
  const shown = none ? [lamps[0], none, lamps[2]] : lamps;
  return svg("svg", { viewBox: "0 0 34 94", class: "light", "aria-hidden": "true" }, svg("rect", { class: "housing", x: 0.75, y: 0.75, width: 32.5, height: 92.5, rx: 9 }), shown);
}

export function number(value, digits = 2) {
  return value === undefined || value === null ? "–" : Number(value).toFixed(digits);
}

// Three significant digits, without an exponent for everyday sizes.
export function significant(value) {
  if (value === undefined || value === null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const pad = (n) => String(n).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)}:${pad(s % 60)}`;
  if (s < 48 * 3600) return `${Math.floor(s / 3600)} h ${pad(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} days`;
}

// Such as `5 min 12 s`.
export function spell(seconds) {
  const s = Math.round(seconds);
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)} min ${s % 60} s`;
}

// A caller that no configured scanner claims has no room.
export function roomName(scanner) {
  return scanner.room === "unknown" ? "Scanner" : scanner.room;
}

export function clock(unixSeconds, withSeconds = false) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(withSeconds ? { second: "2-digit" } : {}) };
  return new Date(unixSeconds * 1000).toLocaleTimeString([], options);
}

export function dateTime(unixSeconds) {
  const d = new Date(unixSeconds * 1000);
  const pad = (n) => String(n).padStart(2, "0");
  return `${d.getFullYear()}-${pad(d.getMonth() + 1)}-${pad(d.getDate())} ${pad(d.getHours())}:${pad(d.getMinutes())}`;
}

export function seriesName(entry) {
  return entry.series_number === null || entry.series_number === undefined ? "Series" : `Series ${entry.series_number}`;
}

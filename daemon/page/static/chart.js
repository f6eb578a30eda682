// One individuals chart: points in the order of time, the centre line and the control limits.

import { el, svg } from "./dom.js";
import { VERDICTS, dateTime, significant } from "./words.js";

const W = 520;
const H = 190;
const LEFT = 52;
const RIGHT = 10;
const TOP = 12;
const BOTTOM = 24;

export function chart(trend, metricName, onOpen) {
  const { points, limits } = trend;
  const values = [...points.map((point) => point.value), ...(limits ? [limits.low, limits.high] : [])];
  const pad = (Math.max(...values) - Math.min(...values)) * 0.08 || Math.abs(values[0]) * 0.1 || 1;
  const low = Math.min(...values) - pad;
  const high = Math.max(...values) + pad;
  const x = (i) => (points.length === 1 ? (LEFT + W - RIGHT) / 2 : LEFT + 8 + (i * (W - LEFT - RIGHT - 16)) / (points.length - 1));
  const y = (value) => TOP + ((high - value) * (H - TOP - BOTTOM)) / (high - low);
  const outside = points.filter((point) => point.outside).length;
  const level = (value, name) => svg("line", { class: name, x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) });
  const label = (text, at, attributes) => svg("text", { y: at, ...attributes }, text);
  const spread = limits ? `limits ${significant(limits.low)} to ${significant(limits.high)}` : `no limits below 8 results`;
  const drawing = svg(
    "svg",
    { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${metricName}, ${trend.scanner}, ${trend.protocol}: ${points.length} results, ${spread}, ${outside} outside` },
    limits ? svg("rect", { class: "band", x: LEFT, width: W - LEFT - RIGHT, y: y(limits.high), height: Math.max(0, y(limits.low) - y(limits.high)) }) : null,
    ticks(low, high).map((value) => [svg("line", { class: "grid", x1: LEFT - 4, x2: LEFT, y1: y(value), y2: y(value) }), label(significant(value), y(value) + 4, { x: LEFT - 8, "text-anchor": "end" })]),
    limits ? [level(limits.centre, "centre"), level(limits.low, "limit"), level(limits.high, "limit")] : null,
    svg("polyline", { class: "trace", points: points.map((point, i) => `${x(i).toFixed(1)},${y(point.value).toFixed(1)}`).join(" ") }),
    label(day(points[0].at), H - 6, { x: LEFT }),
    points.length > 1 ? label(day(points.at(-1).at), H - 6, { x: W - RIGHT, "text-anchor": "end" }) : null,
    points.map((point, i) => mark(point, x(i), y(point.value), onOpen)),
  );
  return el(
    "article",
    { class: "trend" },
    el("div", { class: "trend-head" }, el("h3", { class: "trend-name" }, `${trend.scanner} · ${trend.protocol || "no rule"}`), el("p", { class: "trend-limits" }, `${points.length} results · ${spread}${outside ? ` · ${outside} outside` : ""}`)),
    drawing,
  );
}

// Each verdict has its own shape here too.
function mark(point, x, y, onOpen) {
  const { tone, word } = VERDICTS[point.verdict];
  const shapes = {
    pass: () => svg("circle", { class: "shape", r: 4 }),
    review: () => svg("path", { class: "shape", d: "M0-5.5L5.3 4H-5.3z" }),
    rescan: () => svg("rect", { class: "shape", x: -4.5, y: -4.5, width: 9, height: 9, transform: "rotate(45)" }),
    cannot: () => svg("rect", { class: "shape", x: -3.5, y: -3.5, width: 7, height: 7 }),
  };
  return svg(
    "g",
    { class: `point tone-${tone}`, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, onclick: () => onOpen(point.result_id) },
    svg("title", {}, `${dateTime(point.at)} · ${word} · ${significant(point.value)}${point.outside ? " · outside the limits" : ""}`),
    svg("circle", { class: "hit", r: 11 }),
    shapes[tone](),
    point.outside ? svg("circle", { class: "outside", r: 8 }) : null,
  );
}

function day(unixSeconds) {
  return dateTime(unixSeconds).slice(0, 10);
}

// Three to six round values between two ends.
function ticks(low, high) {
  const raw = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

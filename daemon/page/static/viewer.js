// The worst slices in three planes, the uncertainty laid over them. The layers are pictures of their own: fading and changing
// them asks the daemon nothing.

import { el, replace, setText } from "./dom.js";
import { LAYERS } from "./words.js";

const PLANES = { axial: "Axial", coronal: "Coronal", sagittal: "Sagittal" };

export class Viewer {
  // Layers named in `without` are for the other view.
  constructor(without = []) {
    this.without = ["outline", ...without];
    this.layer = "total";
    this.opacity = 55;
    this.outline = false;
    this.main = "";
    this.planes = el("div", { class: "planes" });
    this.chips = el("div", { class: "chips", role: "group", "aria-label": "Uncertainty shown" });
    this.slider = el("input", { type: "range", min: 0, max: 100, step: 5, value: this.opacity, oninput: () => this.fade() });
    this.controls = el("div", { class: "viewer-controls" }, this.chips, el("label", { class: "opacity" }, el("span", {}, "Overlay"), this.slider));
    this.place = el("p", { class: "place" });
    this.none = el("p", { class: "hint" }, "No pictures of this series.");
    this.root = el("div", { class: "viewer" }, this.planes, this.place, this.controls);
  }

  // Show the pictures of a result; the same result again changes nothing.
  show(entry) {
    const key = entry ? `${entry.result_id} ${entry.pictures ? 1 : 0}` : "";
    if (key === this.key) return;
    this.key = key;
    this.entry = entry;
    const pictures = entry?.pictures;
    this.controls.hidden = !pictures;
    this.planes.classList.toggle("empty", !pictures);
    this.place.hidden = true;
    if (!pictures) {
      replace(this.planes, this.none);
      return;
    }
    this.main = pictures.planes[0].plane;
    const dominant = entry.result.dominant_artefact;
    this.layer = dominant && pictures.layers.includes(dominant) ? dominant : "total";
    this.draw();
  }

  draw() {
    const { planes } = this.entry.pictures;
    const ordered = [...planes].sort((a, b) => (b.plane === this.main) - (a.plane === this.main));
    replace(this.planes, ordered.map((plane) => this.plane(plane)));
    const worst = ordered[0].place;
    this.place.hidden = !worst;
    setText(this.place, `Worst ${PLANES[this.main].toLowerCase()} slice: ${worst}`);
    this.drawChips();
    this.fade();
  }

  drawChips() {
    const layers = this.entry.pictures.layers.filter((layer) => !this.without.includes(layer));
    const scores = this.entry.result.artefacts ?? {};
    const chip = (layer) =>
      el(
        "button",
        { type: "button", class: "chip", "aria-pressed": layer === this.layer, onclick: () => this.choose(layer) },
        el("span", {}, LAYERS[layer]),
        scores[layer]?.score !== undefined ? meter(scores[layer].score) : null,
      );
    const outline = el("button", { type: "button", class: "chip outline-chip", "aria-pressed": this.outline, onclick: () => this.toggleOutline() }, LAYERS.outline);
    replace(this.chips, layers.map(chip), this.entry.pictures.layers.includes("outline") ? outline : null);
  }

  plane(plane) {
    const base = `/pictures/${encodeURIComponent(this.entry.result_id)}/${plane.plane}`;
    const isMain = plane.plane === this.main;
    const size = { width: plane.width, height: plane.height };
    const place = plane.place ? `, ${plane.place}` : "";
    const side = (edge) => el("span", { class: `side side-${edge}`, "data-letter": plane.sides[edge] });
    return el(
      "button",
      { type: "button", class: isMain ? "stack main-plane" : "stack", "data-plane": plane.plane, "aria-pressed": isMain, onclick: () => this.enlarge(plane.plane) },
      el("img", { src: `${base}.png`, alt: "", ...size }),
      el("img", { class: "layer", src: `${base}-${this.layer}.png`, alt: "", ...size }),
      el("img", { class: "outline", src: `${base}-outline.png`, alt: "", hidden: !this.outline, ...size }),
      Object.keys(plane.sides).map(side),
      el("span", { class: "plane-name" }, PLANES[plane.plane], el("span", { class: "sr" }, ` slice${place}`)),
    );
  }

  choose(layer) {
    this.layer = layer;
    this.redraw(`.chip[aria-pressed="true"]:not(.outline-chip)`);
  }

  toggleOutline() {
    this.outline = !this.outline;
    this.redraw(".outline-chip");
  }

  enlarge(plane) {
    this.main = plane;
    this.redraw(".main-plane");
  }

  // Draw again and give the focus back to where the person was.
  redraw(selector) {
    this.draw();
    this.root.querySelector(selector)?.focus({ preventScroll: true });
  }

  fade() {
    this.opacity = Number(this.slider.value);
    for (const image of this.planes.querySelectorAll(".layer")) image.style.opacity = this.opacity / 100;
    this.slider.setAttribute("aria-valuetext", `${this.opacity} percent`);
  }
}

// A score from 0 to 1 as a small bar; the number is for screen readers.
export function meter(value) {
  const bar = el("span", { class: "meter-fill" });
  bar.style.inlineSize = `${Math.round(Math.min(Math.max(value, 0), 1) * 100)}%`;
  return el("span", { class: "meter" }, bar, el("span", { class: "sr" }, ` ${value.toFixed(2)}`));
}

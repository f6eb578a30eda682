// The link to the daemon. A page that shows old results as if they were new is the worst thing it can do, so whatever
// happens (daemon gone, daemon stuck, network cut, machine asleep) `onLive(false)` comes within LIMIT_MS of the last sign of life.

import { byId, setText } from "./dom.js";
import { clock } from "./words.js";

const LIMIT_MS = 4500;
const LOOK_MS = 250;
const RETRY_MS = 1000;
const GIVE_UP_MS = 7000;

export class Live {
  constructor(onState) {
    this.onState = onState;
    this.csrf = "";
    this.isLive = false;
    this.skewS = 0;
    this.lastSign = null;
    this.lastSignWall = null;
    this.openedAt = performance.now();
    this.startedAt = performance.now();
    this.source = null;
    this.connect();
    setInterval(() => this.look(), LOOK_MS);
    document.addEventListener("visibilitychange", () => this.look());
    window.addEventListener("pagehide", () => this.source?.close());
  }

  // Seconds on the daemon's clock.
  now() {
    return Date.now() / 1000 + this.skewS;
  }

  connect() {
    this.source?.close();
    this.openedAt = performance.now();
    const source = new EventSource("/api/live");
    this.source = source;
    source.addEventListener("beat", (event) => this.beat(JSON.parse(event.data)));
    source.addEventListener("state", (event) => this.state(JSON.parse(event.data)));
    source.addEventListener("error", () => {
      if (this.source !== source) return;
      source.close();
      this.source = null;
      setTimeout(() => this.retry(), RETRY_MS);
    });
  }

  // Ask plainly first: a stream cannot say that the session has ended.
  async retry() {
    if (this.source) return;
    try {
      const answer = await fetch("/api/state", { cache: "no-store" });
      if (answer.status === 401) {
        location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
        return;
      }
    } catch {
      setTimeout(() => this.retry(), RETRY_MS);
      return;
    }
    if (!this.source) this.connect();
  }

  state(state) {
    const build = document.documentElement.dataset.build;
    if (state.build !== build) {
      location.reload();
      return;
    }
    this.csrf = state.csrf;
    this.beat(state);
    this.onState(state);
  }

  beat(beat) {
    const ageMs = beat.age_s * 1000;
    this.skewS = beat.now - Date.now() / 1000;
    this.lastSign = performance.now() - ageMs;
    this.lastSignWall = Date.now() - ageMs;
    const notReady = byId("notready");
    notReady.hidden = beat.not_ready.length === 0;
    setText(notReady, beat.not_ready.length ? `No verdicts now: ${beat.not_ready.join("; ")}` : "");
    this.look();
  }

  // Two clocks: one stops while the machine sleeps, the other may be set back.
  silenceMs() {
    if (this.lastSign === null) return performance.now() - this.startedAt;
    return Math.max(performance.now() - this.lastSign, Date.now() - this.lastSignWall);
  }

  look() {
    const silence = this.silenceMs();
    const live = this.lastSign !== null && silence <= LIMIT_MS;
    const connecting = this.lastSign === null && silence <= LIMIT_MS;
    if (this.source && silence > GIVE_UP_MS && performance.now() - this.openedAt > GIVE_UP_MS) this.connect();
    this.isLive = live;
    document.body.classList.toggle("stale", !live && !connecting);
    byId("live").dataset.state = live ? "live" : connecting ? "connecting" : "stale";
    setText(byId("live-text"), live ? "Live" : connecting ? "Connecting" : "Not live");
    byId("notlive").hidden = live || connecting;
    const since = this.lastSignWall === null ? "No sign of life so far" : `Last sign of life ${clock(this.lastSignWall / 1000, true)}`;
    setText(byId("notlive-text"), live || connecting ? "" : `${since}. What is shown below may be old: judge by the images. It comes back by itself.`);
    setText(byId("clock"), clock(Date.now() / 1000));
    if (!live && !connecting) document.title = "NOT LIVE – Rescan";
    else if (document.title.startsWith("NOT LIVE")) document.title = "Rescan";
  }

  async post(path, body) {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Rescan-CSRF": this.csrf },
      body: JSON.stringify(body),
    });
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      throw new Error(said.error ?? `The daemon answered ${answer.status}.`);
    }
  }
}

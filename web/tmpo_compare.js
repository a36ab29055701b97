// The view of the "Compare" node: base and LoRA on the two sides of a divider, and below them the tables.

import { markdown } from "./tmpo_markdown.js";
import { addStyle, address, element } from "./tmpo_dom.js";
import { addViews, panel } from "./tmpo_panel.js";

const OUTPUT = "tmpo_compare";
const MIN_HEIGHT = 260;

const CSS = `
.tmpo-compare-frame { flex: 3 1 0; min-height: 90px; margin: 8px; display: grid; place-items: center; container-type: size; }
.tmpo-compare-stage { position: relative; aspect-ratio: var(--aspect); width: min(100cqw, 100cqh * var(--aspect)); }
.tmpo-compare-stage img { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 2px; }
.tmpo-compare-stage img:nth-child(2) { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.tmpo-compare-line { position: absolute; top: 0; bottom: 0; left: calc(var(--at) - 1px); width: 2px; background: #fff;
  box-shadow: 0 0 0 1px rgb(0 0 0 / 55%); pointer-events: none; }
.tmpo-compare-line::after { content: "\\25c2\\2009\\25b8"; position: absolute; top: 50%; left: 50%; padding: 3px 5px;
  transform: translate(-50%, -50%); border-radius: 10px; background: #fff; color: #222; font-size: 11px; line-height: 1;
  white-space: nowrap; box-shadow: 0 0 0 1px rgb(0 0 0 / 55%); }
/* It lies over the pictures and is not seen: a drag anywhere moves the divider. */
.tmpo-compare-stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  appearance: none; touch-action: none; }
.tmpo-compare-stage input::-webkit-slider-thumb { appearance: none; width: 1px; height: 1px; }
.tmpo-compare-stage input::-moz-range-thumb { width: 1px; height: 1px; border: 0; }
.tmpo-compare-stage:has(input:focus-visible) { outline: 2px solid var(--p-primary-color, var(--fg-color)); outline-offset: 2px; }
.tmpo-compare-bar { flex: none; display: grid; grid-template-columns: 1fr auto 1fr; gap: 0 8px; align-items: center;
  max-height: 40%; overflow: auto; padding: 0 10px 6px; border-bottom: 1px solid var(--border-color);
  font-variant-numeric: tabular-nums; }
.tmpo-compare-bar > :nth-child(3n) { text-align: right; }
.tmpo-compare-score { color: var(--descrip-text); text-align: center; }
.tmpo-compare-turn { display: flex; align-items: center; gap: 6px; white-space: nowrap; color: var(--descrip-text); }
.tmpo-compare-turn button { width: 24px; height: 24px; padding: 0; border: 1px solid var(--border-color); border-radius: 4px;
  background: var(--comfy-input-bg); color: var(--input-text); font: 16px/1 system-ui, sans-serif; cursor: pointer; }
.tmpo-compare-turn button:disabled { opacity: 0.4; cursor: default; }
.tmpo-compare-text { flex: 2 1 0; }
`;

class Compare {
  constructor() {
    this.height = MIN_HEIGHT;
    this.pairs = [];
    this.at = 0;
    this.root = panel("tmpo-compare", MIN_HEIGHT);
    this.stage = element("div", "tmpo-compare-stage");
    this.lora = element("img");
    this.base = element("img");
    for (const picture of [this.lora, this.base]) picture.draggable = false;
    this.slider = element("input");
    Object.assign(this.slider, { type: "range", min: 0, max: 100, step: "any", value: 50 });
    this.slider.setAttribute("aria-label", "Divider between base and LoRA");
    this.slider.addEventListener("input", () => this.divide());
    this.slider.addEventListener("keydown", (event) => this.key(event));
    this.stage.append(this.lora, this.base, element("div", "tmpo-compare-line"), this.slider);
    const frame = element("div", "tmpo-compare-frame");
    frame.append(this.stage);
    this.place = element("span");
    this.place.setAttribute("aria-live", "polite");
    this.back = this.button("\u2039", "Previous picture", -1);
    this.next = this.button("\u203a", "Next picture", 1);
    const turn = element("div", "tmpo-compare-turn");
    turn.append(this.back, this.place, this.next);
    this.heads = [element("b", "", "base"), turn, element("b", "", "LoRA")];
    this.bar = element("div", "tmpo-compare-bar tmpo-scroll");
    this.text = element("div", "tmpo-scroll tmpo-compare-text");
    this.parts = [frame, this.bar, this.text];
    this.root.append(element("div", "tmpo-empty", "The pictures appear here when the workflow has run."));
    this.divide();
  }

  button(sign, label, by) {
    const made = element("button", "", sign);
    made.type = "button";
    made.setAttribute("aria-label", label);
    made.addEventListener("click", () => this.turn(by));
    return made;
  }

  show(output) {
    const found = output[OUTPUT]?.[0];
    if (!found) return;
    this.pairs = found.pairs;
    this.stage.style.setProperty("--aspect", found.aspect);
    this.text.replaceChildren(markdown(output.text.join("\n")));
    this.root.replaceChildren(...this.parts);
    this.turn(0);
  }

  /** Goes to another pair; the divider stays. */
  turn(by) {
    this.at = Math.min(Math.max(this.at + by, 0), this.pairs.length - 1);
    const pair = this.pairs[this.at];
    this.base.src = address(pair.base);
    this.lora.src = address(pair.lora);
    this.base.alt = `Picture ${pair.index} of the base`;
    this.lora.alt = `Picture ${pair.index} with the LoRA`;
    this.place.textContent = `picture ${pair.index} (${this.at + 1} of ${this.pairs.length})`;
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === this.pairs.length - 1;
    const number = (value) => element("span", "", value === null ? "n/a" : value.toFixed(3));
    const scores = Object.entries(pair.scores).flatMap(([name, [base, lora]]) => {
      return [number(base), element("span", "tmpo-compare-score", name), number(lora)];
    });
    // A button that is moved would lose the focus.
    if (!this.bar.hasChildNodes()) this.bar.append(...this.heads);
    while (this.bar.children.length > this.heads.length) this.bar.lastChild.remove();
    this.bar.append(...scores);
    // Both are there when the next pair is asked for.
    const after = this.pairs[this.at + 1];
    if (after) for (const ref of [after.base, after.lora]) new Image().src = address(ref);
  }

  divide() {
    const share = Number(this.slider.value);
    this.stage.style.setProperty("--at", `${share}%`);
    this.slider.setAttribute("aria-valuetext", `${Math.round(share)} % base`);
  }

  /** Left and right move the divider, up and down go to another pair. */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowUp: -1, PageUp: -1, ArrowDown: 1, PageDown: 1 }[event.key];
    const step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
    if (by) this.turn(by);
    else if (step) this.slider.value = Number(this.slider.value) + step;
    else if (event.key === "Home" || event.key === "End") this.slider.value = event.key === "Home" ? 0 : 100;
    else return;
    this.divide();
    event.preventDefault();
    event.stopPropagation();
  }
}

addStyle(CSS);
addViews("tmpo.compare", ["TMPO_Compare"], [560, 760], () => new Compare());

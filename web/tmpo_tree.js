// The view in the node "Tree View". It shows the tree from the start (left) to the leaves (right); clicks choose leaves.
// The node computes places and colours. This file only draws them.

import { app } from "../../scripts/app.js";
import { afterClick, choiceRow, chosenIn, written } from "./tmpo_choice.js";
import { element, percent, picture, put } from "./tmpo_dom.js";
import { drawGallery, isGallery, modeSwitch, ordered, orderSwitch } from "./tmpo_gallery.js";
import { addLeafActions } from "./tmpo_leaf_actions.js";
import { CARD, GAP, HEAD } from "./tmpo_tree_style.js";

// Pixels: the height of a leaf's row, the straight part of an edge that carries its label.
const ROW = { min: 34, max: 110 };
const TRUNK = 52;
const MIN_FAN = 30;
const MARGIN = 12;
const PREVIEW = 96;
const SMALLEST = 40;
const DOT = 10;

let views = 0;

/** Whether ComfyUI's colours are dark, by the brightness of a menu. */
function isDark(root) {
  const [r, g, b] = getComputedStyle(root).backgroundColor.match(/[\d.]+/g).map(Number);
  return 0.3 * r + 0.6 * g + 0.1 * b < 128;
}

/** One tree in one node. `write(text)` is called with the choice, see tmpo_choice.js. */
export class TreeView {
  constructor(write) {
    this.write = write;
    this.tree = null;
    this.text = "";
    // The leaf from which Shift chooses.
    this.anchor = null;
    this.active = null;
    // The bar of a run that waits, see tmpo_pause.js.
    this.pause = null;
    this.options = new Map();
    this.id = `tmpo-tree-${views++}`;
    this.root = element("div", "tmpo-tree");
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "listbox");
    this.root.setAttribute("aria-label", "Leaves of the tree");
    this.root.setAttribute("aria-multiselectable", "true");
    this.bar = element("div", "tmpo-tree-bar");
    this.scroll = element("div", "tmpo-tree-scroll");
    this.card = element("div", "tmpo-tree-card");
    this.empty = element("div", "tmpo-tree-empty", "The tree appears here when the workflow has run.");
    this.root.append(this.empty);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("blur", () => this.hover(null));
    this.root.addEventListener("pointerleave", () => this.hover(null));
    this.root.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    // The middle button moves ComfyUI's canvas, also over this view.
    for (const name of ["Down", "Move", "Up"]) {
      this.root.addEventListener(`pointer${name.toLowerCase()}`, (event) => {
        if (name === "Move" ? event.buttons & 4 : event.button === 1) app.canvas[`processMouse${name}`](event);
      });
    }
    addLeafActions(this);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.root);
  }

  /** The leaves in the order in which they are shown: from the top of the tree, or from the gallery's first. */
  get leaves() {
    return ordered(this);
  }

  show(tree) {
    this.tree = tree;
    this.active = null;
    this.anchor = null;
    this.draw();
  }

  clear() {
    this.tree = null;
    this.active = null;
    this.options = new Map();
    this.root.replaceChildren(this.empty);
  }

  /** Marks the leaves of a choice without calling `write`. */
  mark(text) {
    this.text = text;
    if (!this.tree) return;
    for (const [leaf, option] of this.options) {
      const chosen = this.chosen.includes(leaf.index);
      option.classList.toggle("selected", chosen);
      option.setAttribute("aria-selected", String(chosen));
      option.querySelector(".tmpo-tree-mark").textContent = this.signs(leaf);
    }
    this.choice?.update();
  }

  /** The chosen leaves of this tree, as places in the batch, in the order of the choice. */
  get chosen() {
    return chosenIn(this.tree, this.text);
  }

  signs(leaf) {
    return (this.tree.stars.includes(leaf.index) ? "\u2605" : "") + (this.chosen.includes(leaf.index) ? " \u2713" : "");
  }

  colour(node) {
    return node.colours[this.theme] ?? "var(--descrip-text)";
  }

  draw() {
    const tree = this.tree;
    // The view is not on the page, or its node is collapsed.
    if (!tree || !this.root.clientWidth) return;
    this.theme = isDark(this.root) ? "dark" : "light";
    const scrolled = this.scroll.scrollTop;
    this.hover(null);
    // While it is sampled, it is not known which run its leaves will belong to.
    this.choice = tree.growing ? null : choiceRow(this);
    this.root.replaceChildren(...[this.bar, this.pause, this.choice?.row, this.scroll, this.card].filter(Boolean));
    this.drawBar();
    this.scroll.replaceChildren();
    this.across = 1;
    if (isGallery(this)) {
      drawGallery(this);
      this.scroll.scrollTop = scrolled;
      this.mark(this.text);
      return;
    }
    const width = this.scroll.clientWidth;
    const height = this.scroll.clientHeight - HEAD - 2;
    const row = Math.min(Math.max(Math.floor(height / tree.rows), ROW.min), ROW.max);
    const thumb = row - GAP;
    const aspect = Math.min(Math.max(tree.aspect, 0.5), 2);
    const scored = tree.score !== null;
    // Score and mark are always shown, bars only if there is room.
    const bars = scored && width > 460;
    const side = Math.round(thumb * aspect) + (scored ? 61 : 0) + (bars ? 130 : 0) + 34;
    const scrollbar = row * tree.rows > height ? 12 : 0;
    const { lefts, widths, trunk } = this.columns(width - side - scrollbar - 4, row, aspect);
    const leafLeft = lefts.at(-1);
    const boxes = new Map();
    for (const node of tree.nodes) {
      const middle = (node.row + 0.5) * row;
      const w = widths[node.column];
      const h = node.column === 0 ? w : w / aspect;
      boxes.set(node.id, { left: lefts[node.column], top: middle - h / 2, width: w, height: h, middle });
    }
    for (const leaf of tree.leaves) {
      const middle = (leaf.row + 0.5) * row;
      boxes.set(leaf.id, { left: leafLeft, top: middle - thumb / 2, width: side, height: thumb, middle });
    }
    const canvas = element("div", "tmpo-tree-canvas");
    canvas.style.width = `${leafLeft + side}px`;
    canvas.style.height = `${row * tree.rows}px`;
    canvas.append(this.edges(boxes, trunk));
    for (const node of tree.nodes) this.drawNode(canvas, node, boxes.get(node.id), trunk, row);
    this.options = new Map();
    const heaviest = Math.max(...tree.leaves.map((leaf) => leaf.q ?? 0)) || 1;
    for (const leaf of tree.leaves) {
      this.drawLeaf(canvas, leaf, boxes.get(leaf.id), Math.round(thumb * aspect), scored, bars, heaviest);
    }
    this.scroll.append(this.heads(boxes, leafLeft, side, scored, bars, Math.round(thumb * aspect)), canvas);
    this.scroll.scrollTop = scrolled;
    this.mark(this.text);
  }

  /**
   * Where columns begin and how wide their pictures are: as large as the rows allow, then as the room allows. Edges
   * share the rest; their labels are left out before pictures become too small to see.
   */
  columns(room, row, aspect) {
    const { tree } = this;
    const widths = [DOT];
    for (const node of tree.nodes) {
      const height = Math.min(PREVIEW, Math.max(node.leaves * row - 2 * GAP, row - GAP));
      if (node.column) widths[node.column] = height * aspect;
    }
    const inner = widths.length - 1;
    const edges = widths.length;
    const left = room - MARGIN - DOT;
    const allowed = Math.max((left - edges * (TRUNK + MIN_FAN)) / Math.max(inner, 1), SMALLEST * aspect);
    for (let i = 1; i <= inner; i++) widths[i] = Math.min(widths[i], allowed);
    const pictures = widths.slice(1).reduce((sum, width) => sum + width, 0);
    const edge = Math.max((left - pictures) / edges, MIN_FAN + 8);
    const lefts = [MARGIN];
    for (const width of widths) lefts.push(lefts.at(-1) + width + edge);
    return { lefts, widths, trunk: edge < TRUNK + MIN_FAN - 1 ? 8 : TRUNK };
  }

  drawBar() {
    const { tree } = this;
    const many = tree.prompts > 1 ? `, ${tree.prompts} ${tree.group}s` : "";
    const leaves = tree.leaves.length === 1 ? "1 leaf" : `${tree.leaves.length} leaves`;
    this.bar.replaceChildren(
      element("span", "tmpo-tree-title", `${leaves}, ${tree.steps} steps, seed ${tree.seed}${many}`),
      modeSwitch(this),
    );
    if (tree.score === null) return;
    if (isGallery(this)) this.bar.append(orderSwitch(this));
    const ramp = element("span", "tmpo-tree-ramp");
    ramp.style.background = `linear-gradient(to right, ${tree.ramps[this.theme].join(", ")})`;
    this.bar.append(
      element("span", "", tree.score),
      element("span", "tmpo-tree-number", tree.low.toFixed(tree.decimals)),
      ramp,
      element("span", "tmpo-tree-number", tree.high.toFixed(tree.decimals)),
    );
  }

  heads(boxes, leafLeft, side, scored, bars, thumb) {
    const heads = element("div", "tmpo-tree-heads");
    heads.style.width = `${leafLeft + side}px`;
    const add = (text, left, width, align = "left") => {
      const head = element("div", "tmpo-tree-head", text);
      Object.assign(head.style, { left: `${left}px`, width: `${width}px`, textAlign: align });
      heads.append(head);
    };
    const seen = new Set();
    for (const node of this.tree.nodes) {
      if (seen.has(node.column)) continue;
      seen.add(node.column);
      add(node.step === null ? "start" : `step ${node.step}`, boxes.get(node.id).left, 60);
    }
    if (scored) add("score", leafLeft + thumb + 11, 50, "right");
    if (bars) add("q", leafLeft + thumb + 61 + 84, 46, "right");
    return heads;
  }

  /** Each node's trunk in its own colour, then a curve to every child: level at both ends, so none cross. */
  edges(boxes, trunk) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = (d, node) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", d);
      path.style.fill = "none";
      path.style.stroke = this.colour(node);
      path.style.strokeWidth = "2";
      svg.append(path);
    };
    for (const node of this.tree.nodes) {
      const box = boxes.get(node.id);
      line(`M${box.left + box.width},${box.middle}h${trunk}`, node);
    }
    for (const node of [...this.tree.nodes, ...this.tree.leaves]) {
      if (node.parent === null) continue;
      const from = boxes.get(node.parent);
      const to = boxes.get(node.id);
      const x = from.left + from.width + trunk;
      const half = (x + to.left) / 2;
      line(`M${x},${from.middle}C${half},${from.middle} ${half},${to.middle} ${to.left},${to.middle}`, node);
    }
    return svg;
  }

  drawNode(canvas, node, box, trunk, row) {
    const { tree } = this;
    if (node.column === 0 && tree.prompts > 1) {
      const prompt = element("div", "tmpo-tree-prompt", `${tree.group} ${node.prompt + 1}`);
      prompt.style.left = `${MARGIN}px`;
      prompt.style.top = `${(node.row - (node.leaves - 1) / 2 - 0.5) * row - 8}px`;
      canvas.append(prompt);
    }
    if (node.step !== null && trunk === TRUNK) {
      const sigma = element("div", "tmpo-tree-sigma", `\u03c3 ${node.sigma.toFixed(3)}`);
      sigma.style.left = `${box.left + box.width + 4}px`;
      sigma.style.top = `${box.middle - 16}px`;
      canvas.append(sigma);
    }
    const made = element("div", "tmpo-tree-node");
    put(made, box.left, box.top, box.width, box.height);
    made.style.borderColor = this.colour(node);
    if (node.column === 0) {
      made.style.borderRadius = "50%";
      made.style.background = this.colour(node);
    }
    made.dataset.node = node.id;
    if (node.column) made.append(picture(node.image, `Prediction at step ${node.step}`));
    made.addEventListener("pointerenter", () => this.hover(node, made));
    canvas.append(made);
  }

  drawLeaf(canvas, leaf, box, thumb, scored, bars, heaviest) {
    const score = scored ? leaf.scores[this.tree.score] : null;
    const text = score === null ? "n/a" : score.toFixed(this.tree.decimals);
    const option = this.option(leaf, text);
    put(option, box.left, box.top, box.width, box.height);
    const shown = element("div", "tmpo-tree-picture");
    shown.style.width = `${thumb}px`;
    shown.style.height = "100%";
    shown.append(picture(leaf.image, ""));
    option.append(shown);
    if (scored) {
      const swatch = element("div", "tmpo-tree-swatch");
      swatch.style.background = this.colour(leaf);
      option.append(swatch, element("div", "tmpo-tree-score", text));
    }
    if (bars) {
      const track = element("div", "tmpo-tree-bar-track");
      const fill = element("div", "tmpo-tree-bar-fill");
      fill.style.width = `${(100 * leaf.q) / heaviest}%`;
      fill.style.background = this.colour(leaf);
      track.append(fill);
      option.append(track, element("div", "tmpo-tree-q", percent(leaf.q)));
    }
    option.append(element("div", "tmpo-tree-mark"));
    canvas.append(option);
  }

  /** The element of a leaf, whatever shows it. text: its score. */
  option(leaf, text) {
    const option = element("div", "tmpo-tree-leaf");
    option.id = `${this.id}-${leaf.index}`;
    option.dataset.node = leaf.id;
    option.setAttribute("role", "option");
    const parts = [`Leaf ${leaf.index}`];
    if (this.tree.score !== null) parts.push(`${this.tree.score} ${text}`, `weight ${percent(leaf.q)}`);
    if (this.tree.stars.includes(leaf.index)) parts.push("best");
    option.setAttribute("aria-label", parts.join(", "));
    option.addEventListener("pointerenter", () => this.hover(leaf, option));
    option.addEventListener("click", (event) => this.choose(leaf, event));
    this.options.set(leaf, option);
    return option;
  }

  /** A click on a leaf, or its key, see `afterClick`. */
  choose(leaf, keys) {
    if (!this.tree.growing) this.take(afterClick(this, leaf, keys));
  }

  /** Chooses these leaves. */
  take(leaves) {
    const text = written(this.tree, leaves);
    this.mark(text);
    this.write(text);
  }

  /** Shows a node large, on the side where it does not hide it; null hides the card. */
  hover(node, target) {
    for (const option of this.options.values()) option.classList.remove("active");
    this.card.style.display = "none";
    this.active = node !== null && this.options.has(node) ? node : null;
    this.root.removeAttribute("aria-activedescendant");
    if (node === null) return;
    if (this.active) {
      target.classList.add("active");
      this.root.setAttribute("aria-activedescendant", target.id);
      // A card would cover the other pictures of the gallery, which are large already.
      if (isGallery(this)) return;
    }
    this.card.replaceChildren();
    if (node.image) this.card.append(picture(node.image, ""));
    const list = element("dl");
    for (const [name, value] of this.facts(node)) list.append(element("dt", "", name), element("dd", "", value));
    this.card.append(list);
    this.card.style.display = "flex";
    const outer = this.root.getBoundingClientRect();
    const inner = target.getBoundingClientRect();
    // ComfyUI scales the view with its canvas. A rectangle on the page is scaled, a style is not.
    const scale = outer.width / this.root.offsetWidth || 1;
    const left = (inner.left - outer.left) / scale;
    const right = (inner.right - outer.left) / scale;
    const middle = ((inner.top + inner.bottom) / 2 - outer.top) / scale;
    const fits = right + CARD + GAP < this.root.clientWidth;
    const top = middle - this.card.offsetHeight / 2;
    this.card.style.left = `${Math.max(fits ? right + GAP : left - CARD - GAP, GAP)}px`;
    this.card.style.top = `${Math.max(Math.min(top, this.root.clientHeight - this.card.offsetHeight - GAP), GAP)}px`;
  }

  facts(node) {
    const { tree } = this;
    const number = (value) => (value === null ? "n/a" : value.toFixed(tree.decimals));
    const facts = [];
    if (node.scores) {
      facts.push(["leaf", String(node.index)]);
      for (const [name, value] of Object.entries(node.scores)) facts.push([name, number(value)]);
      if (node.q !== null) facts.push(["q", percent(node.q)]);
    } else {
      if (node.step !== null) facts.push(["step", String(node.step)], ["\u03c3", node.sigma.toFixed(3)]);
      facts.push(["leaves", String(node.leaves)]);
      if (tree.score !== null) facts.push([`mean ${tree.score}`, number(node.mean)]);
    }
    if (tree.prompts > 1) facts.push([tree.group, String(node.prompt + 1)]);
    facts.push(["seed", tree.seed]);
    if (node.path.length) facts.push(["path", node.path.join(" \u2192 ")]);
    return facts;
  }

  key(event) {
    if (!this.tree || event.ctrlKey || event.metaKey || event.altKey) return;
    // A button's keys are not the tree's.
    if (event.target.closest("button")) return;
    const last = this.leaves.length - 1;
    const known = this.active ?? this.leaves.find((leaf) => leaf.index === this.chosen[0]);
    const at = known ? this.leaves.indexOf(known) : -1;
    const moves = {
      ArrowDown: Math.min(at + this.across, last),
      ArrowRight: Math.min(at + 1, last),
      ArrowUp: Math.max(at - this.across, 0),
      ArrowLeft: Math.max(at - 1, 0),
      Home: 0,
      End: last,
    };
    if (event.key in moves) {
      const leaf = this.leaves[moves[event.key]];
      const option = this.options.get(leaf);
      // scrollIntoView would also move ComfyUI's page.
      const { offsetTop, offsetHeight } = option;
      const seen = this.scroll.clientHeight - HEAD;
      const { scrollTop } = this.scroll;
      this.scroll.scrollTop = Math.min(Math.max(scrollTop, offsetTop + offsetHeight - seen), offsetTop);
      this.hover(leaf, option);
      this.anchor ??= known ?? leaf;
      if (event.shiftKey) this.choose(leaf, event);
    } else if (event.key === "Enter" && known) {
      this.choose(known, event);
    } else if (event.key === " " && known) {
      this.choose(known, { ctrlKey: true });
    } else if (event.key === "Escape" && this.active) {
      this.hover(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  /** Scrolls where there is something to scroll; otherwise, and with Ctrl, the canvas zooms as it does elsewhere. */
  wheel(event) {
    // Nodes 2.0 would pass it on to the canvas as well.
    event.stopPropagation();
    const { scrollHeight, clientHeight } = this.scroll;
    if (!event.ctrlKey && scrollHeight > clientHeight) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  }
}

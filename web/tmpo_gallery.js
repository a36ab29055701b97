// The gallery of a Tree View: its leaves as a grid, as large as the room allows, in place of the tree.
// A leaf's element is one of `view.options`, as in the tree: choosing, marks and keys work the same.

import { addStyle, element, picture, put } from "./tmpo_dom.js";

const PROPERTY = "tmpo_view";
const ORDER = "tmpo_best_first";
const GAP = 6;
const CAPTION = 20;
// Pixels: narrower pictures are made SCROLLED wide and scroll. The small pictures that the node saves are SMALL wide.
const SMALLEST = 64;
const SCROLLED = 96;
const SMALL = 256;

addStyle(`
.tmpo-tree-bar .tmpo-tree-title { flex: 1 1 40px; min-width: 40px; }
.tmpo-tree-bar .tmpo-tree-ramp { flex: 0 1 90px; }
.tmpo-tree-modes { display: flex; flex: none; border: 1px solid var(--border-color); border-radius: 4px; overflow: hidden; }
.tmpo-tree-modes button { all: unset; box-sizing: border-box; padding: 1px 8px; cursor: pointer; color: var(--descrip-text); }
.tmpo-tree-modes button[aria-pressed=true] { background: var(--comfy-input-bg); color: var(--fg-color); }
.tmpo-tree-modes button:focus-visible { outline: 1px solid var(--p-primary-color, var(--fg-color)); outline-offset: -1px; }
.tmpo-tree-leaf.tmpo-gallery-leaf { flex-direction: column; align-items: stretch; }
.tmpo-gallery-leaf .tmpo-tree-picture { flex: 1; min-height: 0; }
.tmpo-gallery-caption { flex: none; display: flex; align-items: center; gap: 5px; height: ${CAPTION}px; padding: 0 2px; }
.tmpo-gallery-caption .tmpo-tree-swatch { height: 10px; align-self: center; margin: 0; }
.tmpo-gallery-caption .tmpo-tree-score { width: auto; flex: 1; text-align: left; overflow: hidden; }
.tmpo-gallery-leaf .tmpo-tree-mark { position: absolute; top: 4px; right: 4px; width: auto; padding: 0 5px; border-radius: 9px;
  background: rgb(0 0 0 / 70%); color: #fff; }
.tmpo-gallery-leaf .tmpo-tree-mark:empty { display: none; }
`);

export function isGallery(view) {
  return view.node?.properties?.[PROPERTY] === "gallery";
}

/** The switch between tree and gallery. The mode is saved with the workflow. */
export function modeSwitch(view) {
  const modes = element("div", "tmpo-tree-modes");
  for (const mode of ["tree", "gallery"]) {
    const button = element("button", "", mode === "tree" ? "Tree" : "Gallery");
    button.type = "button";
    button.title = mode === "tree" ? "Show how the leaves branched" : "Show the leaves as large as possible";
    button.setAttribute("aria-pressed", String(isGallery(view) === (mode === "gallery")));
    button.addEventListener("click", () => {
      view.node.properties[PROPERTY] = mode;
      view.draw();
      view.root.focus({ preventScroll: true });
    });
    modes.append(button);
  }
  return modes;
}

/** The switch of the gallery between the order of the tree and that of the scores. It is saved with the workflow. */
export function orderSwitch(view) {
  const order = element("div", "tmpo-tree-modes");
  const button = element("button", "", "Best first");
  button.type = "button";
  button.title = "Order by score in place of the order of the tree";
  button.setAttribute("aria-pressed", String(Boolean(view.node.properties[ORDER])));
  button.addEventListener("click", () => {
    view.node.properties[ORDER] = !view.node.properties[ORDER];
    view.draw();
    view.root.focus({ preventScroll: true });
  });
  order.append(button);
  return order;
}

/** The leaves in the order in which they are shown. Equal scores keep the order of the tree, leaves without one come last. */
export function ordered(view) {
  const { leaves, score } = view.tree;
  if (score === null || !isGallery(view) || !view.node.properties[ORDER]) return leaves;
  const value = (leaf) => leaf.scores[score] ?? -Infinity;
  return [...leaves].sort((a, b) => (value(a) === value(b) ? 0 : value(b) - value(a)));
}

/** The number of columns and the width of a picture, for the largest pictures that need no scrolling, if these are not tiny. */
export function grid(count, width, height, aspect) {
  let best = { columns: 1, picture: 0 };
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const across = (width - GAP) / columns - GAP;
    const down = ((height - GAP) / rows - GAP - CAPTION) * aspect;
    const picture = Math.floor(Math.min(across, down));
    if (picture > best.picture) best = { columns, picture };
  }
  if (best.picture >= SMALLEST) return best;
  const columns = Math.max(Math.floor((width - GAP) / (SCROLLED + GAP)), 1);
  return { columns, picture: Math.floor((width - GAP) / columns - GAP) };
}

/** Draws all leaves into `view.scroll` and registers them in `view.options`. */
export function drawGallery(view) {
  const { tree, scroll } = view;
  const aspect = Math.min(Math.max(tree.aspect, 0.5), 2);
  // A scrollbar takes room, whether it is needed or not.
  const { columns, picture: width } = grid(tree.leaves.length, scroll.clientWidth - 12, scroll.clientHeight, aspect);
  const height = Math.round(width / aspect);
  const left = Math.max((scroll.clientWidth - columns * (width + GAP) + GAP) / 2, GAP);
  const canvas = element("div", "tmpo-tree-canvas");
  canvas.style.height = `${Math.ceil(tree.leaves.length / columns) * (height + CAPTION + GAP) + GAP}px`;
  view.across = columns;
  view.options = new Map();
  view.leaves.forEach((leaf, place) => {
    const score = tree.score === null ? null : leaf.scores[tree.score];
    const text = score === null ? "n/a" : score.toFixed(tree.decimals);
    const option = view.option(leaf, text);
    option.classList.add("tmpo-gallery-leaf");
    const row = Math.floor(place / columns);
    put(option, left + (place % columns) * (width + GAP), GAP + row * (height + CAPTION + GAP), width, height + CAPTION);
    const shown = element("div", "tmpo-tree-picture");
    shown.append(picture(width * devicePixelRatio > SMALL ? (leaf.full ?? leaf.image) : leaf.image, ""));
    const caption = element("div", "tmpo-gallery-caption");
    if (tree.score !== null) {
      const swatch = element("div", "tmpo-tree-swatch");
      swatch.style.background = view.colour(leaf);
      caption.append(swatch);
    }
    caption.append(element("div", "tmpo-tree-score", tree.score === null ? String(leaf.index) : text));
    option.append(shown, caption, element("div", "tmpo-tree-mark"));
    canvas.append(option);
  });
  scroll.append(canvas);
}

// One leaf of a Tree View over the whole page, at full resolution. Arrows go through the leaves in the order of the view.

import { addStyle, address, element, percent } from "./tmpo_dom.js";

addStyle(`
.tmpo-lightbox { box-sizing: border-box; width: 100vw; height: 100vh; max-width: none; max-height: none; margin: 0; padding: 0;
  border: 0; background: rgb(10 10 12 / 96%); color: #eee; font: 14px/1.4 system-ui, sans-serif; outline: none; }
.tmpo-lightbox[open] { display: flex; flex-direction: column; }
.tmpo-lightbox::backdrop { background: none; }
.tmpo-lightbox-stage { flex: 1; min-height: 0; display: flex; align-items: center; justify-content: space-between; gap: 8px;
  padding: 16px 8px 0; }
.tmpo-lightbox img { flex: 1; min-width: 0; height: 100%; object-fit: contain; }
.tmpo-lightbox img.tiny { image-rendering: pixelated; }
.tmpo-lightbox button { all: unset; flex: none; box-sizing: border-box; padding: 8px 14px; border-radius: 6px; cursor: pointer;
  color: #bbb; font-size: 22px; line-height: 1; }
.tmpo-lightbox button:hover { background: rgb(255 255 255 / 12%); color: #fff; }
.tmpo-lightbox button:focus-visible { outline: 1px solid #fff; }
.tmpo-lightbox .tmpo-lightbox-close { position: absolute; top: 8px; right: 8px; z-index: 1; }
.tmpo-lightbox .tmpo-lightbox-pick { position: absolute; top: 8px; right: 60px; z-index: 1; }
.tmpo-lightbox .tmpo-lightbox-pick[aria-pressed=true] { color: #7fd6a8; }
.tmpo-lightbox-caption { flex: none; display: flex; flex-wrap: wrap; justify-content: center; gap: 2px 18px; padding: 10px 16px 14px;
  font-variant-numeric: tabular-nums; }
.tmpo-lightbox-caption span:first-child { color: #fff; font-weight: 600; }
.tmpo-lightbox-caption b { font-weight: 400; color: #999; }
`);

// Pixels.
const SWIPE = 50;

/** What is known of a leaf, as pairs of name and text. */
function facts(tree, leaf) {
  const found = Object.entries(leaf.scores).map(([name, value]) => [
    name,
    value === null ? "n/a" : value.toFixed(name === tree.score ? tree.decimals : 3),
  ]);
  if (leaf.q !== null) found.push(["q", percent(leaf.q)]);
  if (tree.prompts > 1) found.push([tree.group, String(leaf.prompt + 1)]);
  found.push(["seed", tree.seed], ["path", leaf.path.join(" \u2192 ")]);
  return found;
}

/** Opens a leaf. It closes with Escape, its button, or a click beside the picture; focus returns to the view. */
export function openLightbox(view, first) {
  const { tree } = view;
  const { leaves } = view;
  let at = leaves.indexOf(first);
  const dialog = element("dialog", "tmpo-lightbox");
  dialog.tabIndex = -1;
  dialog.setAttribute("aria-label", "A leaf of the tree");
  const stage = element("div", "tmpo-lightbox-stage");
  const shown = element("img");
  const caption = element("div", "tmpo-lightbox-caption");
  const button = (text, label, action) => {
    const made = element("button", "", text);
    made.type = "button";
    made.title = label;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", action);
    return made;
  };

  function show(place) {
    at = Math.min(Math.max(place, 0), leaves.length - 1);
    const leaf = leaves[at];
    shown.src = address(leaf.full ?? leaf.image);
    shown.alt = `Leaf ${leaf.index}`;
    pick.setAttribute("aria-pressed", String(view.tree === tree && view.chosen.includes(leaf.index)));
    const title = element("span", "", `leaf ${leaf.index} ${view.signs(leaf)}`.trim());
    caption.replaceChildren(title, element("span", "", `${at + 1} of ${leaves.length}`));
    for (const [name, text] of facts(tree, leaf)) {
      const fact = element("span");
      fact.append(element("b", "", `${name} `), text);
      caption.append(fact);
    }
    // The neighbours, so that the next step shows at once.
    for (const next of [leaves[at - 1], leaves[at + 1]]) {
      if (next) new Image().src = address(next.full ?? next.image);
    }
  }

  shown.addEventListener("load", () => {
    // A picture of a few pixels is shown as what it is.
    shown.classList.toggle("tiny", shown.naturalWidth * 4 < shown.clientWidth && shown.naturalHeight * 4 < shown.clientHeight);
  });
  // Temporary files go when ComfyUI starts again.
  shown.addEventListener("error", () => caption.append(element("span", "", "The picture is gone. Run the workflow again.")));
  dialog.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: leaves.length - 1,
    };
    // ComfyUI has shortcuts on single keys.
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) show(moves[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && event.target === dialog) {
      // A run may have ended meanwhile: the same place in its tree is another leaf. As in the tree, Space adds or removes it.
      if (view.tree === tree) view.choose(leaves[at], { ctrlKey: event.key === " " });
      show(at);
    } else return;
    event.preventDefault();
  });
  // A finger pages by a swipe, and picks by the button. Two fingers zoom, and then one moves what is enlarged.
  let from = null;
  const enlarged = () => (window.visualViewport?.scale ?? 1) > 1.01;
  const allow = () => (dialog.style.touchAction = enlarged() ? "auto" : "pan-y pinch-zoom");
  allow();
  window.visualViewport?.addEventListener("resize", allow);
  dialog.addEventListener("pointerdown", (event) => {
    from = event.pointerType === "touch" && event.isPrimary && !enlarged() ? event.clientX : null;
  });
  dialog.addEventListener("pointercancel", () => (from = null));
  dialog.addEventListener("pointerup", (event) => {
    const moved = from === null ? 0 : event.clientX - from;
    from = null;
    if (Math.abs(moved) > SWIPE) show(at - Math.sign(moved));
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target === stage) dialog.close();
  });
  dialog.addEventListener("close", () => {
    window.visualViewport?.removeEventListener("resize", allow);
    dialog.remove();
    view.root.focus({ preventScroll: true });
    const option = view.options.get(leaves[at]);
    if (option) view.hover(leaves[at], option);
  });
  const pick = button("\u2713", "Add this leaf to the choice or remove it (Space)", () => {
    if (view.tree === tree) view.choose(leaves[at], { ctrlKey: true });
    show(at);
    dialog.focus();
  });
  pick.className = "tmpo-lightbox-pick";
  const close = button("\u2715", "Close (Escape)", () => dialog.close());
  close.className = "tmpo-lightbox-close";
  stage.append(
    button("\u2039", "Previous leaf", () => show(at - 1)),
    shown,
    button("\u203a", "Next leaf", () => show(at + 1)),
  );
  dialog.append(stage, caption, pick, close);
  document.body.append(dialog);
  show(at);
  dialog.showModal();
  dialog.focus();
}

// The choice of leaves in a Tree View. It is the text of the widget `selected`: places of leaves, and after @ the tree they
// belong to, as in `12, 3 @ 4f2a91c05b1e77aa`. `nodes/choice.py` reads the same text.

import { addStyle, element } from "./tmpo_dom.js";

addStyle(`
.tmpo-tree-choice { flex: none; display: flex; align-items: center; gap: 6px; padding: 4px 12px; white-space: nowrap;
  overflow: auto hidden; scrollbar-width: none; border-bottom: 1px solid var(--border-color); }
.tmpo-tree-choice span { flex: 1 1 60px; min-width: 60px; overflow: hidden; text-overflow: ellipsis; color: var(--descrip-text); }
.tmpo-tree-choice button { all: unset; flex: none; box-sizing: border-box; padding: 1px 8px; cursor: pointer;
  border: 1px solid var(--border-color); border-radius: 4px; }
.tmpo-tree-choice button:hover { background: color-mix(in srgb, var(--fg-color) 12%, transparent); }
.tmpo-tree-choice button:focus-visible { outline: 1px solid var(--p-primary-color, var(--fg-color)); }
.tmpo-tree-choice button:disabled { opacity: 0.4; cursor: default; background: none; }
`);

/** The leaves in a text and the tree's fingerprint, "" for any tree. A text that is no choice has no leaves. */
function parse(text) {
  const [places, tree = ""] = String(text).split("@");
  const leaves = places.split(",").filter((word) => /^\s*\d+\s*$/.test(word)).map(Number);
  return { leaves: [...new Set(leaves)], tree: tree.trim() };
}

/** The leaves that a text chooses in a tree, as places in the batch. None if it was written for another tree. */
export function chosenIn(tree, text) {
  const choice = parse(text);
  const fits = !choice.tree || tree.fingerprints?.includes(choice.tree);
  return fits && choice.leaves.every((leaf) => leaf < tree.leaves.length) ? choice.leaves : [];
}

/** The choice of these leaves as a text. */
export function written(tree, leaves) {
  return leaves.length ? `${leaves.join(", ")} @ ${tree.fingerprints[0]}` : "";
}

/**
 * What a click on a leaf, or its key, makes of the choice. Alone it chooses that leaf, or cancels the choice if it is the
 * only one. With Ctrl or Cmd, and with a finger, which has no keys, it adds or removes the leaf. With Shift it chooses all from
 * the last one clicked to this.
 */
export function afterClick(view, leaf, { ctrlKey = false, metaKey = false, shiftKey = false, pointerType = "" } = {}) {
  const { chosen, leaves } = view;
  if (shiftKey && view.anchor) {
    const ends = [leaves.indexOf(view.anchor), leaves.indexOf(leaf)].sort((a, b) => a - b);
    const range = leaves.slice(ends[0], ends[1] + 1).map((each) => each.index);
    return ends[0] === leaves.indexOf(leaf) ? range.reverse() : range;
  }
  view.anchor = leaf;
  if (!ctrlKey && !metaKey && pointerType !== "touch") return chosen.length === 1 && chosen[0] === leaf.index ? [] : [leaf.index];
  return chosen.includes(leaf.index) ? chosen.filter((index) => index !== leaf.index) : [...chosen, leaf.index];
}

function summary(view) {
  const { chosen, tree } = view;
  if (chosen.length) return chosen.length === 1 ? `leaf ${chosen[0]} chosen` : `${chosen.length} leaves chosen`;
  if (parse(view.text).leaves.length) return "Chosen in another tree. Here the best leaf counts.";
  if (tree.score === null) return "none chosen: the first leaf counts";
  return tree.low === tree.high ? "none chosen, all scores are equal" : "none chosen: the best leaf counts";
}

/** The row with what is chosen, and the buttons that choose several leaves. It is drawn once for each tree. */
export function choiceRow(view) {
  const row = element("div", "tmpo-tree-choice");
  const said = element("span");
  said.setAttribute("aria-live", "polite");
  row.append(said);
  const add = (name, tip, leaves) => {
    const button = element("button", "", name);
    button.type = "button";
    button.title = tip;
    button.addEventListener("click", () => view.take(leaves));
    row.append(button);
    return button;
  };
  for (const { name, tip, leaves } of view.tree.suggestions) add(name, tip, leaves);
  const clear = add("clear", "Choose no leaf: the best one counts", []);
  return {
    row,
    update() {
      said.textContent = said.title = summary(view);
      clear.disabled = !String(view.text);
    },
  };
}

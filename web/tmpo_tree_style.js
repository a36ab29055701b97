// How a Tree View looks, but for what its parts bring along.

import { addStyle } from "./tmpo_dom.js";

// Pixels: the heads of the columns, the width of a card, the gap around it, and the smallest height of the view.
export const HEAD = 22;
export const CARD = 208;
export const GAP = 6;
export const MIN_HEIGHT = 160;

addStyle(`
/* In Nodes 2.0 the height of the content would force the height of the node. Size containment keeps it out. */
.tmpo-tree { contain: size; min-height: ${MIN_HEIGHT}px; position: relative; display: flex; flex-direction: column;
  box-sizing: border-box; overflow: hidden;
  border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-menu-bg); color: var(--fg-color);
  font: 12px/1.3 system-ui, sans-serif; user-select: none; outline: none; }
.tmpo-tree:focus-visible { border-color: var(--p-primary-color, var(--fg-color)); }
.tmpo-tree-bar { display: flex; gap: 8px; align-items: center; padding: 6px 12px; white-space: nowrap;
  border-bottom: 1px solid var(--border-color); }
.tmpo-tree-title { flex: 1; overflow: hidden; text-overflow: ellipsis; }
.tmpo-tree-ramp { width: 90px; height: 10px; border-radius: 2px; flex: none; }
.tmpo-tree-number, .tmpo-tree-leaf { font-variant-numeric: tabular-nums; }
.tmpo-tree-scroll { flex: 1; min-height: 0; overflow: auto; position: relative; scrollbar-width: thin;
  scrollbar-color: var(--descrip-text) transparent; }
.tmpo-tree-heads { position: sticky; top: 0; z-index: 2; height: ${HEAD}px; background: var(--comfy-menu-bg); }
.tmpo-tree-head, .tmpo-tree-sigma, .tmpo-tree-prompt { position: absolute; white-space: nowrap; }
.tmpo-tree-head { top: 3px; overflow: hidden; text-overflow: ellipsis; }
.tmpo-tree-head, .tmpo-tree-sigma { color: var(--descrip-text); font-size: 11px; }
.tmpo-tree-sigma { line-height: 14px; pointer-events: none; }
.tmpo-tree-canvas { position: relative; }
.tmpo-tree-canvas svg { position: absolute; inset: 0; overflow: visible; pointer-events: none; }
.tmpo-tree-node { position: absolute; box-sizing: border-box; border: 1px solid; border-radius: 3px; overflow: hidden;
  background: var(--comfy-input-bg); }
.tmpo-tree-node img, .tmpo-tree-picture img { width: 100%; height: 100%; object-fit: contain; display: block; }
.tmpo-tree-leaf { position: absolute; display: flex; align-items: center; cursor: pointer; border-radius: 4px; }
.tmpo-tree-leaf.active { background: color-mix(in srgb, var(--fg-color) 12%, transparent); }
.tmpo-tree-picture { flex: none; border-radius: 2px; overflow: hidden; background: var(--comfy-input-bg); }
.tmpo-tree-leaf.selected { background: color-mix(in srgb, var(--fg-color) 18%, transparent); }
.tmpo-tree-leaf.selected .tmpo-tree-picture { outline: 2px solid var(--fg-color); outline-offset: 1px; }
.tmpo-tree-swatch { flex: none; width: 6px; align-self: stretch; margin: 0 0 0 5px; border-radius: 1px; }
.tmpo-tree-score { flex: none; width: 50px; text-align: right; }
.tmpo-tree-bar-track { flex: 1; height: 8px; margin: 0 8px 0 10px; }
.tmpo-tree-bar-fill { height: 100%; border-radius: 1px; }
.tmpo-tree-q { flex: none; width: 46px; text-align: right; }
.tmpo-tree-mark { flex: none; width: 34px; text-align: right; padding-right: 4px; box-sizing: border-box; }
.tmpo-tree-card { position: absolute; z-index: 3; width: ${CARD}px; padding: 8px; box-sizing: border-box; display: none;
  pointer-events: none; border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-menu-bg);
  box-shadow: 0 4px 16px rgb(0 0 0 / 40%); flex-direction: column; gap: 6px; max-height: calc(100% - ${2 * GAP}px); }
.tmpo-tree-card img { width: 100%; height: ${CARD - 18}px; min-height: 0; object-fit: contain; }
.tmpo-tree-card dl { flex: none; display: grid; grid-template-columns: auto 1fr; gap: 1px 10px; margin: 0; }
.tmpo-tree-card dt { color: var(--descrip-text); }
.tmpo-tree-card dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.tmpo-tree-empty { margin: auto; padding: 12px; color: var(--descrip-text); text-align: center; }
`);

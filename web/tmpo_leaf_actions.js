// What a leaf of a Tree View does besides being chosen: a double click opens it large, a right click shows a menu.

import { address, notify } from "./tmpo_dom.js";
import { openLightbox } from "./tmpo_lightbox.js";
import { regrow } from "./tmpo_regrow.js";
import { resample } from "./tmpo_resample.js";

function named(view, leaf) {
  return `seed ${view.tree.seed}, path ${leaf.path.join(", ")}`;
}

async function file(leaf) {
  const reply = await fetch(address(leaf.full ?? leaf.image));
  if (!reply.ok) throw new Error("it was a temporary file: run the workflow again");
  return reply.blob();
}

/** With a link to the file itself, ComfyUI's name for it would be taken. */
async function save(view, leaf) {
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await file(leaf));
    link.download = `seed_${view.tree.seed}_path_${leaf.path.join("-")}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    notify("error", "The picture was not saved", error.message);
  }
}

/** Browsers let pages copy only over https or on this machine. */
async function copy(what, write) {
  try {
    await write();
    notify("success", `Copied: ${what}`);
  } catch (error) {
    const fix = window.isSecureContext ? "" : "The browser allows it only on localhost or over https. ";
    notify("error", `Not copied: ${what}`, fix + error.message);
  }
}

function showMenu(view, leaf, event) {
  const items = [
    { content: "Open large", callback: () => openLightbox(view, leaf) },
    { content: "Open in a tab", callback: () => window.open(address(leaf.full ?? leaf.image), "_blank") },
    { content: "Save picture", callback: () => void save(view, leaf) },
    {
      content: "Copy picture",
      callback: () => void copy("picture", async () =>
        // Safari refuses to copy once something was waited for: the item waits itself.
        navigator.clipboard.write([new ClipboardItem({ "image/png": file(leaf) })])),
    },
    {
      content: "Copy seed and path",
      callback: () => void copy(named(view, leaf), () => navigator.clipboard.writeText(named(view, leaf))),
    },
    null,
    { content: "Re-sample only this leaf", callback: () => resample(view, leaf) },
    { content: "Grow variations of this leaf", callback: () => regrow(view, leaf) },
  ];
  new window.LiteGraph.ContextMenu(items, { event, title: `Leaf ${leaf.index}` });
}

/** Adds both to a view. Leaves are found by their elements, whichever mode has drawn them. */
export function addLeafActions(view) {
  const leafAt = (target) => {
    const option = target.closest?.(".tmpo-tree-leaf");
    return option && [...view.options].find(([, other]) => other === option)?.[0];
  };
  const selected = () => view.node.widgets.find((widget) => widget.name === "selected");
  let before;
  view.root.addEventListener("click", (event) => {
    if (event.detail === 1) before = selected().value;
  }, { capture: true });
  view.root.addEventListener("dblclick", (event) => {
    const leaf = leafAt(event.target);
    if (!leaf || view.tree.growing) return;
    event.preventDefault();
    event.stopPropagation();
    // Its two clicks have changed the choice.
    if (selected().value !== before) {
      selected().value = before;
      selected().callback?.(before);
    }
    openLightbox(view, leaf);
  });
  view.root.addEventListener("contextmenu", (event) => {
    const leaf = leafAt(event.target);
    if (!leaf || view.tree.growing) return;
    event.preventDefault();
    event.stopPropagation();
    showMenu(view, leaf, event);
  });
  view.root.addEventListener("keydown", (event) => {
    if (event.key !== "o" || event.target.closest("button") || event.ctrlKey || event.metaKey || event.altKey || !view.active || view.tree.growing) return;
    event.preventDefault();
    event.stopPropagation();
    openLightbox(view, view.active);
  });
}


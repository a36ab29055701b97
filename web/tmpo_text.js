// Shows the text output of nodes that describe what they did, below their widgets.

import { markdown } from "./tmpo_markdown.js";
import { addStyle, element } from "./tmpo_dom.js";
import { addViews, panel } from "./tmpo_panel.js";

const MIN_HEIGHT = 90;

const CSS = `
.tmpo-facts { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 2px 10px; padding: 6px 10px; user-select: text;
  cursor: text; }
.tmpo-facts dt { color: var(--descrip-text); }
.tmpo-facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.tmpo-facts .whole { grid-column: 1 / -1; }
`;

/** Lines of a name and a value, at least two spaces or a colon apart, as two columns. Other lines fill both. */
function facts(text) {
  const made = element("dl", "tmpo-facts");
  made.style.margin = "0";
  for (const line of text.split("\n")) {
    const pair = line.match(/^(.*?) {2,}(.*)$/) ?? line.match(/^([^:]+): (.*)$/);
    if (pair) made.append(element("dt", "", pair[1]), element("dd", "", pair[2]));
    else made.append(element("dd", "whole", line));
  }
  return made;
}

function textView(render) {
  const root = panel("tmpo-text", MIN_HEIGHT);
  const scroll = element("div", "tmpo-scroll");
  root.append(scroll);
  const show = (output) => output.text && scroll.replaceChildren(render(output.text.join("\n")));
  return { root, height: MIN_HEIGHT, show };
}

addStyle(CSS);
addViews("tmpo.facts", ["TMPO_LoadLora", "TMPO_TrainingMonitor"], [340, 340], () => textView(facts));
addViews("tmpo.report", ["TMPO_Train"], [400, 900], () => textView(markdown));

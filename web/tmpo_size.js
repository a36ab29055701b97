// Below the inputs of the tree samplers: how many pictures the tree will have, and what the shared steps save. What these
// inputs cannot be, the line says as well, before anything is queued.

import { app } from "../../scripts/app.js";
import { addStyle, element } from "./tmpo_dom.js";

const NODES = ["TMPO_TreeSampler", "TMPO_TreeSamplerAdvanced", "TMPO_TreeSamplerSelect"];
const NAME = "tmpo_size";
const HEIGHT = 22;
// `check_leaves` in nodes/tree_sampler.py.
const MOST_LEAVES = 1024;

addStyle(`
.tmpo-size { box-sizing: border-box; height: ${HEIGHT}px; padding: 2px 12px; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; font: 12px/18px system-ui, sans-serif; color: var(--descrip-text); }
`);

/** Increasing whole numbers from 1, or null. */
function branchSteps(text) {
  const words = String(text).replaceAll(",", " ").split(/\s+/).filter(Boolean);
  const steps = words.map(Number);
  const rising = steps.every((step, i) => Number.isInteger(step) && step > (i ? steps[i - 1] : 0));
  return words.length && rising ? steps : null;
}

/** The nodes of a tree, each of which costs one call of the model. See `TreePlan.widths`. */
function evaluations(branches, branching, steps) {
  let sum = 0;
  for (let step = 1, width = 1; step <= steps; step++) {
    // A branch at step 1 means independent seeds.
    if (step === 1 && branches.includes(1)) width = branching;
    sum += width;
    if (step > 1 && branches.includes(step)) width *= branching;
  }
  return sum;
}

/** What the line says of these inputs. `steps` is undefined where the noise levels come over a link. A node is 30 letters wide. */
function describe(text, branching, steps) {
  const branches = branchSteps(text);
  if (!branches) return "branch_steps: write e.g. 1, 3, 5";
  if (steps && branches.at(-1) > steps) return `branch step ${branches.at(-1)} is beyond ${steps} steps`;
  const pictures = branching ** branches.length;
  if (pictures > MOST_LEAVES) return `${pictures} pictures: at most ${MOST_LEAVES}`;
  const made = pictures === 1 ? "1 picture" : `${pictures} pictures`;
  const work = steps ? Math.round(evaluations(branches, branching, steps) / steps) : pictures;
  return work < pictures ? `${made} for the work of ${work}` : made;
}

function update(node, widget) {
  const linked = new Set(node.inputs?.filter((input) => input.link != null).map((input) => input.widget?.name ?? input.name));
  const value = (name) => node.widgets.find((each) => each.name === name)?.value;
  const unknown = linked.has("branch_steps") || linked.has("branching");
  const steps = linked.has("steps") ? undefined : value("steps");
  const said = unknown ? "" : describe(value("branch_steps"), value("branching"), steps);
  if (widget.element.textContent !== said) widget.element.textContent = widget.element.title = said;
}

app.registerExtension({
  name: "tmpo.size",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const line = element("div", "tmpo-size");
    const height = () => HEIGHT;
    const options = { serialize: false, hideOnZoom: false, margin: 0, getMinHeight: height, getMaxHeight: height };
    const widget = node.addDOMWidget(NAME, NAME, line, options);
    // Or a workflow would keep a value for it, which an input that is added later would get.
    widget.serialize = false;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    const again = () => update(node, widget);
    for (const each of node.widgets) {
      if (!["branch_steps", "branching", "steps"].includes(each.name)) continue;
      const changed = each.callback;
      each.callback = function () {
        changed?.apply(this, arguments);
        again();
      };
    }
    for (const event of ["onConfigure", "onConnectionsChange"]) {
      const before = node[event];
      node[event] = function () {
        before?.apply(this, arguments);
        again();
      };
    }
    again();
  },
});

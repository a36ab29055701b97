// The tree samplers tell the size of their tree, and what is wrong with its inputs, before anything runs.

import assert from "node:assert/strict";

/** In the page: a new node with these values. */
const place = ([type, values]) => {
  const node = window.LiteGraph.createNode(type);
  window.app.graph.add(node);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((each) => each.name === name);
    widget.value = value;
    widget.callback(value);
  }
  return node.id;
};

const said = (id) => window.app.graph.getNodeById(id).widgets.find((each) => each.name === "tmpo_size").element.textContent;

export async function check(page, tools) {
  await tools.load();
  for (const [type, values, line] of [
    // 3 + 3 + 3 + 9 + 9 + 27 x 5 nodes in place of 27 x 10, rounded.
    ["TMPO_TreeSampler", { steps: 10, branching: 3, branch_steps: "1, 3, 5" }, "27 pictures for the work of 16"],
    // 2 + 2 + 4 + 8 in place of 8 x 4.
    ["TMPO_TreeSampler", { steps: 4, branching: 2, branch_steps: "1, 2, 3" }, "8 pictures for the work of 4"],
    ["TMPO_TreeSampler", { steps: 10, branching: 1, branch_steps: "3" }, "1 picture"],
    ["TMPO_TreeSampler", { steps: 4, branch_steps: "1 5" }, "branch step 5 is beyond 4 steps"],
    ["TMPO_TreeSampler", { steps: 30, branching: 4, branch_steps: "1, 2, 3, 4, 5, 6" }, "4096 pictures: at most 1024"],
    ["TMPO_TreeSampler", { branch_steps: "3, 3" }, "branch_steps: write e.g. 1, 3, 5"],
    ["TMPO_TreeSampler", { branch_steps: "" }, "branch_steps: write e.g. 1, 3, 5"],
    ["TMPO_TreeSamplerAdvanced", { branching: 2, branch_steps: "1, 3, 5" }, "8 pictures"],
    ["TMPO_TreeSamplerSelect", { branching: 2, branch_steps: "2" }, "2 pictures"],
  ]) {
    const id = await page.evaluate(place, [type, values]);
    assert.equal(await page.evaluate(said, id), line);
    assert.ok(await page.evaluate((made) => {
      const node = window.app.graph.getNodeById(made);
      return node.size[1] >= node.computeSize()[1];
    }, id));
  }
  // A workflow's values count once they are set, and an input that comes over a link is not known.
  await tools.load();
  const sampler = await page.evaluate(() => window.app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler").id);
  // 4 x 3 + 9 + 27 x 5 in place of 27 x 10.
  assert.equal(await page.evaluate(said, sampler), "27 pictures for the work of 16");
  const values = await page.evaluate((id) => window.app.graph.getNodeById(id).serialize().widgets_values, sampler);
  assert.equal(values.at(-1), 1, "denoise is the last value of a saved workflow");
  await page.evaluate((id) => {
    const node = window.app.graph.getNodeById(id);
    const schedule = window.LiteGraph.createNode("TMPO_BranchSchedule");
    window.app.graph.add(schedule);
    schedule.connect(0, node, node.inputs.findIndex((input) => input.name === "branch_steps"));
  }, sampler);
  assert.equal(await page.evaluate(said, sampler), "");
  await page.waitForTimeout(500);
  await page.screenshot({ path: tools.file("size") });
}

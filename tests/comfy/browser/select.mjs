// Select Branches shows the inputs of its mode, its seed stands still where it is not used, and notices come and go.

import assert from "node:assert/strict";

/** In the page: a new Select Branches, or one with the values of an old workflow. */
const place = (values) => {
  const node = window.LiteGraph.createNode("TMPO_SelectBranches");
  window.app.graph.add(node);
  if (values) node.configure({ ...node.serialize(), widgets_values: values });
  return node.id;
};

const state = (id) => {
  const node = window.app.graph.getNodeById(id);
  const shown = node.widgets.filter((widget) => !widget.hidden).map((widget) => widget.name);
  return { shown, drawn: node.widgets.filter((widget) => !widget.options.hidden).map((widget) => widget.name),
    control: node.widgets.find((widget) => widget.name === "control_after_generate").value };
};

const choose = ([id, mode]) => {
  const widget = window.app.graph.getNodeById(id).widgets.find((each) => each.name === "mode");
  widget.value = mode;
  widget.callback(mode);
};

export async function check(page, tools) {
  // The page may still open its own first workflow in place of an empty graph.
  await tools.load();
  const id = await page.evaluate(place);
  assert.deepEqual((await page.evaluate(state, id)).shown, ["mode", "count"]);
  for (const [mode, inputs] of [
    ["most diverse above a score", ["count", "min_score"]],
    ["sample by weight", ["count", "beta", "seed", "control_after_generate"]],
    ["by index", ["index"]],
    ["by choice", []],
  ]) {
    await page.evaluate(choose, [id, mode]);
    const { shown, drawn } = await page.evaluate(state, id);
    assert.deepEqual(shown, ["mode", ...inputs]);
    assert.deepEqual(drawn, shown);
  }
  // An old workflow, with a seed that changed after every run: it matters in one mode only.
  const old = await page.evaluate(place, ["best by score", 4, -1000, 2, 7, "randomize", 3]);
  assert.equal((await page.evaluate(state, old)).control, "fixed");
  const drawing = await page.evaluate(place, ["sample by weight", 4, -1000, 2, 7, "randomize", 3]);
  assert.equal((await page.evaluate(state, drawing)).control, "randomize");
  const values = await page.evaluate((id) => window.app.graph.getNodeById(id).serialize().widgets_values, old);
  assert.deepEqual(values.slice(0, 7), ["best by score", 4, -1000, 2, 7, "fixed", 3]);

  const notice = (texts) => page.evaluate(([id, texts]) => {
    const node = window.app.graph.getNodeById(id);
    node.onExecuted({ tmpo_notice: texts });
    const widget = node.widgets.find((each) => each.name === "tmpo_notice");
    return widget && !widget.hidden ? widget.element.textContent : null;
  }, [id, texts]);
  assert.equal(await notice([]), null);
  assert.equal(await notice(["3 pictures instead of 4"]), "3 pictures instead of 4");
  await page.waitForTimeout(500);
  await page.screenshot({ path: tools.file("select") });
  assert.equal(await notice([]), null);

  // A size set by hand stays: through a notice, a reload, and as the surplus over what another mode needs.
  const height = () => page.evaluate((id) => window.app.graph.getNodeById(id).size[1], id);
  const least = () => page.evaluate((id) => window.app.graph.getNodeById(id).computeSize()[1], id);
  await page.evaluate((id) => window.app.graph.getNodeById(id).setSize([320, 500]), id);
  await notice(["3 pictures instead of 4"]);
  await notice([]);
  assert.equal(await height(), 500);
  const surplus = 500 - await least();
  await page.evaluate(choose, [id, "best by score"]);
  assert.equal(await height(), await least() + surplus);
  const saved = await height();
  await page.evaluate((id) => {
    const node = window.app.graph.getNodeById(id);
    node.configure(node.serialize());
  }, id);
  assert.equal(await height(), saved);
}

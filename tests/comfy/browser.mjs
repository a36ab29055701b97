// Draws the Tree View in a real browser and tries it, by mouse and by keyboard.
//
// node browser.mjs URL FOLDER [MODULES]
//   URL      of a running ComfyUI with this pack
//   FOLDER   for the screenshots
//   MODULES  folder whose node_modules has playwright-core, by default the current one
// CHROMIUM names the browser, by default /usr/bin/chromium.

import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [url, folder, modules = "."] = process.argv.slice(2);
const { chromium } = createRequire(join(resolve(modules), "index.js"))("playwright-core");
const PROMPT = "three green circles";

/** In the page: the graph of a tree of 27 leaves, as a saved workflow. */
function workflow(prompt) {
  const { LiteGraph, LGraph } = window;
  const graph = new LGraph();
  const add = (type, x, y, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    graph.add(node);
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    return node;
  };
  const link = (from, output, to, input) => from.connect(output, to, to.inputs.findIndex((i) => i.name === input));
  const loader = add("TMPO_DemoModelLoader", 0, 0);
  const positive = add("CLIPTextEncode", 300, 0, { text: prompt });
  const negative = add("CLIPTextEncode", 300, 220, { text: "" });
  const latent = add("EmptySD3LatentImage", 0, 200, { width: 64, height: 64 });
  const sampler = add("TMPO_TreeSampler", 750, 0, { seed: 4, steps: 10, cfg: 1, branch_steps: "1, 4, 5" });
  const decode = add("VAEDecode", 750, 450);
  const score = add("TMPO_ScoreImages", 750, 550, { prompt, reward: "shapes" });
  const view = add("TMPO_TreeView", 1200, 0);
  link(loader, 2, view, "vae");
  link(loader, 1, positive, "clip");
  link(loader, 1, negative, "clip");
  link(loader, 0, sampler, "model");
  link(positive, 0, sampler, "positive");
  link(negative, 0, sampler, "negative");
  link(latent, 0, sampler, "latent_image");
  link(sampler, 0, decode, "samples");
  link(loader, 2, decode, "vae");
  link(decode, 0, score, "images");
  link(sampler, 1, view, "tree");
  link(decode, 0, view, "images");
  link(score, 0, view, "scores");
  return graph.serialize();
}

const view = () => window.app.graph.nodes.find((node) => node.type === "TMPO_TreeView");

mkdirSync(folder, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
const page = await browser.newPage({ viewport: { width: 1100, height: 1450 } });
const problems = [];
page.on("pageerror", (error) => error.stack.includes("tmpo") && problems.push(error.stack));
await page.addInitScript(`window.view = ${view}; window.workflow = ${workflow};`);

async function open() {
  // Or templates and the map would cover the page.
  const settings = { "Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false };
  await page.request.post(`${url}/settings`, { data: settings });
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph.registered_node_types).length > 100,
  );
}

/** The node alone, at its own size. */
async function frame(size) {
  await page.evaluate((wanted) => {
    const node = window.view();
    if (wanted) node.setSize(wanted);
    window.app.canvas.ds.scale = 1;
    window.app.canvas.ds.offset = [110 - node.pos[0], 110 - node.pos[1]];
    window.app.canvas.setDirty(true, true);
  }, size);
  await page.waitForTimeout(600);
}

async function run() {
  await page.evaluate(() => new Promise((done, fail) => {
    const failed = ({ detail }) => fail(new Error(detail.exception_message));
    window.app.api.addEventListener("execution_success", done, { once: true });
    window.app.api.addEventListener("execution_error", failed, { once: true });
    window.app.queuePrompt(0, 1);
  }));
  await page.waitForSelector(".tmpo-tree-leaf");
  await page.waitForTimeout(600);
}

async function shoot(name) {
  const [x, y, width, height] = await page.evaluate(() => {
    const { x, y } = window.app.canvas.canvas.getBoundingClientRect();
    const node = window.view();
    return [x + 104, y + 74, node.size[0] + 12, node.size[1] + 42];
  });
  await page.screenshot({ path: join(folder, `${name}.png`), clip: { x, y, width, height } });
}

const selected = () => page.evaluate(() => window.view().widgets.find((w) => w.name === "selected").value);

/** Leaves and nodes whose pictures overlap, and texts that are cut. */
const faults = () => page.evaluate(() => {
  const found = [];
  const boxes = [...document.querySelectorAll(".tmpo-tree-node, .tmpo-tree-leaf, .tmpo-tree-sigma, .tmpo-tree-prompt")];
  const rects = boxes.map((box) => box.getBoundingClientRect());
  rects.forEach((a, i) => rects.forEach((b, j) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (i < j && across > 0.5 && down > 0.5) found.push(`${boxes[i].className} overlaps ${boxes[j].className}`);
  }));
  for (const text of document.querySelectorAll(".tmpo-tree-head, .tmpo-tree-score, .tmpo-tree-q, .tmpo-tree-mark")) {
    if (text.scrollWidth > text.clientWidth) found.push(`${text.className} is cut: ${text.textContent}`);
  }
  return found;
});

await open();
// New nodes keep their seed.
const controls = await page.evaluate(() => ["TMPO_TreeSampler", "TMPO_SelectBranches"].map((type) => {
  const node = window.LiteGraph.createNode(type);
  window.app.graph.add(node);
  return node.widgets.find((widget) => widget.name === "control_after_generate").value;
}));
assert.deepEqual(controls, ["fixed", "fixed"]);
const saved = await page.evaluate((prompt) => window.workflow(prompt), PROMPT);
await page.evaluate((graph) => window.app.loadGraphData(graph), saved);
await frame([840, 1200]);
await run();
assert.equal(await page.locator(".tmpo-tree-leaf").count(), 27);
for (const [name, palette] of [["dark", "dark"], ["light", "light"]]) {
  await page.evaluate((id) => window.app.extensionManager.setting.set("Comfy.ColorPalette", id), palette);
  await frame();
  assert.deepEqual(await faults(), []);
  await shoot(`tree-${name}`);
}
await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.ColorPalette", "dark"));

// Mouse: hover shows a card, a click chooses, another takes it back.
const leaf = page.locator(".tmpo-tree-leaf").nth(12);
const index = Number((await leaf.getAttribute("aria-label")).match(/\d+/)[0]);
await leaf.hover();
assert.ok(await page.locator(".tmpo-tree-card").isVisible());
await shoot("hover-leaf");
await leaf.click();
assert.equal(await selected(), index);
assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 1);
await leaf.click();
assert.equal(await selected(), -1);

// Undo is ComfyUI's: the first takes the last click back, the tree stays.
await page.locator(".tmpo-tree").press("Control+z");
await page.waitForTimeout(600);
assert.equal(await selected(), index);
assert.equal(await page.locator(".tmpo-tree-leaf").count(), 27);
assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 1);
await page.locator(".tmpo-tree").press("Control+z");
await page.waitForTimeout(600);
assert.equal(await selected(), -1);
await page.locator(".tmpo-tree-node img").nth(2).hover();
await shoot("hover-node");

// Keyboard: from the top, the third leaf.
await page.locator(".tmpo-tree").focus();
for (const key of ["Home", "ArrowDown", "ArrowDown", "Enter"]) await page.keyboard.press(key);
const third = Number((await page.locator(".tmpo-tree-leaf").nth(2).getAttribute("aria-label")).match(/\d+/)[0]);
assert.equal(await selected(), third);
await shoot("keyboard");

// The tree is still there where the whole graph fits a laptop's screen.
await page.evaluate(() => {
  window.app.canvas.ds.scale = 0.45;
  window.app.canvas.setDirty(true, true);
});
await page.waitForTimeout(600);
assert.ok(await page.locator(".tmpo-tree-leaf").first().isVisible());
await page.screenshot({ path: join(folder, "far.png") });

// Away from everything that has a card.
await page.mouse.move(1, 1);

// Small, large, and with a run that has something selected.
for (const [name, size] of [["small", [420, 480]], ["large", [900, 1000]]]) {
  await frame(size);
  assert.deepEqual(await faults(), []);
  await shoot(name);
}
await run();

// A workflow that is loaded again keeps the choice; its tree comes back with the outputs.
await page.evaluate(() => {
  const outputs = window.app.nodeOutputs;
  return window.app.loadGraphData(window.app.graph.serialize()).then(() => (window.app.nodeOutputs = outputs));
});
await frame();
assert.equal(await selected(), third);
assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 1);

assert.deepEqual(problems, []);
await browser.close();
console.log("ok");

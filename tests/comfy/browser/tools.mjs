// What the browser checks share: opening ComfyUI, a graph with a tree of 27 leaves, running it, and its pictures.

import { join } from "node:path";

export const PROMPT = "three green circles";

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

/** The tools of a page. url: of ComfyUI. folder: for screenshots. */
export async function toolsOf(page, url, folder) {
  await page.addInitScript(`window.view = ${view}; window.workflow = ${workflow};`);
  const file = (name) => join(folder, `${name}.png`);

  async function open() {
    // Or templates and the map would cover the page.
    const settings = { "Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false, "Comfy.VueNodes.Enabled": false };
    await page.request.post(`${url}/settings`, { data: settings });
    await page.goto(url, { waitUntil: "domcontentloaded" });
    await page.waitForFunction(
      () => window.app?.extensionManager?.workflow?.activeWorkflow
        && Object.keys(window.LiteGraph.registered_node_types).length > 100,
    );
  }

  /** Opens the graph of a tree. */
  async function load(prompt = PROMPT) {
    await page.evaluate((text) => window.app.loadGraphData(window.workflow(text)), prompt);
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
    await page.screenshot({ path: file(name), clip: { x, y, width, height } });
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

  return { url, file, open, load, frame, run, shoot, selected, faults };
}

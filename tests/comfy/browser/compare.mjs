// Compare and Load TMPO LoRA: tables, the divider by mouse and keys, and texts that leave their node's size alone.

import assert from "node:assert/strict";

/** In the page: a comparison of three dark pictures with three light ones, and the demo LoRA. */
async function graph() {
  const { LiteGraph, app } = window;
  app.graph.clear();
  const add = (type, x, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 60];
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    return node;
  };
  const size = { width: 96, height: 64, batch_size: 3 };
  const pictures = [0x102030, 0xe0d0c0].map((color, at) => add("EmptyImage", 300 * at, { ...size, color }));
  const compare = add("TMPO_Compare", 620, { diversity: false });
  pictures.forEach((node, at) => node.connect(0, compare, at));
  const loader = add("TMPO_DemoModelLoader", 1120);
  const lora = add("TMPO_LoadLora", 1360, { lora: "(demo)" });
  loader.connect(0, lora, 0);
  compare.setSize([380, 470]);
  lora.setSize([300, 280]);
  await new Promise((done, fail) => {
    app.api.addEventListener("execution_success", done, { once: true });
    app.api.addEventListener("execution_error", ({ detail }) => fail(new Error(detail.exception_message)), { once: true });
    app.queuePrompt(0, 1);
  });
}

/** In the page: brings a node into view at its own size, and returns its size. */
function frame(type) {
  const { canvas, graph } = window.app;
  const node = graph.nodes.find((candidate) => candidate.type === type);
  canvas.ds.scale = 1;
  canvas.ds.offset = [140 - node.pos[0], 130 - node.pos[1]];
  canvas.setDirty(true, true);
  return [...node.size];
}

export async function check(page) {
  await page.evaluate(graph);
  await page.waitForSelector(".tmpo-compare table");
  const [, height] = await page.evaluate(frame, "TMPO_Compare");
  await page.waitForTimeout(800);
  // Nodes 2.0 measure a node a little higher than the classic renderer. The whole text would be far higher.
  assert.ok(height < 560, `Compare is ${height} high`);
  const text = page.locator(".tmpo-compare-text");
  assert.ok(await text.evaluate((box) => box.scrollHeight > box.clientHeight + 50));
  assert.equal(await text.locator("table").count(), 2);
  assert.equal(await text.locator("table").nth(1).locator("tbody tr").count(), 6);
  assert.ok(!(await text.textContent()).includes("|"));

  // The divider follows a drag, up to the edge of the picture.
  const stage = page.locator(".tmpo-compare-stage");
  const at = () => stage.evaluate((box) => parseFloat(box.style.getPropertyValue("--at")));
  const box = await stage.boundingBox();
  assert.ok(Math.abs(box.width / box.height - 1.5) < 0.05);
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  await page.mouse.down();
  await page.mouse.move(box.x + 0.25 * box.width, box.y + 0.7 * box.height, { steps: 4 });
  assert.ok(Math.abs((await at()) - 25) < 2, `the divider is at ${await at()}`);
  await page.mouse.move(box.x - 30, box.y + 0.5 * box.height, { steps: 4 });
  await page.mouse.up();
  assert.equal(await at(), 0);

  // By keys: the divider, and the next and the previous pair.
  const index = async () => Number((await page.locator(".tmpo-compare-turn span").textContent()).match(/\d+/)[0]);
  const sources = () => stage.locator("img").evaluateAll((pictures) => pictures.map((picture) => picture.src));
  const first = await sources();
  for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) await page.keyboard.press(key);
  assert.equal(await at(), 10);
  assert.equal(await index(), 1);
  assert.ok((await sources()).every((source, place) => source !== first[place]));
  await page.keyboard.press("ArrowUp");
  assert.deepEqual(await sources(), first);
  const next = page.getByRole("button", { name: "Next picture" });
  await next.focus();
  await page.keyboard.press("Enter");
  assert.equal(await index(), 1);
  // It still has the focus.
  await page.keyboard.press("Enter");
  assert.equal(await index(), 2);
  assert.ok(await next.isDisabled());

  // What a node reports never becomes markup.
  await page.evaluate(() => {
    const node = window.app.graph.nodes.find((candidate) => candidate.type === "TMPO_LoadLora");
    window.real = node.tmpoView.root.querySelector("dl").textContent;
    node.tmpoView.show({ text: ["name  <img src=x onerror='window.hit = 1'>"] });
  });
  const lora = page.locator(".tmpo-text dl");
  assert.equal(await lora.locator("img").count(), 0);
  assert.ok((await lora.textContent()).includes("<img"));
  assert.ok((await page.evaluate(() => window.real)).includes("rank"));
  const [, loraHeight] = await page.evaluate(frame, "TMPO_LoadLora");
  assert.ok(loraHeight < 320, `Load TMPO LoRA is ${loraHeight} high`);
}

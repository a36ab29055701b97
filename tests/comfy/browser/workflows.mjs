// A workflow from the template browser opens within a laptop's screen; what is chosen in its tree gets a second pass.

import assert from "node:assert/strict";

const NAME = "07 variations, choose, refine";

export async function check(page, { run, file }) {
  await page.setViewportSize({ width: 1366, height: 768 });
  await page.evaluate(async (name) => {
    const packs = await (await fetch("/workflow_templates")).json();
    const pack = Object.keys(packs).find((key) => packs[key].includes(name));
    const address = `/api/workflow_templates/${pack}/${encodeURIComponent(name)}`;
    if (!(await fetch(`${address}.jpg`)).ok) throw new Error(`no thumbnail of ${name}`);
    await window.app.loadGraphData(await (await fetch(`${address}.json`)).json());
  }, NAME);
  await page.waitForTimeout(1500);
  const outside = await page.evaluate(() => {
    const { ds, canvas } = window.app.canvas;
    const { top } = canvas.getBoundingClientRect();
    return window.app.graph.nodes.filter(({ pos, size }) => {
      const [x, y] = [0, 1].map((axis) => (pos[axis] + ds.offset[axis]) * ds.scale);
      return x < 60 || x + size[0] * ds.scale > innerWidth || y + top < 80 || y + top + size[1] * ds.scale > innerHeight;
    }).map((node) => node.title);
  });
  assert.deepEqual(outside, []);

  await run();
  await page.getByRole("button", { name: "top 4" }).click();
  const saved = page.evaluate(() => new Promise((done) => {
    window.app.api.addEventListener("executed", ({ detail }) => {
      const images = detail.output?.images ?? [];
      if (images.some(({ type }) => type === "output")) done(images.length);
    });
  }));
  await run();
  assert.equal(await saved, 4);
  await page.screenshot({ path: file("workflow-07") });
}

// A run that waits in Tree View: a choice continues it, also after the page was loaded again and after an undo.

import assert from "node:assert/strict";

export async function check(page, { url, file, load, frame }) {
  await load();
  await frame([700, 620]);
  // The end of the run, also of one that began before the page was loaded again.
  const listen = () => page.evaluate(() => {
    window.over = new Promise((done) => window.app.api.addEventListener("execution_success", done, { once: true }));
  });
  await page.evaluate(() => {
    const widget = (name) => window.view().widgets.find((each) => each.name === name);
    widget("pause").value = true;
    window.app.queuePrompt(0, 1);
  });
  const bar = page.locator(".tmpo-tree-pause");
  await bar.waitFor({ timeout: 60000 });
  await page.waitForTimeout(500);
  await page.screenshot({ path: file("pause") });

  // An undo creates the node again.
  await page.locator(".tmpo-tree-leaf").nth(3).click();
  await page.locator(".tmpo-tree").press("Control+z");
  await page.waitForTimeout(800);
  assert.equal(await bar.count(), 1);

  await page.reload({ waitUntil: "domcontentloaded" });
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph.registered_node_types).length > 100,
  );
  await bar.waitFor({ timeout: 20000 });
  await frame([700, 620]);
  assert.equal(await page.locator(".tmpo-tree-leaf").count(), 27);
  await listen();
  const leaf = page.locator(".tmpo-tree-leaf").nth(2);
  const index = Number((await leaf.getAttribute("aria-label")).match(/\d+/)[0]);
  await leaf.click();
  await bar.getByRole("button").click();
  await page.evaluate(() => window.over);
  await bar.waitFor({ state: "detached" });
  const history = await (await page.request.get(`${url}/history?max_items=1`)).json();
  assert.equal(Object.values(history)[0].status.status_str, "success");
  assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 1);
  assert.ok((await page.locator(".tmpo-tree-leaf[aria-selected=true]").getAttribute("aria-label")).includes(`${index}`));
}

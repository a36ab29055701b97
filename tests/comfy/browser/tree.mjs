// The tree of a Tree View: its look, mouse, keys and undo, and a choice that is kept.

import assert from "node:assert/strict";

export async function check(page, { file, load, frame, run, shoot, selected, faults }) {
  // New nodes keep their seed.
  const controls = await page.evaluate(() => ["TMPO_TreeSampler", "TMPO_SelectBranches"].map((type) => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    return node.widgets.find((widget) => widget.name === "control_after_generate").value;
  }));
  assert.deepEqual(controls, ["fixed", "fixed"]);
  await load();
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
  await page.screenshot({ path: file("far") });

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
}

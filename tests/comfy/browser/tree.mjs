// The tree of a Tree View: its look, mouse, keys and undo, and a choice that is kept.

import assert from "node:assert/strict";

export async function check(page, { file, load, frame, run, shoot, selected, faults }) {
  const indexOf = async (place) =>
    Number((await page.locator(".tmpo-tree-leaf").nth(place).getAttribute("aria-label")).match(/\d+/)[0]);
  const chosen = () => page.evaluate(() => window.view().tmpoTree.chosen);

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
  const index = await indexOf(12);
  await leaf.hover();
  assert.ok(await page.locator(".tmpo-tree-card").isVisible());
  await shoot("hover-leaf");
  await leaf.click();
  const one = await selected();
  assert.match(one, new RegExp(`^${index} @ [0-9a-f]{16}$`));
  assert.deepEqual(await chosen(), [index]);
  await leaf.click();
  assert.equal(await selected(), "");

  // Undo is ComfyUI's: the first takes the last click back, the tree stays.
  await page.locator(".tmpo-tree").press("Control+z");
  await page.waitForTimeout(600);
  assert.equal(await selected(), one);
  assert.equal(await page.locator(".tmpo-tree-leaf").count(), 27);
  assert.deepEqual(await chosen(), [index]);
  await page.locator(".tmpo-tree").press("Control+z");
  await page.waitForTimeout(600);
  assert.equal(await selected(), "");
  await page.locator(".tmpo-tree-node img").nth(2).hover();
  await shoot("hover-node");

  // Keyboard: from the top, the third leaf.
  await page.locator(".tmpo-tree").focus();
  for (const key of ["Home", "ArrowDown", "ArrowDown", "Enter"]) await page.keyboard.press(key);
  const third = await indexOf(2);
  assert.deepEqual(await chosen(), [third]);
  // Space adds the next but one, Shift and an arrow choose a range.
  for (const key of ["ArrowDown", "ArrowDown", "Space"]) await page.keyboard.press(key);
  assert.deepEqual(await chosen(), [third, await indexOf(4)]);
  await shoot("keyboard");
  await page.keyboard.press("Shift+ArrowDown");
  assert.deepEqual(await chosen(), [await indexOf(4), await indexOf(5)]);

  // Ctrl and Shift with the mouse.
  await page.locator(".tmpo-tree-leaf").nth(8).click();
  await page.locator(".tmpo-tree-leaf").nth(1).click({ modifiers: ["Control"] });
  await page.locator(".tmpo-tree-leaf").nth(3).click({ modifiers: ["Control"] });
  await page.locator(".tmpo-tree-leaf").nth(1).click({ modifiers: ["Control"] });
  assert.deepEqual(await chosen(), [await indexOf(8), await indexOf(3)]);
  await page.locator(".tmpo-tree-leaf").nth(8).click();
  await page.locator(".tmpo-tree-leaf").nth(6).click({ modifiers: ["Shift"] });
  assert.deepEqual(await chosen(), [await indexOf(8), await indexOf(7), await indexOf(6)]);

  // Buttons: every set that the node suggests, and none.
  const sets = await page.evaluate(() => window.view().tmpoTree.tree.suggestions);
  assert.ok(sets.length >= 2);
  for (const { name, leaves } of sets) {
    await page.getByRole("button", { name, exact: true }).click();
    assert.deepEqual(await chosen(), leaves);
  }
  await shoot("several");
  const starred = await page.locator(".tmpo-tree-mark", { hasText: "\u2605" }).count();
  assert.equal(starred, await page.evaluate(() => window.view().tmpoTree.tree.stars.length));
  await page.getByRole("button", { name: "clear", exact: true }).click();
  assert.equal(await selected(), "");
  await page.locator(".tmpo-tree-leaf").nth(8).click();
  await page.locator(".tmpo-tree-leaf").nth(2).click({ modifiers: ["Control"] });
  const two = [await indexOf(8), third];

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
  assert.deepEqual(await chosen(), two);
  assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 2);

  // The outputs of a choice; the same leaves of another tree are not taken.
  const passed = async () => {
    await run();
    return page.evaluate(() => window.app.nodeOutputs[window.shown.id].text[0]);
  };
  await page.evaluate(() => {
    window.shown = window.LiteGraph.createNode("PreviewAny");
    window.app.graph.add(window.shown);
    window.view().connect(3, window.shown, 0);
  });
  assert.equal(await passed(), two.join(", "));
  await page.evaluate(() => {
    const sampler = window.app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler");
    sampler.widgets.find((widget) => widget.name === "seed").value++;
  });
  const best = await passed();
  assert.equal(best, String(await page.evaluate(() => window.view().tmpoTree.tree.best)));
  assert.deepEqual(await chosen(), []);
  assert.match(await page.locator(".tmpo-tree-choice span").textContent(), /another tree/);
  await shoot("another-tree");

  // In Nodes 2.0 the tree scrolls in its node, which keeps its size and can be made small. ComfyUI 0.3.64 (frontend 1.27) has
  // an early form of them, without widgets such as this.
  const setting = "Comfy.VueNodes.Enabled";
  if (await page.evaluate(() => Number(window.__COMFYUI_FRONTEND_VERSION__.split(".")[1]) > 27)) {
    const vue = (on) => page.evaluate(([id, value]) => window.app.extensionManager.setting.set(id, value), [setting, on]);
    await vue(true);
    for (const height of [600, 440]) {
      await frame([500, height]);
      const box = await page.evaluate(() => {
        const node = document.querySelector(`[data-node-id="${window.view().id}"]`);
        const { scrollHeight, clientHeight } = node.querySelector(".tmpo-tree-scroll");
        return { height: node.getBoundingClientRect().height, scrolls: scrollHeight > clientHeight };
      });
      assert.ok(box.scrolls && Math.abs(box.height - height) < 40, JSON.stringify(box));
      await shoot(`nodes-2-${height}`);
    }
    await vue(false);
  }

  // A workflow of an earlier version has a number.
  await page.evaluate(() => {
    const saved = window.app.graph.serialize();
    saved.nodes.find((node) => node.type === "TMPO_TreeView").widgets_values[2] = -1;
    return window.app.loadGraphData(saved);
  });
  assert.equal(await selected(), "");
}

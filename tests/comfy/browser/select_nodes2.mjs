// Select Branches in Nodes 2.0: what the page draws is what its mode uses, and a notice appears and goes.

export async function check(page, { file }) {
  // ComfyUI 0.3.64 (frontend 1.27) draws no DOM widgets in its trial of Nodes 2.0.
  if (!await page.evaluate(() => Number(window.__COMFYUI_FRONTEND_VERSION__.split(".")[1]) > 27)) return;
  const setting = (on) => page.evaluate(
    (value) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", value), on,
  );
  await setting(true);
  const id = await page.evaluate(() => {
    window.app.graph.clear();
    const node = window.LiteGraph.createNode("TMPO_SelectBranches");
    node.pos = [60, 120];
    window.app.graph.add(node);
    return node.id;
  });
  const drawn = page.locator(`[data-node-id="${id}"]`);
  const until = (names) => page.waitForFunction(
    ([id, wanted]) => {
      const lines = document.querySelector(`[data-node-id="${id}"]`)?.innerText.split("\n") ?? [];
      const found = ["count", "min_score", "beta", "seed", "index"].filter((name) => lines.includes(name));
      return lines.includes("mode") && found.join() === wanted;
    },
    [id, names.join()],
    { timeout: 10000 },
  );
  for (const [mode, inputs] of [
    ["best by score", ["count"]],
    ["most diverse above a score", ["count", "min_score"]],
    ["sample by weight", ["count", "beta", "seed"]],
    ["by index", ["index"]],
    ["by choice", []],
  ]) {
    await page.evaluate(([id, mode]) => {
      const widget = window.app.graph.getNodeById(id).widgets.find((each) => each.name === "mode");
      widget.value = mode;
      widget.callback(mode);
    }, [id, mode]);
    await until(inputs);
  }
  const text = "3 pictures instead of 4";
  for (const texts of [[text], []]) {
    await page.evaluate(([id, texts]) => window.app.graph.getNodeById(id).onExecuted({ tmpo_notice: texts }), [id, texts]);
    await drawn.getByText(text).waitFor({ state: texts.length ? "visible" : "hidden", timeout: 10000 });
    if (texts.length) await page.screenshot({ path: file("select-nodes2") });
  }
  await setting(false);
}

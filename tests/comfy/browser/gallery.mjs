// The gallery, the lightbox, the menu of a leaf, and the tree that grows while it is sampled.

import assert from "node:assert/strict";

export async function check(page, { file, load, run, frame, shoot, selected, faults }) {
  await load();

  // ComfyUI samples nothing again that it has sampled since it was started.
  const seed = Date.now() % 1e9;
  await page.evaluate((value) => {
    const sampler = window.app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler");
    sampler.widgets.find((widget) => widget.name === "seed").value = value;
  }, seed);

  // While it is sampled, the view shows inner nodes before leaves, and takes no choice.
  const grown = await page.evaluate(async () => {
    const view = window.view().tmpoTree;
    const seen = [];
    window.app.api.addEventListener("tmpo.growing", () => {
      const count = (nodes) => nodes.filter((node) => node.image).length;
      view.choose(view.tree.leaves[3]);
      seen.push([count(view.tree.nodes), count(view.tree.leaves), view.root.querySelectorAll("img[src^=data]").length]);
    });
    const done = new Promise((resolve, reject) => {
      window.app.api.addEventListener("execution_success", resolve, { once: true });
      window.app.api.addEventListener("execution_error", ({ detail }) => reject(new Error(detail.exception_message)));
    });
    window.app.queuePrompt(0, 1);
    await done;
    return seen;
  });
  assert.ok(grown.length >= 2 && grown[0][0] > 0 && grown[0][1] === 0, JSON.stringify(grown));
  assert.deepEqual(grown.at(-1), [12, 27, 39]);
  assert.ok(["", "-1", -1].includes(await selected()));
  await page.waitForSelector(".tmpo-tree-leaf img[src*=view]");
  assert.equal(await page.evaluate(() => Boolean(window.view().tmpoTree.tree.growing)), false);

  // An interrupted run leaves the tree that was there.
  await page.evaluate(async () => {
    const { api } = window.app;
    const widget = window.app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler").widgets.find((w) => w.name === "seed");
    const own = widget.value;
    widget.value = own + 1;
    const over = new Promise((resolve) => {
      for (const name of ["execution_interrupted", "execution_success"]) api.addEventListener(name, resolve, { once: true });
    });
    api.addEventListener("tmpo.growing", () => api.interrupt(), { once: true });
    window.app.queuePrompt(0, 1);
    await over;
    widget.value = own;
  });
  assert.deepEqual(await page.evaluate(() => {
    const { tree } = window.view().tmpoTree;
    return [tree.seed, Boolean(tree.growing)];
  }), [String(seed), false]);

  // So does a run of other nodes alone.
  await page.evaluate(async () => {
    const { app, view, LiteGraph } = window;
    const find = (type) => app.graph.nodes.find((node) => node.type === type);
    const shown = LiteGraph.createNode("PreviewImage");
    app.graph.add(shown);
    find("VAEDecode").connect(0, shown, 0);
    const widget = find("TMPO_TreeSampler").widgets.find((w) => w.name === "seed");
    view().mode = 2;
    widget.value += 2;
    const grows = new Promise((resolve) => app.api.addEventListener("tmpo.growing", resolve, { once: true }));
    const done = new Promise((resolve) => app.api.addEventListener("execution_success", resolve, { once: true }));
    app.queuePrompt(0, 1);
    await Promise.all([grows, done]);
    widget.value -= 2;
    view().mode = 0;
    app.graph.remove(shown);
  });
  assert.deepEqual(await page.evaluate(() => {
    const { tree } = window.view().tmpoTree;
    return [tree.seed, Boolean(tree.growing)];
  }), [String(seed), false]);

  // And one that ended while the page was not connected, which then only hears that nothing is left to run.
  assert.deepEqual(await page.evaluate(() => {
    const { app, view } = window;
    const { tmpoTree } = view();
    const sampler = app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler");
    const dispatch = (name, detail) => app.api.dispatchEvent(new CustomEvent(name, { detail }));
    const tree = { ...tmpoTree.tree, growing: true };
    dispatch("tmpo.growing", { node: String(sampler.id), workflow: app.graph.id, tree, pictures: {} });
    return [1, 0].map((queue_remaining) => {
      dispatch("status", { exec_info: { queue_remaining } });
      return Boolean(tmpoTree.tree.growing);
    });
  }), [true, false]);

  // The gallery: all leaves at once where there is room, without overlaps, chosen by click and keys.
  await frame([700, 640]);
  await page.getByRole("button", { name: "Gallery" }).click();
  await frame();
  assert.deepEqual(await faults(), []);
  const boxes = await page.evaluate(() => [...document.querySelectorAll(".tmpo-gallery-leaf")].map((leaf) => {
    const { left, top, right } = leaf.getBoundingClientRect();
    return { left, top, right };
  }));
  assert.equal(boxes.length, 27);
  assert.ok(boxes[0].right - boxes[0].left > 64);
  assert.equal(await page.evaluate(() => {
    const { scrollHeight, clientHeight } = document.querySelector(".tmpo-tree-scroll");
    return scrollHeight > clientHeight;
  }), false);
  await shoot("gallery");
  const columns = boxes.filter((box) => box.top === boxes[0].top).length;
  const leaf = page.locator(".tmpo-tree-leaf").nth(4);
  const indexOf = async (option) => Number((await option.getAttribute("aria-label")).match(/\d+/)[0]);
  await leaf.click();
  assert.equal(parseInt(await selected()), await indexOf(leaf));
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  assert.equal(parseInt(await selected()), await indexOf(page.locator(".tmpo-tree-leaf").nth(4 + columns)));
  await page.keyboard.press("Enter");
  // By score: the best comes first, also for keys and in the lightbox, and equal ones keep their order.
  await page.getByRole("button", { name: "Best first" }).click();
  const shown = await page.evaluate(() => [...document.querySelectorAll(".tmpo-gallery-leaf")].map((option) => [
    Number(option.querySelector(".tmpo-tree-score").textContent), Number(option.getAttribute("aria-label").match(/\d+/)[0]),
  ]));
  const inTree = await page.evaluate(() => window.view().tmpoTree.tree.leaves.map((leaf) => leaf.index));
  assert.deepEqual(shown, [...shown].sort(([a, i], [b, j]) => b - a || inTree.indexOf(i) - inTree.indexOf(j)));
  assert.ok(shown[0][0] > shown.at(-1)[0]);
  assert.deepEqual(await faults(), []);
  await shoot("gallery-best-first");
  await page.keyboard.press("End");
  await page.keyboard.press("Enter");
  assert.equal(parseInt(await selected()), shown.at(-1)[1]);
  await page.keyboard.press("Enter");
  await page.locator(".tmpo-tree-leaf").nth(26).dblclick();
  assert.match(await page.locator(".tmpo-lightbox-caption").textContent(), new RegExp(`leaf ${shown[26][1]}27 of 27`));
  await page.keyboard.press("Escape");
  await frame([360, 420]);
  await shoot("gallery-small-best-first");
  await page.getByRole("button", { name: "Best first" }).click();
  assert.deepEqual(await page.evaluate(() => window.view().tmpoTree.leaves.map((leaf) => leaf.index)), inTree);
  // Small, and saved with the workflow.
  await frame([360, 420]);
  assert.deepEqual(await faults(), []);
  await shoot("gallery-small");
  await page.evaluate(() => window.app.loadGraphData(window.app.graph.serialize()));
  await run();
  assert.equal(await page.locator(".tmpo-gallery-leaf").count(), 27);
  await frame([700, 640]);

  // The lightbox: by double click, which leaves the choice as it was.
  const before = await selected();
  await page.locator(".tmpo-tree-leaf").nth(2).dblclick();
  const dialog = page.locator(".tmpo-lightbox");
  const caption = () => page.locator(".tmpo-lightbox-caption").textContent();
  const position = async () => parseInt(await page.locator(".tmpo-lightbox-caption span").nth(1).textContent());
  await page.waitForFunction(() => document.querySelector(".tmpo-lightbox img")?.naturalWidth === 64);
  assert.equal(await selected(), before);
  assert.match(await caption(), /leaf \d+.*shapes [\d.]+.*q [\d.]+ %.*seed \d+.*path 0 \u2192 0 \u2192 2/);
  await page.screenshot({ path: file("lightbox") });
  for (const [key, place] of [["ArrowRight", 4], ["ArrowLeft", 3], ["End", 27], ["ArrowDown", 27], ["Home", 1]]) {
    await page.keyboard.press(key);
    assert.equal(await position(), place);
  }
  await page.getByRole("button", { name: "Next leaf" }).click();
  assert.equal(await position(), 2);
  // Space and the tick add leaves to the choice; a swipe pages.
  await page.locator(".tmpo-lightbox").focus();
  await page.keyboard.press("Space");
  await page.keyboard.press("ArrowRight");
  await page.locator(".tmpo-lightbox-pick").click();
  assert.equal((await selected()).split("@")[0].split(",").length, 2 + (before ? before.split("@")[0].split(",").length : 0));
  await page.screenshot({ path: file("lightbox-picked") });
  await page.locator(".tmpo-lightbox-pick").click();
  await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("Space");
  assert.equal(await selected(), before);
  await page.evaluate(() => {
    const dialog = document.querySelector(".tmpo-lightbox");
    for (const [name, clientX] of [["pointerdown", 300], ["pointerup", 180]]) {
      dialog.dispatchEvent(new PointerEvent(name, { pointerType: "touch", isPrimary: true, clientX, bubbles: true }));
    }
  });
  assert.equal(await position(), 3);
  await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("Escape");
  assert.equal(await dialog.count(), 0);
  assert.ok(await page.evaluate(() => document.activeElement === window.view().tmpoTree.root));
  await page.keyboard.press("o");
  assert.equal(await position(), 2);
  await page.keyboard.press("Escape");

  // The menu: seed and path, a picture as a file, and a node that samples the leaf alone.
  await page.getByRole("button", { name: "Tree", exact: true }).click();
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  const menu = async (place, name) => {
    await page.locator(".tmpo-tree-leaf").nth(place).click({ button: "right" });
    await page.locator(".litecontextmenu").waitFor();
    if (name === "Copy picture") await page.screenshot({ path: file("menu") });
    await page.locator(".litecontextmenu .litemenu-entry", { hasText: name }).click();
  };
  await menu(5, "Copy seed and path");
  await page.waitForFunction(async () => /^seed \d+, path 0, 1, 2$/.test(await navigator.clipboard.readText()));
  await menu(5, "Copy picture");
  await page.waitForFunction(async () => (await navigator.clipboard.read())[0].types.includes("image/png"));
  const [download] = await Promise.all([page.waitForEvent("download"), menu(5, "Save picture")]);
  assert.equal(download.suggestedFilename(), `seed_${seed}_path_0-1-2.png`);
  await menu(5, "Re-sample only this leaf");
  await page.waitForTimeout(300);
  await page.screenshot({ path: file("resample") });
  const same = await page.evaluate(async () => {
    const found = window.app.graph.nodes.find((node) => node.type === "TMPO_Leaf");
    const shown = window.app.graph.nodes.find((node) => node.type === "PreviewImage");
    const values = Object.fromEntries(found.widgets.map((widget) => [widget.name, widget.value]));
    const done = new Promise((resolve, reject) => {
      window.app.api.addEventListener("execution_success", resolve, { once: true });
      window.app.api.addEventListener("execution_error", ({ detail }) => reject(new Error(detail.exception_message)));
    });
    window.app.queuePrompt(0, 1);
    await done;
    const read = async (ref) => {
      const image = new Image();
      image.src = `/view?${new URLSearchParams(ref)}`;
      await image.decode();
      const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
      canvas.drawImage(image, 0, 0);
      return canvas.getImageData(0, 0, image.width, image.height).data;
    };
    const view = window.view().tmpoTree;
    const leaf = view.tree.leaves[5];
    const [alone, own] = [await read(window.app.nodeOutputs[shown.id].images[0]), await read(leaf.full)];
    const difference = Math.max(...alone.map((value, i) => Math.abs(value - own[i])));
    return { values, difference, pixels: alone.length };
  });
  assert.equal(same.values.path, "0, 1, 2");
  assert.equal(same.values.branch_steps, "1, 4, 5");
  assert.ok(same.pixels === 4 * 64 * 64 && same.difference <= 1, JSON.stringify(same));

  // Variations of a leaf: a tree that begins at it, below the first one, which is not sampled again. Its sampler may have moved on.
  await menu(5, "Grow variations of this leaf");
  const grew = await page.evaluate(async () => {
    const { app } = window;
    const done = new Promise((resolve, reject) => {
      app.api.addEventListener("execution_success", resolve, { once: true });
      app.api.addEventListener("execution_error", ({ detail }) => reject(new Error(detail.exception_message)), { once: true });
    });
    const ran = [];
    app.api.addEventListener("executing", ({ detail }) => ran.push(String(detail)));
    app.queuePrompt(0, 1);
    await done;
    const [first, second] = app.graph.nodes.filter((node) => node.type === "TMPO_TreeView").map((node) => node.tmpoTree.tree);
    const [old, sampler] = app.graph.nodes.filter((node) => node.type === "TMPO_TreeSampler");
    return { again: ran.includes(String(old.id)), seeds: [first.seed, second.seed], leaves: second.leaves.length,
      scored: second.score, title: sampler.title, scores: second.leaves.every((leaf) => "shapes" in leaf.scores) };
  });
  assert.deepEqual(grew, { again: false, seeds: [String(seed), String(seed + 1)], leaves: 27, scored: "shapes",
    title: "Variations of 0, 1, 2", scores: true });
  await page.evaluate(() => {
    const { canvas, graph } = window.app;
    canvas.ds.scale = 0.6;
    const { pos } = graph.nodes.findLast((node) => node.title === "Leaf 0, 1, 2");
    canvas.ds.offset = [60 - pos[0], 120 - pos[1]];
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(800);
  await page.screenshot({ path: file("regrow") });
  await page.evaluate(() => {
    const { graph } = window.app;
    const top = graph.nodes.findLast((each) => each.title === "Leaf 0, 1, 2").pos[1];
    for (const node of graph.nodes.filter((each) => each.pos[1] >= top)) graph.remove(node);
  });
  await frame();

  // The leaf of a sampler whose noise has another seed by now gets the tree's seed.
  await page.evaluate((other) => {
    const { app, view, LiteGraph } = window;
    const [noise, sampler] = ["RandomNoise", "TMPO_TreeSamplerAdvanced"].map((type) => {
      const node = LiteGraph.createNode(type);
      app.graph.add(node);
      return node;
    });
    noise.widgets.find((widget) => widget.name === "noise_seed").value = other;
    noise.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "noise"));
    sampler.connect(1, view(), view().inputs.findIndex((input) => input.name === "tree"));
  }, seed + 1);
  await menu(5, "Re-sample only this leaf");
  assert.equal(await page.evaluate(() => {
    const leaf = window.app.graph.nodes.find((node) => node.type === "TMPO_LeafAdvanced");
    const noise = leaf.getInputNode(leaf.inputs.findIndex((input) => input.name === "noise"));
    return noise.widgets.find((widget) => widget.name === "noise_seed").value;
  }), seed);

  // A seed that comes over a link may be another by now: the leaf has the tree's.
  await load();
  await run();
  const seeds = await page.evaluate(async () => {
    const { app, view, LiteGraph } = window;
    window.resampled = (await app.api.getExtensions()).find((name) => name.includes("tmpo_resample.js"));
    const sampler = app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler");
    const number = LiteGraph.createNode("PrimitiveInt");
    app.graph.add(number);
    number.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "seed"));
    return import(window.resampled).then(({ resample }) => {
      resample(view().tmpoTree, view().tmpoTree.tree.leaves[5]);
      const leaf = app.graph.nodes.find((node) => node.type === "TMPO_Leaf");
      const linked = leaf.inputs.find((input) => input.name === "seed")?.link ?? null;
      return [linked, leaf.widgets.find((widget) => widget.name === "seed").value];
    });
  });
  assert.deepEqual(seeds, [null, 4]);

  // In a subgraph, whose inputs come from outside.
  await load();
  const inside = await page.evaluate(async () => {
    const { app } = window;
    const { subgraph } = app.graph.convertToSubgraph(
      new Set(app.graph.nodes.filter((node) => node.type !== "TMPO_DemoModelLoader")),
    );
    const { resample } = await import(window.resampled);
    const node = subgraph.nodes.find(({ type }) => type === "TMPO_TreeView");
    app.canvas.setGraph?.(subgraph);
    resample({ node, tree: { seed: "4" } }, { path: [0, 1, 2] });
    const [leaf, decode] = ["TMPO_Leaf", "VAEDecode"].map((type) => subgraph.nodes.findLast((each) => each.type === type));
    const source = (made, name) => subgraph.getLink(made.inputs.find((input) => input.name === name).link)?.origin_id;
    // Another subgraph may have a node with the same number.
    const around = app.graph.nodes.find((each) => each.subgraph === subgraph).id;
    const sampler = subgraph.nodes.find(({ type }) => type === "TMPO_TreeSampler").id;
    const nodes = [around + 1, around].map((id) => {
      const tree = { growing: true, nodes: [], leaves: [], stars: [] };
      node.tmpoTree.draw = () => {};
      app.api.dispatchEvent(new CustomEvent("tmpo.growing", {
        detail: { node: `${id}:${sampler}`, workflow: app.graph.id, tree, pictures: {} },
      }));
      return Boolean(node.tmpoTree.tree?.growing);
    });
    return [source(leaf, "model"), source(decode, "vae"), source(leaf, "positive") > 0, nodes, subgraph.inputNode.id];
  });
  assert.deepEqual(inside, [inside[4], inside[4], true, [false, true], inside[4]]);

  // Buttons keep their keys and leave the page's own to it; a finger adds leaves one by one.
  await load();
  await run();
  await frame([700, 640]);
  await page.locator(".tmpo-tree-leaf").nth(3).click();
  const one = await selected();
  await page.getByRole("button", { name: "Gallery" }).focus();
  await page.keyboard.press("Enter");
  assert.equal(await page.locator(".tmpo-gallery-leaf").count(), 27);
  assert.equal(await selected(), one);
  await page.getByRole("button", { name: "top 4" }).click();
  const queued = page.evaluate(() => new Promise((done) => {
    window.app.api.addEventListener("execution_success", () => done(true), { once: true });
    setTimeout(() => done(false), 20000);
  }));
  await page.keyboard.press("Control+Enter");
  assert.ok(await queued);
  await page.getByRole("button", { name: "clear", exact: true }).click();
  await page.evaluate(() => {
    for (const place of [2, 6]) {
      const leaf = document.querySelectorAll(".tmpo-tree-leaf")[place];
      leaf.dispatchEvent(new PointerEvent("click", { bubbles: true, pointerType: "touch" }));
    }
  });
  assert.equal(await page.locator(".tmpo-tree-leaf[aria-selected=true]").count(), 2);

  // What grows in another workflow, whose nodes may have the same ids, is not shown here.
  assert.deepEqual(await page.evaluate(() => ["another", window.app.graph.id].map((workflow) => {
    const { app, view } = window;
    const { tree } = view().tmpoTree;
    const { id } = app.graph.nodes.find((node) => node.type === "TMPO_TreeSampler");
    const detail = { node: String(id), workflow, tree: { ...tree, growing: true }, pictures: {} };
    app.api.dispatchEvent(new CustomEvent("tmpo.growing", { detail }));
    return Boolean(view().tmpoTree.tree.growing);
  })), [false, true]);

  // Colours of scores follow the theme at once, in both renderers.
  const theme = (name) => page.evaluate(async (palette) => {
    const { setting } = window.app.extensionManager;
    await setting.set("Comfy.ColorPalette", palette);
    await new Promise((done) => setTimeout(done, 600));
    return window.view().tmpoTree.theme;
  }, name);
  for (const vue of [false, true]) {
    if (vue && await page.evaluate(() => Number(window.__COMFYUI_FRONTEND_VERSION__.split(".")[1]) <= 27)) continue;
    await page.evaluate((on) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on), vue);
    assert.deepEqual([await theme("light"), await theme("dark")], ["light", "dark"]);
  }
  await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", false));

  // The prefix of a file has the page's own replacements.
  assert.match(await page.evaluate(async () => {
    const { app, LiteGraph } = window;
    const save = LiteGraph.createNode("TMPO_SaveLeaves");
    app.graph.add(save);
    app.graph.nodes.find((node) => node.type === "VAEDecode").connect(0, save, 0);
    save.widgets.find((widget) => widget.name === "filename_prefix").value = "%date:yyyy-MM%/%TMPO_TreeSampler.seed%_%width%";
    const { output } = await app.graphToPrompt();
    return output[save.id].inputs.filename_prefix;
  }), /^\d{4}-\d{2}\/4_%width%$/);
}

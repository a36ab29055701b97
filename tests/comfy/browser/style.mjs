// New nodes of this pack have its colour; a node from a saved workflow has the one that was saved, also none.

import assert from "node:assert/strict";

export async function check(page) {
  const colours = await page.evaluate(async () => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    const [mine, other] = ["TMPO_TreeView", "VAEDecode"].map((type) => {
      const node = LiteGraph.createNode(type);
      app.graph.add(node);
      return node;
    });
    const found = { mine: mine.color, other: other.color };
    const saved = app.graph.serialize();
    const loaded = async (change) => {
      const graph = structuredClone(saved);
      change(graph.nodes.find(({ type }) => type === "TMPO_TreeView"));
      await app.loadGraphData(graph);
      return app.graph.nodes.find(({ type }) => type === "TMPO_TreeView").color;
    };
    found.kept = await loaded(() => {});
    found.own = await loaded((node) => (node.color = "#222233"));
    found.none = await loaded((node) => delete node.color);
    return found;
  });
  assert.match(colours.mine, /^#[0-9a-f]{6}$/);
  assert.deepEqual(
    { ...colours, other: colours.other ?? null, none: colours.none ?? null },
    { mine: colours.mine, other: null, kept: colours.mine, own: "#222233", none: null },
  );
}

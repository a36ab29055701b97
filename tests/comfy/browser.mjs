// Tries the views of this pack in a real browser, by mouse and by keyboard: every module in browser/ that exports `check`.
//
// node browser.mjs URL FOLDER [MODULES [CHECK...]]
//   URL      of a running ComfyUI with this pack
//   FOLDER   for the screenshots
//   MODULES  folder whose node_modules has playwright-core, by default the current one
//   CHECK    names of the modules to run, by default all
// CHROMIUM names the browser, by default /usr/bin/chromium.

import assert from "node:assert/strict";
import { mkdirSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { toolsOf } from "./browser/tools.mjs";

const [url, folder, modules = ".", ...wanted] = process.argv.slice(2);
const { chromium } = createRequire(join(resolve(modules), "index.js"))("playwright-core");

mkdirSync(folder, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
try {
  for (const name of readdirSync(new URL("./browser/", import.meta.url)).sort()) {
    const { check } = await import(`./browser/${name}`);
    if (!check || (wanted.length && !wanted.includes(basename(name, ".mjs")))) continue;
    console.log(name);
    // Each has a page of its own, so that it finds ComfyUI as it is opened.
    const page = await browser.newPage({ viewport: { width: 1100, height: 1450 } });
    const problems = [];
    page.on("pageerror", (error) => error.stack.includes("tmpo") && problems.push(error.stack));
    const tools = await toolsOf(page, url, folder);
    await tools.open();
    await check(page, tools);
    assert.deepEqual(problems, []);
    await page.close();
  }
} finally {
  await browser.close();
}
console.log("ok");

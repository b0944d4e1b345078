// Servers that try to be more than text: whatever they send is shown as text. What the guard holds against a page is checked
// on every page that shows something of theirs.

import { expect, hostile, test } from "./fixtures.mjs";

const NAME = "<img class=injected src=x onerror=window.pwned=1>\u202esafe\u200b";

test("names, descriptions, schemas, results and errors are text", async ({ page, guard, api }) => {
  test.slow();
  const server = await api.create(NAME, hostile());
  await page.goto("/");
  await expect(page.getByRole("link", { name: /^<img class=injected/ })).toContainText("\\u{202e}safe\\u{200b}");
  await guard.look("hostile-servers");

  await page.goto(`/#/servers/${server.id}`);
  await expect(page.getByRole("heading", { level: 1 })).toContainText("<img class=injected");
  const tools = await api.tools(server.id);
  await expect(page.getByText("safe\\u{202e}gnp.exe").first()).toBeVisible();
  await expect(page.getByText("zero\\u{200b}width").first()).toBeVisible();
  await expect(page.getByText("\\u{1b}[31mred").first()).toBeVisible();
  await guard.look("hostile-tools");

  for (const { id, name } of tools) {
    await page.goto(`/#/servers/${server.id}/tools/${id}`);
    const run = page.getByRole("button", { name: "Run", exact: true });
    await expect(run, name).toBeVisible();
    await guard.harmless();
    if (name === "schema") await guard.look("hostile-schema");
    await run.click();
    const result = page.getByRole("region", { name: "Result" });
    await expect(result.getByText(/^(Success|Error of the tool)$/), name).toBeVisible();
    await guard.harmless();
    if (["markup", "markup-error", "svg", "not-an-image", "links", "json"].includes(name)) await guard.look(`hostile-${name}`);
    if (["svg", "not-an-image"].includes(name)) await expect(result.getByRole("img")).toHaveCount(0);
  }
});

test("megabytes are not all painted, and can be had", async ({ page, guard, api }) => {
  const server = await api.create("big", hostile());
  const tools = await api.tools(server.id);
  for (const [name, size] of [["megabytes", 68 * 60_000], ["one-line", 3_000_000]]) {
    await page.goto(`/#/servers/${server.id}/tools/${tools.find((it) => it.name === name).id}`);
    await page.getByRole("button", { name: "Run", exact: true }).click();
    const result = page.getByRole("region", { name: "Result" });
    const download = result.getByRole("button", { name: /Download/ }).first();
    await expect(download).toBeVisible();
    expect(await page.evaluate(() => document.body.textContent.length), name).toBeLessThan(500_000);
    await guard.look(`hostile-${name}`);
    const [file] = await Promise.all([page.waitForEvent("download"), download.click()]);
    let length = 0;
    for await (const piece of await file.createReadStream()) length += piece.length;
    expect(length, name).toBeGreaterThanOrEqual(size);
  }
});

test("two thousand tools can be looked through", async ({ page, guard, api }) => {
  const server = await api.create("many", hostile(2000));
  await page.goto(`/#/servers/${server.id}`);
  await expect(page.getByRole("link", { name: "markup-error" })).toBeVisible();
  await page.getByRole("searchbox").or(page.getByLabel(/Filter/)).first().fill("tool-1234");
  await expect(page.getByRole("link", { name: "tool-1234" })).toBeVisible();
  await expect(page.getByRole("link", { name: "markup-error" })).toBeHidden();
  await guard.look("hostile-many");
  await page.getByRole("link", { name: "tool-1234" }).click();
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await expect(page.getByRole("region", { name: "Result" })).toContainText("ran");
});

// Servers that try to be more than text: whatever they send is shown as text. What the guard holds against a page is checked
// on every page that shows something of theirs, and on what files and addresses of others bring.

import fs from "node:fs";
import path from "node:path";

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

test.describe("where changes are held and arguments are kept", () => {
  test.use({ settings: { PORTOLAN_TOOL_CHANGES: "hold", PORTOLAN_LOG_ARGUMENTS: "true" } });

  test("what was done, and what is asked before something is done, is text", async ({ page, guard, api, portolan }) => {
    test.slow();
    guard.expect(422);
    const file = path.join(portolan.folder, "changed");
    const server = await api.create(NAME, hostile(0, file));
    const tools = await api.tools(server.id);
    const markup = tools.find((it) => it.name.startsWith("<script"));
    for (const { id } of tools.filter((it) => !["megabytes", "one-line"].includes(it.name))) {
      await api.call("POST", `/v1/mcp-servers/${server.id}/tools/${id}/run`, { args: { [NAME]: NAME } });
    }

    // What a refresh tells, and what waits for an approval, beside what was there before.
    await page.goto(`/#/servers/${server.id}`);
    await expect(page.getByRole("link", { name: "markup-error" })).toBeVisible();
    fs.writeFileSync(file, "");
    await page.getByRole("button", { name: "Refresh tools" }).click();
    const report = page.getByRole("region", { name: "What the refresh did" });
    for (const part of ["Held until they are approved", "Deleted", "Not kept", "With hidden characters"]) {
      await expect(report.getByRole("heading", { name: part })).toBeVisible();
    }
    const held = page.getByRole("region", { name: "Held tool <script class=injected>" });
    await expect(held.getByRole("region", { name: "new description" })).toContainText("safe\\u{202e}gnp.exe");
    await expect(held.getByRole("region", { name: "old description" })).toContainText("Its name is markup");
    await guard.look("hostile-refresh");
    await page.goto(`/#/servers/${server.id}/tools/${markup.id}`);
    await expect(page.getByRole("button", { name: "Approve <script class=injected>" })).toBeVisible();
    await guard.look("hostile-held");

    // The questions and forms.
    await page.goto("/");
    await page.getByRole("button", { name: "Delete <img class=injected" }).click();
    await expect(page.getByRole("dialog")).toContainText("<img class=injected");
    await guard.look("hostile-delete");
    await page.goto(`/#/servers/${server.id}/edit`);
    await expect(page.getByRole("heading", { level: 1 })).toContainText("<img class=injected");
    await guard.look("hostile-edit");

    // Signing in: what the server itself says, and what it would take a broken Portolan to pass on.
    await page.goto(`/#/servers/${server.id}/sign-in`);
    await page.getByRole("button", { name: "Connect", exact: true }).click();
    await expect(page.getByRole("main").getByText(/^Connected\. \d+ tools were read/)).toBeVisible();
    await guard.look("hostile-sign-in");
    for (const [index, url] of [`javascript:window.pwned=1//${NAME}`, `data:text/html,${NAME}`, NAME, null].entries()) {
      const events = [
        { event: "connection_attempt", server_name: NAME },
        { event: "oauth_required", message: NAME },
        { event: "authorization_url", url, session_id: NAME },
        { event: NAME },
        { event: "error", message: NAME },
      ];
      const body = events.map((event) => `data: ${JSON.stringify(event)}\n\n`).join("");
      await page.route("**/v1/mcp-servers/connect/*", (route) => route.fulfill({ contentType: "text/event-stream", body }), { times: 1 });
      await page.getByRole("button", { name: /^(Connect|Start again)$/ }).click();
      await expect(page.getByText("It failed: <img class=injected")).toBeVisible();
      await expect(page.getByText("a sign-in page that is no web address"), String(url)).toBeVisible();
      await expect(page.getByRole("link", { name: "Open the sign-in page" })).toHaveCount(0);
      await guard.harmless();
      if (index === 0) await guard.look("hostile-sign-in-page");
    }

    // The file of another program.
    const entry = { command: "true", args: [NAME], [NAME]: NAME, env: { KEY: "${HOSTILE}" } };
    await page.goto("/#/add?how=file");
    await page.getByLabel("Configuration file").fill(JSON.stringify({ mcpServers: { [`${NAME} broken`]: {} } }));
    await page.getByRole("button", { name: "Check the file" }).click();
    await expect(page.getByRole("alert")).toContainText("<img class=injected");
    await guard.look("hostile-import-refused");
    await page.getByLabel("Configuration file").fill(JSON.stringify({ mcpServers: { [`${NAME} added`]: entry }, [NAME]: NAME }));
    await page.getByRole("button", { name: "Check the file" }).click();
    await expect(page.getByRole("heading", { name: "What would be done" })).toBeVisible();
    await expect(page.getByRole("heading", { name: "Not taken over" })).toBeVisible();
    await guard.look("hostile-import");

    // What was done. The server is one of those to choose from.
    await page.goto("/#/runs");
    const run = page.getByRole("row").filter({ has: page.getByRole("link", { name: "<script class=injected>" }) });
    const details = run.getByRole("button", { name: /Details/ });
    // One line high: long names of others do not squeeze our own words.
    expect((await details.boundingBox()).height).toBeLessThan(60);
    await details.click();
    await expect(page.getByRole("region", { name: "Arguments" })).toContainText("<img class=injected");
    await expect(page.getByLabel("Server", { exact: true }).getByRole("option", { name: "<img class=injected" })).toBeAttached();
    await guard.look("hostile-runs");
    await page.goto("/#/changes");
    const refreshed = page.getByRole("row").filter({ hasText: "Tools changed" }).first();
    await expect(refreshed).toContainText("updated: markup, markup-error, <script class=injected>");
    await expect(refreshed).toContainText("held: 15");
    await guard.look("hostile-changes");
    const query = new URLSearchParams({ mcp_server_id: NAME, tool_id: NAME, caller: NAME, outcome: NAME, since: NAME });
    await page.goto(`/#/runs?${query}`);
    await expect(page.getByRole("alert")).toBeVisible();
    await guard.look("hostile-address");
  });
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

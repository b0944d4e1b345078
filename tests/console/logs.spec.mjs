// What was done: the pages of runs and of changes.

import { everything, expect, test } from "./fixtures.mjs";

const rows = (page) => page.getByRole("table").locator("tbody tr:not(.details)");

test("without a run the page says where to run one", async ({ page, guard, portolan }) => {
  await page.goto("/#/runs");
  await expect(page.getByText("No tool has been run yet")).toBeVisible();
  await guard.look("runs-empty");
  await page.goto("/#/changes");
  await expect(page.getByText("Nothing has been changed yet")).toBeVisible();
  await guard.look("changes-empty");
});

test("runs are filtered and paged", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture();
  const first = await api.create("first", upstream.fields);
  const second = await api.create("second", everything);
  for (let run = 1; run <= 59; run++) await api.run(first.id, "echo", { message: `number ${run}` });
  await api.run(first.id, "fail", { message: "broken" });
  await api.run(second.id, "echo", { message: "elsewhere" });

  await page.goto("/");
  await page.getByRole("link", { name: "Runs", exact: true }).click();
  await expect(page.getByRole("heading", { name: "Runs", level: 1 })).toBeFocused();
  // They are written a moment after they were answered.
  await expect(async () => {
    await page.getByRole("button", { name: "Show", exact: true }).click();
    await expect(rows(page).first()).toContainText("second", { timeout: 2000 });
  }).toPass();
  await expect(rows(page)).toHaveCount(50);
  await guard.look("runs");
  await page.getByRole("button", { name: "Show older" }).click();
  await expect(rows(page)).toHaveCount(61);
  await expect(page.getByRole("button", { name: "Show older" })).toHaveCount(0);

  await page.getByLabel("Outcome").selectOption({ label: "Error" });
  await page.getByRole("button", { name: "Show", exact: true }).click();
  await expect(rows(page)).toHaveCount(1);
  await expect(rows(page)).toContainText("fail");
  await rows(page).getByRole("button", { name: /Details/ }).click();
  await expect(page.getByText("--log-arguments")).toBeVisible();
  await guard.look("runs-filtered");
  // The filter is in the address, for a reload and for others.
  await page.reload();
  await expect(rows(page)).toHaveCount(1);
  await page.getByRole("link", { name: "Clear" }).click();
  await page.getByLabel("Server", { exact: true }).selectOption({ label: "second" });
  await page.getByRole("button", { name: "Show", exact: true }).click();
  await expect(rows(page)).toHaveCount(1);
  await page.getByLabel("Caller").fill("nobody");
  await page.getByRole("button", { name: "Show", exact: true }).click();
  await expect(page.getByText("Nothing is like this")).toBeVisible();
});

test.describe("far from Greenwich", () => {
  test.use({ timezoneId: "Asia/Kolkata" });

  test("runs of one tool, and of a time, are found", async ({ page, guard, api, upstreams }) => {
    const upstream = await upstreams.fixture();
    const server = await api.create("first", upstream.fields);
    await api.run(server.id, "echo", { message: "hello" });
    await api.run(server.id, "fail", { message: "broken" });
    const { id } = (await api.tools(server.id)).find((it) => it.name === "echo");
    const show = page.getByRole("button", { name: "Show", exact: true });
    await page.goto(`/#/runs?mcp_server_id=${server.id}&tool_id=${id}`);
    await expect(rows(page)).toHaveCount(1);
    await expect(rows(page)).toContainText("echo");
    await expect(page.getByText("Of one tool alone")).toBeVisible();

    // The clock of whoever looks, 5:30 before the one of the API.
    const clock = (hours) => new Date(Date.now() + (5.5 + hours) * 3_600_000).toISOString().slice(0, 16);
    const [from, until] = [page.getByLabel("From"), page.getByLabel("Until")];
    const [earlier, later] = [clock(-1), clock(1)];
    for (const [since, to, found] of [[later, "", 0], ["", earlier, 0], [earlier, later, 1]]) {
      await from.fill(since);
      await until.fill(to);
      await show.click();
      await expect(rows(page)).toHaveCount(found);
      await expect(page.getByText("Nothing is like this")).toHaveCount(found ? 0 : 1);
    }
    await page.reload();
    await expect(rows(page)).toHaveCount(1);
    await expect(from).toHaveValue(earlier);
    await expect(until).toHaveValue(later);
    await guard.look("runs-of-a-time");
    await page.getByRole("link", { name: "All tools of its server" }).click();
    await expect(rows(page)).toHaveCount(2);
  });
});

test("a run that was cut off says whether the tool may have run", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture("stdio", { effects: true });
  const server = await api.create("slow", upstream.fields);
  const tool = (await api.tools(server.id)).find((it) => it.name === "work");
  await page.goto(`/#/servers/${server.id}/tools/${tool.id}`);
  await page.getByLabel("seconds", { exact: true }).fill("60");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await expect.poll(() => upstream.worked()).toBe(1);
  await page.getByRole("button", { name: "Cancel" }).click();
  await page.goto("/#/runs");
  await expect(async () => {
    await page.getByRole("button", { name: "Show", exact: true }).click();
    await expect(rows(page)).toHaveCount(1, { timeout: 2000 });
  }).toPass();
  await expect(rows(page)).toContainText("Cut off");
  await rows(page).getByRole("button", { name: /Details/ }).click();
  await expect(page.getByText("The tool may have been run")).toBeVisible();
  await guard.look("runs-cut-off");
});

test.describe("with arguments kept", () => {
  test.use({ settings: { PORTOLAN_LOG_ARGUMENTS: "true" } });

  test("a run shows what went in and what came out", async ({ page, guard, api, upstreams }) => {
    const upstream = await upstreams.fixture();
    const server = await api.create("first", upstream.fields);
    await api.run(server.id, "echo", { message: "<b>what went in</b>\u202e" });
    await page.goto("/#/runs");
    await expect(async () => {
      await page.getByRole("button", { name: "Show", exact: true }).click();
      await expect(rows(page)).toHaveCount(1, { timeout: 2000 });
    }).toPass();
    await rows(page).getByRole("button", { name: /Details/ }).click();
    await expect(page.getByRole("region", { name: "Arguments" })).toContainText("<b>what went in</b>\\u{202e}");
    await expect(page.getByRole("region", { name: "Result" })).toContainText("<b>what went in</b>\\u{202e}");
    await guard.look("runs-details");
  });
});

test("changes tell who did what", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture();
  const server = await api.create("first", upstream.fields);
  upstream.setState({ hide: ["add"], extra: { later: "Came later" } });
  await api.call("PATCH", `/v1/mcp-servers/${server.id}/refresh`);
  await api.call("PATCH", `/v1/mcp-servers/${server.id}`, { server_name: "renamed" });
  await api.call("DELETE", `/v1/mcp-servers/${server.id}`);
  await page.goto("/");
  await page.getByRole("link", { name: "Changes", exact: true }).click();
  await expect(page.getByRole("heading", { name: "Changes", level: 1 })).toBeFocused();
  for (const what of ["Server registered", "Tools changed", "Server changed", "Server deleted"]) {
    await expect(rows(page).filter({ hasText: what }).first()).toBeVisible();
  }
  await expect(rows(page).filter({ hasText: "Tools changed" }).first()).toContainText("later");
  await guard.look("changes");
});

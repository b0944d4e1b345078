// Who may come in: the prompt for a token, and what a narrow one sees.

import { everything, expect, test } from "./fixtures.mjs";

const TOKEN = "admin-0123456789abcdef";

test.describe("with a token", () => {
  test.use({ settings: { PORTOLAN_TOKEN: TOKEN } });

  test("a wrong token, the right one, and out again", async ({ page, guard, api }) => {
    await api.create("first", everything);
    guard.expect(401);
    await page.goto("/");
    const prompt = page.getByRole("dialog", { name: "Token" });
    const field = prompt.getByLabel("Token", { exact: true });
    await expect(field).toBeFocused();
    await expect(field).toHaveAttribute("type", "password");
    await guard.look("token-prompt");

    await field.fill("not a token");
    await field.press("Enter");
    await expect(field).toHaveAccessibleDescription(/without spaces/);
    await field.fill("wrong-0123456789abcdef");
    await field.press("Enter");
    await expect(prompt.getByRole("alert")).toContainText("not taken");
    await guard.look("token-refused");
    await field.fill(TOKEN);
    await prompt.getByRole("button", { name: "Use this token" }).click();
    await expect(prompt).toBeHidden();
    await expect(page.getByRole("link", { name: "first", exact: true })).toBeVisible();

    // This tab keeps it, and nothing else does.
    await page.reload();
    await expect(page.getByRole("link", { name: "first", exact: true })).toBeVisible();
    await expect(prompt).toBeHidden();
    const kept = await page.evaluate(() => ({ local: { ...localStorage }, address: location.href, text: document.documentElement.outerHTML }));
    expect(JSON.stringify(kept)).not.toContain(TOKEN);

    await page.getByRole("button", { name: "Log out" }).click();
    await expect(prompt).toBeVisible();
    await expect(page.getByRole("link", { name: "first", exact: true })).toBeHidden();
    expect(await page.evaluate(() => ({ ...sessionStorage }))).toEqual({});
    await page.keyboard.press("Escape");
    await expect(prompt).toBeHidden();
    await expect(page.getByRole("alert")).toBeVisible();
    await guard.look("token-missing");
  });
});

test.describe("with a token that reads", () => {
  test.use({ settings: { tokens: { admin: "admin", reader: "read", runner: "run" } } });

  const enter = async (page, token) => {
    await page.goto("/");
    await page.getByRole("dialog").getByLabel("Token", { exact: true }).fill(token);
    await page.keyboard.press("Enter");
    await expect(page.getByRole("dialog")).toBeHidden();
  };

  test("what it may not do is told, and nothing breaks", async ({ page, guard, api, portolan }) => {
    const server = await api.create("first", everything);
    guard.expect(401, 403);
    await enter(page, portolan.tokens.reader);
    await page.getByRole("link", { name: "first", exact: true }).click();
    await expect(page.getByRole("heading", { name: "first", level: 1 })).toBeVisible();

    await page.getByRole("button", { name: "Refresh" }).click();
    await expect(page.getByRole("alert")).toContainText(/token/);
    await guard.look("read-refresh");

    await page.goto(`/#/servers/${server.id}`);
    await page.getByRole("link", { name: "echo", exact: true }).click();
    await page.getByLabel(/^message/).fill("hello");
    await page.getByRole("button", { name: "Run", exact: true }).click();
    const result = page.getByRole("region", { name: "Result" });
    await expect(result).toContainText("Failed");
    await expect(result).toContainText(/token/);
    await guard.look("read-run");

    for (const name of ["Runs", "Changes"]) {
      await page.getByRole("link", { name, exact: true }).click();
      await expect(page.getByRole("heading", { name, level: 1 })).toBeVisible();
      await expect(page.getByRole("alert")).toContainText(/admin/);
    }
    expect((await api.servers()).length).toBe(1);
  });

  test("a token for runs runs", async ({ page, guard, api, portolan }) => {
    const server = await api.create("first", everything);
    guard.expect(401);
    await enter(page, portolan.tokens.runner);
    await page.getByRole("link", { name: "first", exact: true }).click();
    await page.getByRole("link", { name: "echo", exact: true }).click();
    await page.getByLabel(/^message/).fill("hello");
    await page.getByRole("button", { name: "Run", exact: true }).click();
    await expect(page.getByRole("region", { name: "Result" })).toContainText("hello");
    expect(server.status.state).toBe("ready");
  });
});

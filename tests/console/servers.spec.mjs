// The servers: none yet, added by form or by file, as they come and go, signed in to, changed and deleted.

import { everything, expect, test } from "./fixtures.mjs";

const card = (page, name) => page.getByRole("listitem").filter({ has: page.getByRole("link", { name, exact: true }) });

test("without a server the page says how to add one", async ({ page, guard, portolan }) => {
  await page.goto("/");
  await expect(page).toHaveTitle(/Servers/);
  await expect(page.getByText("There is no server yet")).toBeVisible();
  await guard.look("servers-empty");
  await page.getByRole("main").getByRole("link", { name: "Add a server" }).click();
  await expect(page.getByRole("heading", { name: "Add a server", level: 1 })).toBeFocused();
});

test("a command is added by the form", async ({ page, guard, api }) => {
  await page.goto("/#/add");
  await page.getByLabel("Name", { exact: true }).fill("by command");
  await page.getByLabel("Command", { exact: false }).and(page.getByRole("radio")).check();
  await page.getByLabel("Command", { exact: true }).and(page.getByRole("textbox")).fill(everything.command);
  for (const [index, argument] of everything.args.entries()) {
    await page.getByRole("button", { name: "Add an argument" }).click();
    await expect(page.getByLabel(`Argument ${index + 1}`, { exact: true })).toBeFocused();
    await page.keyboard.type(argument);
  }
  await page.getByRole("button", { name: "Add a variable" }).click();
  await page.getByLabel("Name of variable 1").fill("API_TOKEN");
  await page.getByLabel("Value of variable 1").fill("secret-of-the-server");
  await guard.look("add-command");
  await page.getByRole("button", { name: "Add the server" }).click();

  await expect(page.getByRole("heading", { name: "by command", level: 1 })).toBeVisible();
  await expect(page.getByText("Ready", { exact: true })).toBeVisible();
  await expect(page.getByRole("link", { name: "echo", exact: true })).toBeVisible();
  await expect(page.getByText("secret-of-the-server")).toHaveCount(0);
  const [server] = await api.servers();
  expect(server).toMatchObject({ server_name: "by command", mcp_server_type: "stdio", ...everything });
  const { result } = await api.run(server.id, "get-env");
  expect(result.content[0].text).toContain("secret-of-the-server");
});

test("a URL is added by the form", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture("streamable_http", { require: "X-Key: key-of-the-server" });
  await page.goto("/#/add");
  await page.getByLabel("Name", { exact: true }).fill("by URL");
  await page.getByRole("textbox", { name: "URL" }).fill(upstream.fields.server_url);
  await page.getByLabel("Token", { exact: true }).fill("key-of-the-server");
  await page.getByLabel("Header of the token").fill("X-Key");
  await page.getByRole("button", { name: "Add a header" }).click();
  await page.getByLabel("Name of header 1").fill("X-More");
  await page.getByLabel("Value of header 1").fill("more");
  await guard.look("add-url");
  await page.getByRole("button", { name: "Add the server" }).click();

  await expect(page.getByRole("heading", { name: "by URL", level: 1 })).toBeVisible();
  await expect(page.getByText("Ready", { exact: true })).toBeVisible();
  const [server] = await api.servers();
  const { result } = await api.run(server.id, "whoami");
  expect(JSON.parse(result.content[0].text).headers).toMatchObject({ "x-key": "key-of-the-server", "x-more": "more" });
});

test("what the API refuses is told at its field", async ({ page, guard, api }) => {
  guard.expect(422, 409);
  await api.create("taken", { server_url: "http://127.0.0.1:1/mcp" });
  await page.goto("/#/add");
  await page.getByRole("textbox", { name: "URL" }).fill("file:///etc/passwd");
  await page.getByRole("button", { name: "Add the server" }).click();
  const name = page.getByLabel("Name", { exact: true });
  const url = page.getByRole("textbox", { name: "URL" });
  await expect(name).toHaveAttribute("aria-invalid", "true");
  await expect(name).toBeFocused();
  await expect(url).toHaveAttribute("aria-invalid", "true");
  await expect(url).toHaveAccessibleDescription(/http/);
  await guard.look("add-refused");

  await name.fill("taken");
  await url.fill("http://127.0.0.1:1/mcp");
  await page.getByRole("button", { name: "Add the server" }).click();
  await expect(name).toHaveAccessibleDescription(/name/);
  await expect(url).not.toHaveAttribute("aria-invalid", "true");
  expect((await api.servers()).length).toBe(1);
});

test("a file is looked at before it is imported", async ({ page, guard, api }) => {
  guard.expect(422);
  const file = { mcpServers: { first: everything, second: { url: "http://127.0.0.1:1/mcp" }, off: { command: "true", disabled: true } } };
  await page.goto("/#/add");
  await page.getByRole("link", { name: "By a configuration file" }).click();
  const text = page.getByLabel("Configuration file");
  await text.fill('{"mcpServers": {"broken": {}}}');
  await page.getByRole("button", { name: "Check the file" }).click();
  await expect(page.getByRole("alert")).toContainText("broken");
  await guard.look("import-refused");

  await text.fill(JSON.stringify(file, null, 2));
  await page.getByRole("button", { name: "Check the file" }).click();
  await expect(page.getByRole("heading", { name: "What would be done" })).toBeVisible();
  await expect(page.getByRole("definition").filter({ hasText: "first" })).toContainText("second");
  expect(await api.servers()).toEqual([]);
  await guard.look("import-checked");
  await page.getByRole("button", { name: "Import", exact: true }).click();
  await expect(page.getByRole("heading", { name: "Imported" })).toBeVisible();
  await guard.look("import-done");
  await page.getByRole("link", { name: "See how they are" }).click();
  await expect(card(page, "first").getByText("Ready", { exact: true })).toBeVisible();
  await expect(card(page, "second").getByText("Unreachable")).toBeVisible();
  expect((await api.servers()).map((it) => it.server_name)).toEqual(["first", "second"]);
});

test.describe("with sessions that are looked after often", () => {
  // A quarter of it is the time between two looks.
  test.use({ settings: { PORTOLAN_IDLE_TIMEOUT: "20s" } });

  test("the list shows a server die and come back", async ({ page, guard, api, upstreams }) => {
    const upstream = await upstreams.everythingHttp();
    const server = await api.create("mortal", { server_url: upstream.url });
    await page.goto("/");
    const mortal = card(page, "mortal");
    await expect(mortal.getByText("Ready", { exact: true })).toBeVisible();
    const filter = page.getByRole("searchbox");
    await filter.fill("mort");
    // Only who holds a session is told of its end.
    expect((await api.run(server.id, "echo", { message: "alive" })).status).toBe("success");
    await upstream.die();
    // Nobody asks Portolan to look, and nothing is pressed.
    await expect(mortal.getByText("Unreachable")).toBeVisible({ timeout: 60_000 });
    await expect(mortal).toContainText(/cannot be (reached|used)|ended|refused/);
    await expect(filter).toBeFocused();
    await guard.look("servers-unreachable");
    await upstream.start();
    await expect(mortal.getByText("Ready", { exact: true })).toBeVisible({ timeout: 60_000 });
    await expect(filter).toHaveValue("mort");
  });
});

test("a server that is away is connected to by hand", async ({ page, guard, api, upstreams }) => {
  guard.expect(404);
  const upstream = await upstreams.everythingHttp();
  await upstream.die();
  await api.create("away", { server_url: upstream.url });
  await page.goto("/");
  await page.getByRole("button", { name: "Connect to away" }).click();
  await expect(page.locator("[aria-live]").filter({ hasText: "not reached" })).toBeAttached();
  await expect(card(page, "away").getByText("Unreachable")).toBeVisible();
  await upstream.start();
  await page.getByRole("button", { name: "Connect to away" }).click();
  await expect(card(page, "away").getByText("Ready", { exact: true })).toBeVisible();
});

test("signing in: the stream, the page of somebody else, and the tools", async ({ page, context, guard, api, upstreams }) => {
  const upstream = await upstreams.oauth();
  guard.elsewhere.add(new URL(upstream.url).origin);
  const server = await api.create("notes", { server_url: upstream.url });
  expect(server.status.state).toBe("auth_required");
  await page.goto("/");
  await guard.look("servers-sign-in");
  await page.getByRole("link", { name: "Sign in to notes" }).click();
  await page.getByRole("button", { name: "Connect" }).click();
  const link = page.getByRole("link", { name: "Open the sign-in page" });
  await expect(link).toHaveAttribute("rel", /noopener/);
  await expect(page.getByText("Waiting until you have signed in")).toBeVisible();
  await guard.look("sign-in-waiting");

  // First a no.
  let [other] = await Promise.all([context.waitForEvent("page"), link.click()]);
  await other.getByRole("button", { name: "Refuse" }).click();
  await expect(page.getByText(/It failed/)).toBeVisible();
  await guard.look("sign-in-refused");
  await other.close();

  await page.getByRole("button", { name: "Start again" }).click();
  [other] = await Promise.all([context.waitForEvent("page"), link.click()]);
  expect(await other.evaluate(() => window.opener)).toBe(null);
  await other.getByRole("button", { name: "Allow" }).click();
  await expect(other.getByRole("heading", { name: "Signed in" })).toBeVisible();
  await other.close();
  await expect(page.getByText("Connected. 1 tool was read")).toBeVisible();
  await guard.look("sign-in-done");
  await page.getByRole("link", { name: "See the tools" }).click();
  await expect(page.getByRole("link", { name: "notes", exact: true })).toBeVisible();
  expect((await api.run(server.id, "notes")).func_return).toBe("a private note");
});

test("a server gets another name and another address", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture("streamable_http");
  await api.create("old", { server_url: "http://127.0.0.1:1/mcp", auth_token: "kept-token-0123456789" });
  await page.goto("/");
  await page.getByRole("link", { name: "Edit old" }).click();
  await page.getByLabel("Name", { exact: true }).fill("new");
  await page.getByRole("textbox", { name: "URL" }).fill(upstream.fields.server_url);
  await guard.look("edit");
  await page.getByRole("button", { name: "Save" }).click();
  await expect(page.getByRole("heading", { name: "new", level: 1 })).toBeVisible();
  await page.getByRole("button", { name: "Refresh tools" }).click();
  await expect(page.getByText("Ready", { exact: true })).toBeVisible();
  const [server] = await api.servers();
  const { result } = await api.run(server.id, "whoami");
  expect(JSON.parse(result.content[0].text).headers.authorization).toBe("Bearer kept-token-0123456789");
});

test("a server is deleted after a question", async ({ page, guard, api }) => {
  await api.create("leaving", everything);
  await api.create("staying", { server_url: "http://127.0.0.1:1/mcp" });
  await page.goto("/");
  await page.getByRole("button", { name: "Delete leaving" }).click();
  const question = page.getByRole("dialog");
  await expect(question).toContainText("leaving");
  await guard.look("delete");
  await question.getByRole("button", { name: "Cancel" }).click();
  await expect(page.getByRole("button", { name: "Delete leaving" })).toBeFocused();
  expect((await api.servers()).length).toBe(2);
  await page.keyboard.press("Enter");
  await question.getByRole("button", { name: "Delete", exact: false }).click();
  await expect(card(page, "leaving")).toHaveCount(0);
  await expect(card(page, "staying")).toBeVisible();
  await expect(page.getByRole("heading", { level: 1 })).toBeFocused();

  await card(page, "staying").getByRole("link", { name: "staying", exact: true }).click();
  await page.getByRole("button", { name: "Delete" }).click();
  await question.getByRole("button", { name: "Delete", exact: false }).click();
  await expect(page.getByText("There is no server yet")).toBeVisible();
  expect(await api.servers()).toEqual([]);
});

test("Portolan is away, and comes back", async ({ page, guard, api, gate, portolan }) => {
  guard.expect("connection");
  await api.create("first", { server_url: "http://127.0.0.1:1/mcp" });
  await page.goto("/");
  await expect(card(page, "first")).toBeVisible();
  gate.close();
  await expect(page.getByRole("alert")).toContainText("cannot be reached");
  await expect(card(page, "first")).toBeVisible();
  await guard.look("portolan-away");
  gate.target = portolan.url;
  await page.getByRole("button", { name: "Try again" }).click();
  await expect(page.getByRole("alert")).toHaveCount(0);
});

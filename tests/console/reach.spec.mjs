// Who has no mouse, a small window, large letters or a theme of their own gets everything that the others get.

import { everything, expect, test } from "./fixtures.mjs";

/** Presses Tab until what has the focus is `target`; the focus is never lost on the way. */
async function tabTo(page, target) {
  const seen = [];
  for (let step = 0; step < 80; step++) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => {
      const it = document.activeElement;
      if (!it || it === document.body) return null;
      const box = it.getBoundingClientRect();
      const style = getComputedStyle(it);
      return { name: it.outerHTML.slice(0, 120), seen: box.width > 0 && box.height > 0, ring: style.outlineStyle !== "none" && style.outlineWidth !== "0px" };
    });
    // From the last one on a page the focus goes through the browser's own window.
    if (at === null) continue;
    seen.push(at.name);
    expect(at.seen && at.ring, `whoever tabs sees where they are: ${at.name}`).toBe(true);
    if (await target.evaluate((it) => it === document.activeElement)) return;
  }
  throw new Error(`Tab does not get there; it went over\n${seen.join("\n")}`);
}

/** Presses what has the focus, and waits until the page is as `then` says; the focus is still somewhere. */
async function press(page, then) {
  await page.keyboard.press("Enter");
  await then();
  await focused(page);
}

async function focused(page) {
  expect(await page.evaluate(() => document.activeElement !== document.body), "something has the focus").toBe(true);
}

test("a server is added and its tool run with the keyboard alone", async ({ page, guard, api }) => {
  await page.goto("/");
  await expect(page.getByText("There is no server yet")).toBeVisible();
  await page.keyboard.press("Tab");
  await expect(page.getByRole("link", { name: "Skip to the page" })).toBeFocused();
  await page.keyboard.press("Enter");
  await expect(page.getByRole("main")).toBeFocused();
  await tabTo(page, page.getByRole("main").getByRole("link", { name: "Add a server" }));
  await page.keyboard.press("Enter");
  await expect(page.getByRole("heading", { name: "Add a server", level: 1 })).toBeFocused();

  await tabTo(page, page.getByLabel("Name", { exact: true }));
  await page.keyboard.type("by keyboard");
  await page.keyboard.press("Tab");
  for (let step = 0; step < 3 && !(await page.getByRole("radio", { name: /^Command/ }).isChecked()); step++) await page.keyboard.press("ArrowUp");
  await focused(page);
  await tabTo(page, page.getByRole("textbox", { name: "Command" }));
  await page.keyboard.type(everything.command);
  for (const argument of everything.args) {
    await tabTo(page, page.getByRole("button", { name: "Add an argument" }));
    const count = await page.getByLabel(/^Argument/).count();
    await press(page, () => expect(page.getByLabel(/^Argument/)).toHaveCount(count + 1));
    await page.keyboard.type(argument);
  }
  await page.keyboard.press("Enter");
  await expect(page.getByRole("heading", { name: "by keyboard", level: 1 })).toBeFocused();
  expect((await api.servers())[0]).toMatchObject(everything);

  await tabTo(page, page.getByRole("link", { name: "echo", exact: true }));
  await page.keyboard.press("Enter");
  await expect(page.getByRole("heading", { name: "echo", level: 1 })).toBeFocused();
  await tabTo(page, page.getByLabel("message", { exact: true }));
  await page.keyboard.type("typed");
  await tabTo(page, page.getByRole("button", { name: "Run", exact: true }));
  await press(page, () => expect(page.getByRole("region", { name: "Result" })).toContainText("Echo: typed"));
  await expect(page.getByRole("button", { name: "Run", exact: true })).toBeFocused();

  // A question takes the focus, keeps it, and gives it back.
  await page.goBack();
  await expect(page.getByRole("heading", { name: "by keyboard", level: 1 })).toBeFocused();
  await tabTo(page, page.getByRole("button", { name: "Refresh tools" }));
  const report = page.getByRole("region", { name: "What the refresh did" });
  await press(page, () => expect(report).toBeVisible());
  await tabTo(page, report.getByRole("button", { name: "Close" }));
  await press(page, () => expect(report).toHaveCount(0));
  const remove = page.getByRole("button", { name: "Delete…" });
  await tabTo(page, remove);
  await page.keyboard.press("Enter");
  const question = page.getByRole("dialog");
  await expect(question).toBeVisible();
  for (let step = 0; step < 4; step++) {
    await page.keyboard.press("Tab");
    const outside = await page.evaluate(() => document.activeElement !== document.body && !document.activeElement.closest("dialog"));
    expect(outside, "the focus is not behind the question").toBe(false);
  }
  await page.keyboard.press("Escape");
  await expect(question).toBeHidden();
  await expect(remove).toBeFocused();
});

test("what is pressed and gone leaves the focus on the page", async ({ page, guard, api, upstreams }) => {
  const upstream = await upstreams.fixture("stdio", { effects: true });
  const server = await api.create("slow", upstream.fields);
  const tool = (await api.tools(server.id)).find((it) => it.name === "work");
  await api.run(server.id, "echo", { message: "hello" });
  await page.goto(`/#/servers/${server.id}/tools/${tool.id}`);
  await page.getByLabel("seconds", { exact: true }).fill("60");
  await page.keyboard.press("Control+Enter");
  await tabTo(page, page.getByRole("button", { name: "Cancel" }));
  await press(page, () => expect(page.getByRole("region", { name: "Result" })).toContainText("Cancelled"));

  await page.goto("/#/runs");
  await page.getByLabel("Outcome").selectOption({ label: "Success" });
  await tabTo(page, page.getByRole("button", { name: "Show", exact: true }));
  await press(page, () => expect(page.getByRole("link", { name: "Clear" })).toBeVisible());
  await tabTo(page, page.getByRole("link", { name: "Clear" }));
  await press(page, () => expect(page.getByRole("link", { name: "Clear" })).toHaveCount(0));
});

test("what happens is said to who does not see it", async ({ page, guard, api }) => {
  const server = await api.create("everything", everything);
  const said = page.locator("[aria-live=polite]");
  await page.goto(`/#/servers/${server.id}`);
  await page.getByRole("button", { name: "Refresh tools" }).click();
  await expect(said).toContainText("The tools were read");
  await page.getByRole("link", { name: "echo", exact: true }).click();
  await page.getByLabel("message", { exact: true }).fill("hello");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await expect(said).toContainText("Success");
  await expect(page).toHaveTitle(/^echo/);
  // One heading of the first rank, and none left out below it.
  const ranks = await page.getByRole("heading").evaluateAll((all) => all.map((it) => Number(it.localName[1])));
  expect(ranks.filter((rank) => rank === 1)).toEqual([1]);
  ranks.forEach((rank, index) => expect(rank - (ranks[index - 1] ?? 0), ranks.join(" ")).toBeLessThanOrEqual(1));
});

test("narrow windows and large letters need no second way to scroll", async ({ page, guard, api, viewport }) => {
  test.skip(viewport.width !== 1280, "the window is made smaller here");
  const server = await api.create("a server with a long name that has to go somewhere", everything);
  const [tool] = await api.tools(server.id);
  await api.run(server.id, tool.name, { message: "hello" });
  const places = ["/#/servers", "/#/add", "/#/add?how=file", `/#/servers/${server.id}`, `/#/servers/${server.id}/edit`,
    `/#/servers/${server.id}/sign-in`, `/#/servers/${server.id}/tools/${tool.id}`, "/#/runs", "/#/changes"];
  // 400 % and 200 % of 1280 (WCAG 2.2, 1.4.10 and 1.4.4).
  for (const [width, name] of [[320, "reflow"], [640, "zoom"]]) {
    await page.setViewportSize({ width, height: 512 });
    for (const [index, place] of places.entries()) {
      await page.goto(place);
      await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
      await expect(page.getByText("…", { exact: false }).filter({ hasText: /^(Reading|Loading)/ })).toHaveCount(0);
      await guard.harmless();
      if (width === 320) await guard.look(`${name}-${index}`);
    }
  }
});

test("a theme is chosen, and kept", async ({ page, guard, portolan }) => {
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.emulateMedia({ colorScheme: "light" });
  await page.goto("/");
  const light = await ground();
  await page.getByLabel("Theme").selectOption("Dark");
  const dark = await ground();
  expect(dark).not.toBe(light);
  await page.reload();
  await expect(page.getByLabel("Theme")).toHaveValue("dark");
  expect(await ground()).toBe(dark);
  await page.getByLabel("Theme").selectOption("Light");
  await page.emulateMedia({ colorScheme: "dark" });
  expect(await ground()).toBe(light);
  await page.getByLabel("Theme").selectOption("System");
  expect(await ground()).toBe(dark);
  expect(Object.keys(await page.evaluate(() => ({ ...localStorage })))).toEqual([]);
});

test("a page that is not there leads back", async ({ page, guard, portolan }) => {
  guard.expect(404);
  await page.goto("/#/nowhere");
  await expect(page.getByRole("heading", { name: "There is no such page" })).toBeVisible();
  await guard.look("nowhere");
  await page.goto("/#/servers/mcp_server-00000000-0000-4000-8000-000000000000");
  await expect(page.getByRole("alert")).toBeVisible();
  await guard.look("no-such-server");
  await page.getByRole("link", { name: "All servers" }).click();
  await expect(page.getByText("There is no server yet")).toBeVisible();
});

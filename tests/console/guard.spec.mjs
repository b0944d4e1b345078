// Whether the guard of the other tests sees what it is there for: each of these is done on purpose, by the test itself.

import { Guard, expect, test } from "./fixtures.mjs";

/** A page of the console with a guard of its own. */
async function another({ browser, gate, contextOptions }) {
  const context = await browser.newContext({ ...contextOptions, baseURL: gate.url });
  const page = await context.newPage();
  const guard = new Guard(context, page, gate.url);
  await guard.watch();
  await page.goto("/");
  await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
  return { context, page, guard };
}

const told = (guard) => guard.settle().then(() => "", (error) => error.message);

const DEEDS = {
  "an error in the console": [() => console.error("a complaint"), /console error: a complaint/],
  "a warning in the console": [() => console.warn("a doubt"), /console warning: a doubt/],
  "an exception": [() => setTimeout(() => { throw new Error("a fault"); }), /uncaught: Error: a fault/],
  "a rejection": [() => void Promise.reject(new Error("a refusal")), /uncaught: Error: a refusal/],
  "a failed request": [() => fetch("/nothing-here"), /console error: Failed to load resource/],
  "a request to another origin": [() => fetch("http://127.0.0.1:9/").catch(() => {}), /CSP violation: connect-src/],
  "an inline style": [
    () => document.head.append(Object.assign(document.createElement("style"), { textContent: "b { color: red }" })),
    /CSP violation: style-src/,
  ],
  "an inline script": [
    () => document.body.append(Object.assign(document.createElement("script"), { text: "window.ran = true" })),
    /CSP violation|TrustedScript/,
  ],
  "markup": [() => { document.body.innerHTML += "<b>bold</b>"; }, /CSP violation|TrustedHTML/],
  "a cookie": [() => { document.cookie = "name=value"; }, /cookies: .*name/],
  "a dialog": [() => alert("hello"), /dialog: alert hello/],
  "an element of others": [() => document.body.append(Object.assign(document.createElement("i"), { className: "injected" })), /element: /],
  "a script of others": [() => { window.pwned = 1; }, /a script of others ran/],
  "a link that is a program": [
    () => document.body.append(Object.assign(document.createElement("a"), { href: "javascript:void 0" })),
    /element: /,
  ],
  "a hidden character": [() => document.body.append("safe\u202egnp.exe"), /hidden character in text/],
  "a hidden character in a title": [() => { document.title = "zero\u200bwidth"; }, /hidden character in the title/],
  "something too wide": [
    () => document.body.append(Object.assign(document.createElement("canvas"), { width: 3000 })),
    /wider than the window/,
  ],
};

test.skip(({ viewport }) => viewport.width !== 1280, "the guard is the same everywhere");

test("the guard sees what it is there for", async ({ browser, gate, portolan, contextOptions }) => {
  const { context, page, guard } = await another({ browser, gate, contextOptions });
  for (const [name, [deed, problem]] of Object.entries(DEEDS)) {
    await page.evaluate(deed).catch(() => {});
    // What is told is told in order.
    const over = page.waitForEvent("console", (message) => message.text() === "over");
    await Promise.all([over, page.evaluate(() => setTimeout(() => console.log("over"), 100))]);
    expect.soft(await told(guard), name).toMatch(problem);
    guard.problems.length = 0;
    await context.clearCookies();
    await page.reload();
    await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
    expect.soft(await told(guard), `after ${name}`).toBe("");
  }
  await context.close();
});

test("the guard is content with a page that is in order, and misses a failure that does not come", async ({
  browser, gate, portolan, contextOptions,
}) => {
  const { context, guard } = await another({ browser, gate, contextOptions });
  await guard.look("guard");
  expect(await told(guard)).toBe("");
  guard.expect(422);
  expect(await told(guard)).toMatch(/were to happen and did not[^]*422/);
  await context.close();
});

test("axe sees what nobody can use", async ({ page, guard }) => {
  await page.goto("/");
  await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
  await page.evaluate(() => document.querySelector("main").append(document.createElement("button"), document.createElement("input")));
  expect((await guard.axe()).map((it) => it.split(":")[0])).toEqual(expect.arrayContaining(["button-name", "label"]));
});

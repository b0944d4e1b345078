// Whether the guard of the other tests sees what it is there for: each of these is done on purpose, by the test itself.

import { Guard, expect, test } from "./fixtures.mjs";

/** What a guard of its own says of the console after `act` on it. */
async function told({ browser, gate, contextOptions }, act) {
  const context = await browser.newContext({ ...contextOptions, baseURL: gate.url });
  const page = await context.newPage();
  const guard = new Guard(context, page, gate.url);
  await guard.watch();
  await page.goto("/");
  await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
  await act(page, guard);
  const problems = await guard.settle().then(() => "", (error) => error.message);
  await context.close();
  return problems;
}

const DEEDS = {
  "an error in the console": [() => console.error("a complaint"), /console error: a complaint/],
  "a warning in the console": [() => console.warn("a doubt"), /console warning: a doubt/],
  "an exception": [() => setTimeout(() => { throw new Error("a fault"); }), /uncaught: Error: a fault/],
  "a rejection": [() => void Promise.reject(new Error("a refusal")), /uncaught: Error: a refusal/],
  "a failed request": [() => fetch("/nothing-here"), /console error: Failed to load resource/],
  "a request to another origin": [() => fetch("http://127.0.0.1:9/").catch(() => {}), /CSP violation: connect-src/],
  "an inline style": [() => document.body.setAttribute("style", "color: red"), /CSP violation: style-src/],
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
  for (const [name, [deed, problem]] of Object.entries(DEEDS)) {
    const problems = await told({ browser, gate, contextOptions }, async (page) => {
      await page.evaluate(deed).catch(() => {});
      // What is told is told in order.
      const over = page.waitForEvent("console", (message) => message.text() === "over");
      await Promise.all([over, page.evaluate(() => setTimeout(() => console.log("over"), 100))]);
    });
    expect.soft(problems, name).toMatch(problem);
  }
});

test("the guard is content with a page that is in order", async ({ browser, gate, portolan, contextOptions }) => {
  expect(await told({ browser, gate, contextOptions }, (page, guard) => guard.look("guard", page))).toBe("");
});

test("the guard misses a failure that does not come", async ({ browser, gate, portolan, contextOptions }) => {
  const problems = await told({ browser, gate, contextOptions }, (_, guard) => guard.expect(422));
  expect(problems).toMatch(/were to happen and did not[^]*422/);
});

test("axe sees what nobody can use", async ({ page, guard }) => {
  await page.goto("/");
  await expect(page.getByRole("heading", { level: 1 })).toBeVisible();
  await page.evaluate(() => document.querySelector("main").append(document.createElement("button"), document.createElement("input")));
  expect((await guard.axe()).map((it) => it.split(":")[0])).toEqual(expect.arrayContaining(["button-name", "label"]));
});

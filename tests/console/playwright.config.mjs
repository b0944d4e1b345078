// The suite of the console, twice: on a desktop in light, and on a phone in dark. Every page that a test looks at is photographed
// and searched by axe in both themes.
//
// Environment, set by `tests/run`: CHROMIUM the browser; PORTOLAN_BIN and PORTOLAN_TOOLS_PYTHON as in ../sdk/processes.py.

import path from "node:path";

import { defineConfig } from "@playwright/test";

const desktop = { viewport: { width: 1280, height: 800 }, colorScheme: "light" };
const phone = { viewport: { width: 390, height: 844 }, colorScheme: "dark", hasTouch: true, isMobile: true };

export default defineConfig({
  testDir: import.meta.dirname,
  testMatch: "*.spec.mjs",
  outputDir: path.join(import.meta.dirname, "../.cache/console/failures"),
  reporter: [["list"]],
  fullyParallel: true,
  workers: 2,
  forbidOnly: true,
  // A browser may crash by itself; what passed only the second time is listed as flaky.
  retries: 1,
  // Generous, because CI is slow: nothing here is about time.
  timeout: 180_000,
  expect: { timeout: 20_000 },
  use: {
    launchOptions: { executablePath: process.env.CHROMIUM, args: ["--no-sandbox", "--disable-dev-shm-usage"] },
    contextOptions: { reducedMotion: "reduce" },
    actionTimeout: 20_000,
    screenshot: "only-on-failure",
  },
  projects: [
    { name: "1280", use: desktop },
    { name: "390", use: phone },
  ],
});

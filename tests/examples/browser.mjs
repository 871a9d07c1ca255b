// Opens the page in headless Chromium, gives it pictures, and prints what it answers as JSON.
//   node browser.mjs '{"modules", "chromium", "address", "profile", "width", "dark", "screenshot", "pictures"}'
import { createRequire } from "node:module";

const task = JSON.parse(process.argv[2]);
const { chromium } = createRequire(`${task.modules}/`)("playwright-core");
const quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const context = await chromium.launchPersistentContext(task.profile, {
  executablePath: task.chromium, args: ["--no-sandbox", ...quiet], viewport: { width: task.width, height: 800 },
  colorScheme: task.dark ? "dark" : "light",
});
try {
  const page = await context.newPage();
  const requests = [];
  page.on("request", (request) => requests.push([request.method(), request.url()]));
  await page.goto(task.address);
  const status = async (pattern) => {
    await page.waitForFunction((source) => new RegExp(source).test(document.getElementById("status").textContent), pattern, { timeout: 60000 });
    return page.textContent("#status");
  };
  const answers = [];
  const loaded = await status("Choose a picture|could not");
  if (loaded.startsWith("Choose")) {
    await page.waitForFunction(() => document.getElementById("offline").textContent === "ready");
    for (const picture of task.pictures) {
      await page.evaluate(() => (document.getElementById("status").textContent = ""));
      await page.setInputFiles("#file", picture);
      const said = await status("looks like|no picture|could not");
      const classes = await page.$$eval("#classes li", (rows) => rows.map((row) => [row.querySelector("span").textContent, Number(row.querySelector("data").value)]));
      answers.push({ said, classes });
    }
    if (task.screenshot) await page.screenshot({ path: task.screenshot, fullPage: true });
  }
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const facts = await page.$$eval("dd", (values) => values.map((value) => value.textContent));
  console.log(JSON.stringify({ loaded, answers, overflow, facts, requests }));
} finally {
  await context.close();
}

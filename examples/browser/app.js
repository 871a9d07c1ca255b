import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { LARGEST, prepare } from "./preprocessing.js";

const $ = (id) => document.getElementById(id);
const TOP = 5;

ort.env.wasm.numThreads = 1; // several threads would need two headers of the server
ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", location.href).href;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function fail(text) {
  say(text, true);
  $("classes").replaceChildren();
  $("time").textContent = "–";
}

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is not there`);
  return response;
}

async function load() {
  const description = await (await fetched("model.json")).json();
  const bytes = await (await fetched("model.onnx")).arrayBuffer();
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const size = [1, ...description.preprocessing.input_size];
  const blank = new ort.Tensor("float32", new Float32Array(size.reduce((a, b) => a * b)), size);
  await session.run({ [session.inputNames[0]]: blank }); // the first run is slower than all others
  $("model").textContent = description.name;
  $("size").textContent = `${(bytes.byteLength / 1e6).toFixed(2)} MB, int8`;
  $("examples").replaceChildren(...description.examples.map((name, place) => {
    const button = document.createElement("button"), image = new Image();
    button.type = "button";
    image.src = name;
    image.alt = `Example ${place + 1}`;
    button.append(image);
    button.onclick = async () => classify(await (await fetched(name)).blob());
    return button;
  }));
  say("Choose a picture.");
  return { session, ...description };
}

const loading = load();
loading.catch((error) => fail(`The model could not be loaded: ${error.message}. Make it with prepare.py.`));

// Pixels of a picture: its colours as they are in the file, without an alpha channel, and not turned.
async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob, { imageOrientation: "none", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  if (bitmap.width * bitmap.height > LARGEST) throw new Error("too large");
  const canvas = $("picture");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.classList.toggle("small", bitmap.width < 100);
  canvas.hidden = false;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function softmax(logits) {
  const largest = Math.max(...logits), powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

function show(probabilities, names) {
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP);
  $("classes").replaceChildren(...best.map((place) => {
    const [row, bar, name, share] = ["li", "div", "span", "data"].map((tag) => document.createElement(tag));
    bar.style.width = `${100 * probabilities[place]}%`;
    share.value = probabilities[place];
    name.textContent = names?.[place] ?? `class ${place}`;
    share.textContent = `${(100 * probabilities[place]).toFixed(1)} %`;
    row.append(bar, name, share);
    return row;
  }));
  return names?.[best[0]] ?? `class ${best[0]}`;
}

let turn = 0;

async function classify(blob) {
  const mine = ++turn;
  let model, image;
  try {
    model = await loading;
  } catch {
    return; // it says so already
  }
  try {
    image = await pixelsOf(blob);
  } catch {
    fail("This is no picture that your browser can read, or it is larger than 50 million pixels.");
    return;
  }
  say("Looking …");
  await new Promise(requestAnimationFrame);
  try {
    const { session, preprocessing, classes } = model;
    const started = performance.now();
    const input = new ort.Tensor("float32", prepare(image, preprocessing), [1, ...preprocessing.input_size]);
    const outputs = await session.run({ [session.inputNames[0]]: input });
    const elapsed = performance.now() - started;
    if (mine !== turn) return; // another picture was chosen meanwhile
    const best = show(softmax(outputs[session.outputNames[0]].data), classes);
    $("time").textContent = `${elapsed.toFixed(1)} ms`;
    say(`It looks like: ${best}.`);
  } catch (error) {
    fail(`The model could not answer: ${error.message}`);
  }
}

$("file").onchange = ({ target }) => {
  if (target.files.length) classify(target.files[0]);
  target.value = ""; // the same file can be chosen again
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind !== "drop") return;
    if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
    else fail("No picture was dropped: drop a file, or choose one.");
  });
}

// Offline: the worker keeps a copy of everything that was read.
if ("serviceWorker" in navigator) {
  await navigator.serviceWorker.register("sw.js").catch(() => {});
  Promise.all([navigator.serviceWorker.ready, loading]).then(() => ($("offline").textContent = "ready"), () => {});
} else {
  $("offline").textContent = "needs https";
}

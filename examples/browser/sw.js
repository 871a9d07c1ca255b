// Keeps a copy of everything the page reads. The network is asked first, so a new model shows at once.
const KEPT = "visual-mamba-1";
const ONNXRUNTIME = "node_modules/onnxruntime-web/dist/";
const FILES = [
  "./", "style.css", "app.js", "preprocessing.js", "icon.svg", "manifest.webmanifest", "model.json", "model.onnx",
  ...["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"].map((name) => ONNXRUNTIME + name),
];

self.addEventListener("install", (event) => {
  event.waitUntil((async () => {
    const cache = await caches.open(KEPT);
    await cache.addAll(FILES);
    await cache.addAll((await (await cache.match("model.json")).json()).examples);
    await self.skipWaiting();
  })());
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET" || !event.request.url.startsWith(self.registration.scope)) return;
  event.respondWith((async () => {
    const cache = await caches.open(KEPT);
    try {
      const response = await fetch(event.request);
      if (response.ok) await cache.put(event.request, response.clone());
      return response;
    } catch {
      return (await cache.match(event.request, { ignoreSearch: true })) ?? Response.error();
    }
  })());
});

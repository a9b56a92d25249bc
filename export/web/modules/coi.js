// For hosts that send no headers: a service worker that puts them on what the page loads, so that
// the page is isolated and WebAssembly has threads. The page is loaded once more for it.
if (typeof window === "undefined") {
  addEventListener("install", () => skipWaiting());
  addEventListener("activate", (event) => event.waitUntil(clients.claim()));
  addEventListener("fetch", (event) => {
    const { request } = event;
    if (new URL(request.url).origin !== location.origin) return;
    event.respondWith(fetch(request).then((response) => {
      if (response.status === 0) return response;
      const headers = new Headers(response.headers);
      headers.set("Cross-Origin-Opener-Policy", "same-origin");
      headers.set("Cross-Origin-Embedder-Policy", "require-corp");
      headers.set("Cross-Origin-Resource-Policy", "same-origin");
      const { status, statusText, body } = response;
      return new Response(body, { status, statusText, headers });
    }));
  });
} else if (!window.crossOriginIsolated && window.isSecureContext && navigator.serviceWorker) {
  const key = "addbench-isolated"; // once: a browser that will not isolate is left alone
  navigator.serviceWorker.register("coi.js").then(() => navigator.serviceWorker.ready).then(() => {
    if (sessionStorage.getItem(key)) return;
    sessionStorage.setItem(key, "tried");
    location.reload();
  }).catch((error) => console.warn("no threads:", error));
}

/**
 * A page without a face, for a program that drives the browser: the worker of the page, one request
 * after the other. Its address says what the page's says, and `decoder`; with `uncached` every
 * prompt is encoded.
 *
 * globalThis.opened: a promise of the device, once all is loaded, or of `{ error }`
 * globalThis.draw(request): a promise of the answer's header with `pixels`, RGBA in base64
 */

const worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
let device = null;
let open = null;
let answer = null;

globalThis.opened = new Promise((resolve) => { open = resolve; });
globalThis.draw = (request) => new Promise((resolve) => {
  answer = resolve;
  worker.postMessage({ type: "draw", request });
});

worker.onmessage = ({ data }) => {
  if (data.type === "device") device = { ...data.device, remark: data.remark };
  else if (data.type === "status" && data.state === "ready") open(device);
  else if (data.type === "status" && data.state === "lost") open({ error: data.error });
  else if (data.type === "answer") answer({ ...data.header, device, pixels: base64(data.pixels) });
};
worker.onerror = ({ message }) => {
  open({ error: { what: "the worker could not be started", why: message ?? "", next: "" } });
};
worker.postMessage({ type: "open", query: location.search });

function base64(pixels) {
  if (!pixels) return null;
  let text = "";
  for (let at = 0; at < pixels.length; at += 32768) {
    text += String.fromCharCode(...pixels.subarray(at, at + 32768));
  }
  return btoa(text);
}

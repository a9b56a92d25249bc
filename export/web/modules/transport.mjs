/**
 * The transport of a page without a server: requests to the worker, the newest wins.
 *
 * One request is with the worker and one waits; a newer one takes the place of that which waits. So
 * nothing queues, what is drawn is finished, and what was sent last is always drawn.
 */

export function connect(handlers) {
  return new WorkerTransport(handlers,
    new Worker(new URL("worker.mjs", import.meta.url), { type: "module" }), location.search);
}

export class WorkerTransport {
  #busy = true; // until the worker is ready for the first time
  #opened = false;
  #waiting = null;
  #skipped = 0;

  constructor(handlers, worker, query) {
    Object.assign(this, { handlers, worker });
    this.device = null;
    this.measures = new URLSearchParams(query).has("bench");
    worker.onmessage = ({ data }) => this.#receive(data);
    worker.onerror = ({ message }) => handlers.status({
      state: "lost", words: `the page could not be started: ${message || "an old browser?"}`,
    });
    worker.postMessage({ type: "open", query });
  }

  send(request, picture = null) {
    if (this.measures) return;
    if (this.#waiting) this.#skipped++;
    this.#waiting = { ...request, picture };
    this.#next();
  }

  close() {
    this.worker.terminate();
  }

  #next() {
    if (this.#busy || !this.#waiting) return;
    this.#busy = true;
    this.worker.postMessage({ type: "draw", request: this.#waiting });
    this.#waiting = null;
  }

  #receive({ type, header, pixels, device, record, ...status }) {
    if (type === "bench") { // ?bench=N: figures in place of the page
      globalThis.bench = record;
      const text = document.createElement("pre");
      text.id = "bench";
      text.textContent = JSON.stringify(record, null, 1);
      document.body.replaceChildren(text);
      return;
    }
    if (type === "device") {
      this.device = device;
      return;
    }
    if (type === "status") {
      this.handlers.status(status);
      if (status.state === "ready" && !this.#opened) {
        this.#opened = true;
        this.#free();
      }
      return;
    }
    const skipped = this.#skipped;
    this.#skipped = 0;
    const image = pixels && new ImageData(pixels, header.width, header.height);
    this.handlers.answer({ ...header, skipped }, image);
    this.#free();
  }

  #free() {
    this.#busy = false;
    this.#next();
  }
}

/** What the modules decide, with doubles of what a browser gives: `node --test`, run by pytest. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

const load = (name) => import(pathToFileURL(`${process.env.MODULES}/${name}`));
const { chooseDevice, cpu, requireFeatures, runtimeFiles } = await load("device.mjs");
const { Failure, NonFinite } = await load("errors.mjs");
const { Store } = await load("store.mjs");
const { Artist } = await load("artist.mjs");
const { WorkerTransport } = await load("transport.mjs");
const { toPixels, sideBySide } = await load("pipeline.mjs");

const manifest = { precisions: ["fp32", "fp16"] };
const adapter = (features = [], info = {}) => ({
  features: new Set(features), info: { vendor: "acme", architecture: "one", ...info },
});
const scope = (found, more = {}) => ({
  WebAssembly, BigInt64Array, crossOriginIsolated: true,
  navigator: { hardwareConcurrency: 8, gpu: { requestAdapter: async () => found } }, ...more,
});
const query = (text = "") => new URLSearchParams(text);

// ---- the choice of device

test("WebGPU computes in FP16 where it can, else in FP32", async () => {
  const half = await chooseDevice(query(), manifest, scope(adapter(["shader-f16"])));
  assert.deepEqual([half.kind, half.precision, half.adapter], ["webgpu", "fp16", "acme one"]);
  const full = await chooseDevice(query(), manifest, scope(adapter()));
  assert.deepEqual([full.kind, full.precision], ["webgpu", "fp32"]);
  const only = { precisions: ["fp32"] };
  assert.equal((await chooseDevice(query(), only, scope(adapter(["shader-f16"])))).precision, "fp32");
  assert.match(half.words, /WebGPU, acme one, FP16/);
});

test("without WebGPU it is the CPU, with threads where the page is isolated", async () => {
  for (const found of [null, undefined]) {
    const device = await chooseDevice(query(), manifest, scope(found));
    assert.deepEqual([device.kind, device.precision, device.threads], ["wasm", "fp32", 4]);
  }
  const alone = await chooseDevice(query(), manifest, scope(null, { crossOriginIsolated: false }));
  assert.equal(alone.threads, 1);
  assert.match(alone.words, /1 thread .*not isolated/);
  const old = await chooseDevice(query(), manifest, { navigator: {}, crossOriginIsolated: true });
  assert.deepEqual([old.kind, old.threads], ["wasm", 1]);
  const broken = scope(null);
  broken.navigator.gpu.requestAdapter = async () => { throw new Error("blocked"); };
  assert.equal((await chooseDevice(query(), manifest, broken)).kind, "wasm");
});

test("an adapter that emulates is none, unless it is asked for", async () => {
  const soft = scope(adapter([], { isFallbackAdapter: true }));
  assert.equal((await chooseDevice(query(), manifest, soft)).kind, "wasm");
  const asked = await chooseDevice(query("device=webgpu"), manifest, soft);
  assert.equal(asked.kind, "webgpu");
  assert.ok(asked.emulated);
  assert.match(asked.words, /emulated/);
});

test("the address decides, and what it cannot have is refused", async () => {
  const both = scope(adapter(["shader-f16"]));
  assert.equal((await chooseDevice(query("device=wasm"), manifest, both)).kind, "wasm");
  assert.equal((await chooseDevice(query("precision=fp32"), manifest, both)).precision, "fp32");
  assert.equal(cpu(query("threads=2"), both).threads, 2);
  for (const [text, where] of [["device=tpu", both], ["device=webgpu", scope(null)],
    ["precision=fp16", scope(adapter())]]) {
    await assert.rejects(chooseDevice(query(text), manifest, where), Failure);
  }
  assert.throws(() => cpu(query("threads=0"), both), Failure);
  assert.throws(() => cpu(query("threads=many"), both), Failure);
});

test("an old browser is told what it lacks", () => {
  requireFeatures();
  assert.throws(() => requireFeatures({ BigInt64Array }), /cannot draw/);
  const noSimd = { WebAssembly: { validate: () => false }, BigInt64Array };
  assert.throws(() => requireFeatures(noSimd), (error) => error.why.includes("SIMD"));
});

test("each build has its module and its binary", () => {
  assert.deepEqual(runtimeFiles("wasm"),
    { module: "ort/ort.wasm.min.mjs", binary: "ort/ort-wasm-simd-threaded.wasm" });
  assert.equal(runtimeFiles("asyncify").module, "ort/ort.webgpu.min.mjs");
  assert.equal(runtimeFiles("jspi").binary, "ort/ort-wasm-simd-threaded.jspi.wasm");
});

// ---- the store

const bytesOf = (text) => new TextEncoder().encode(text);
const entry = (text) => ({
  bytes: bytesOf(text).length, sha256: createHash("sha256").update(text).digest("hex"),
});

class FakeCache {
  constructor() { this.content = new Map(); }
  async keys() { return [...this.content.keys()].map((url) => ({ url })); }
  async match(url) { return this.content.has(url) ? new Response(this.content.get(url)) : undefined; }
  async put(url, response) { this.content.set(url, new Uint8Array(await response.arrayBuffer())); }
  async delete(url) { return this.content.delete(url); }
}

function web(files, cache = new FakeCache()) {
  const asked = [];
  return {
    asked, cache,
    scope: {
      crypto: globalThis.crypto,
      caches: { open: async () => { if (!cache) throw new Error("denied"); return cache; } },
      fetch: async (url, { cache: mode }) => {
        const name = url.pathname.slice(1);
        asked.push([name, mode]);
        const content = typeof files[name] === "function" ? files[name](mode) : files[name];
        return content === undefined ? new Response("", { status: 404 }) : new Response(content);
      },
    },
  };
}

const BASE = new URL("https://example.test/");

test("a file comes once, then from the cache; another manifest drops it", async () => {
  const { scope: where, asked, cache } = web({ a: "one", b: "two" });
  const files = { files: { a: entry("one"), b: entry("two") } };
  const seen = [];
  const store = await new Store(files, BASE, (...now) => seen.push(now), where).open();
  store.expect(["a", "b"]);
  assert.deepEqual(await store.read("a"), bytesOf("one"));
  assert.deepEqual(await store.read("b"), bytesOf("two"));
  assert.deepEqual(seen.at(-1), [6, 6]);
  const again = await new Store(files, BASE, () => {}, where).open();
  assert.deepEqual(await again.read("a"), bytesOf("one"));
  assert.equal(asked.length, 2);
  await cache.put("https://example.test/other-app", new Response("theirs"));
  await new Store({ files: { a: entry("one") } }, BASE, () => {}, where).open();
  assert.equal(cache.content.size, 2, "what is kept by another name stays");
});

test("without a cache all works, and what cannot be kept is no error", async () => {
  for (const cache of [null, Object.assign(new FakeCache(), { put: async () => { throw new Error("full"); } })]) {
    const { scope: where, asked } = web({ a: "one" }, cache);
    const store = await new Store({ files: { a: entry("one") } }, BASE, () => {}, where).open();
    await store.read("a");
    await store.read("a");
    assert.equal(asked.length, 2);
    assert.ok(!store.keeps);
  }
});

test("a file with another hash is asked for again, then refused by name", async () => {
  const files = { files: { a: entry("one") } };
  const stale = web({ a: (mode) => (mode === "reload" ? "one" : "old") });
  const store = await new Store(files, BASE, () => {}, stale.scope).open();
  assert.deepEqual(await store.read("a"), bytesOf("one"));
  const broken = web({ a: "on" });
  await assert.rejects((await new Store(files, BASE, () => {}, broken.scope).open()).read("a"),
    (error) => error instanceof Failure && error.what.startsWith("a ") && error.next.length > 0);
  assert.equal(broken.cache.content.size, 0);
  const gone = web({});
  await assert.rejects((await new Store(files, BASE, () => {}, gone.scope).open()).read("a"),
    (error) => error.why.includes("404"));
  await assert.rejects(store.read("b"), Failure);
});

test("what the cache has damaged is loaded anew", async () => {
  const { scope: where, cache, asked } = web({ a: "one" });
  const store = await new Store({ files: { a: entry("one") } }, BASE, () => {}, where).open();
  await store.read("a");
  for (const key of cache.content.keys()) cache.content.set(key, bytesOf("eno"));
  assert.deepEqual(await store.read("a"), bytesOf("one"));
  assert.equal(asked.length, 2);
});

// ---- the fall to the CPU

/** A runtime whose sessions run as `run` says; `run(kind)` may throw. */
function runtime(behave) {
  const ort = {
    env: { wasm: {} },
    Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } },
    InferenceSession: {
      create: async (_, { executionProviders: [kind] }) => {
        behave("create", kind);
        return {
          run: async (feeds) => {
            const value = behave("run", kind) ?? 0;
            const numbers = (...dims) => ({
              data: new Float32Array(dims.reduce((a, b) => a * b)).fill(value), dims,
            });
            return feeds.input_ids ? { hidden_states: numbers(1, 77, 4) }
              : feeds.timestep ? { out_sample: numbers(1, 4, 2, 2) }
                : { sample: numbers(1, 3, 16, 16) };
          },
          release: async () => {},
        };
      },
    },
  };
  class Tokenizer { encode() { return { ids: [1] }; } }
  return async (name) => (name.startsWith("tokenizers") ? { Tokenizer } : ort);
}

const part = (inputs) => ({ data: [], graphs: { fp32: { file: "g", locations: [], inputs } } });
const small = {
  precisions: ["fp32"], decoders: ["vae"], size: [16, 16], vae_scale: 8, latent_channels: 4, steps: 1,
  tokenizers: [{ file: "t", length: 77, start: 0, end: 2, pad: 2 }],
  scheduler: {
    prediction_type: "epsilon",
    counts: { 1: { first: 1, steps: [
      { timestep: 999, sigma: 1, sigma_up: 0, sigma_down: 0, input_scale: 1, draws: true }] } },
  },
  parts: {
    text_encoder: part({ input_ids: "int64" }),
    unet: part({ sample: "float32", timestep: "float32", encoder_hidden_states: "float32" }),
    vae_decoder: part({ latent_sample: "float32" }),
  },
};
const files = { expect() {}, read: async () => bytesOf("{}") };

async function drawn(behave) {
  const said = [];
  const artist = new Artist(small, files, runtime(behave), query(), ({ device }) => said.push(device.kind),
    scope(adapter()));
  await artist.open();
  const picture = await artist.draw({ prompt: "a", steps: 1 });
  return { artist, picture, said };
}

test("a device that works is kept", async () => {
  const { artist, picture } = await drawn(() => 0);
  assert.equal(artist.device.kind, "webgpu");
  assert.equal(artist.remark, "");
  assert.equal(picture.pixels.length, 16 * 16 * 4);
});

for (const [name, behave] of [
  ["a session that cannot be made", (what, kind) => {
    if (what === "create" && kind === "webgpu") throw new Error("requires f16");
  }],
  ["a lost device", (what, kind) => {
    if (what === "run" && kind === "webgpu") throw new Error("device lost");
  }],
  ["NaN", (what, kind) => (kind === "webgpu" ? NaN : 0)],
]) {
  test(`${name} falls to the CPU, and is said`, async () => {
    const { artist, picture, said } = await drawn(behave);
    assert.equal(artist.device.kind, "wasm");
    assert.match(artist.remark, /WebGPU.*failed: ./);
    assert.ok(picture.pixels.length);
    assert.equal(said.at(-1), "wasm");
  });
}

test("it falls once: what fails on the CPU too is an error", async () => {
  await assert.rejects(drawn(() => NaN), NonFinite);
  await assert.rejects(drawn((what) => { if (what === "create") throw new Error("no"); }), /no/);
});

test("what is asked wrongly does not change the device", async () => {
  const { artist } = await drawn(() => 0);
  await assert.rejects(artist.draw({ prompt: "a", steps: 3 }), Failure);
  assert.equal(artist.device.kind, "webgpu");
});

// ---- the transport

function transport() {
  const worker = { sent: [], postMessage(message) { this.sent.push(message); }, terminate() {} };
  const answers = [];
  const states = [];
  globalThis.ImageData = class { constructor(data) { this.data = data; } };
  const made = new WorkerTransport(
    { answer: (header) => answers.push(header), status: (status) => states.push(status.state) },
    worker, "?device=wasm");
  return { made, worker, answers, states, receive: (data) => worker.onmessage({ data }) };
}

test("the newest waits, what is drawn is finished, the last is always drawn", () => {
  const { made, worker, answers, receive } = transport();
  made.send({ id: 1 });
  made.send({ id: 2 });
  assert.deepEqual(worker.sent, [{ type: "open", query: "?device=wasm" }]);
  receive({ type: "status", state: "ready" });
  assert.deepEqual(worker.sent.slice(1).map(({ request }) => request.id), [2]);
  for (const id of [3, 4, 5]) made.send({ id });
  assert.equal(worker.sent.length, 2, "one at a time");
  receive({ type: "answer", header: { id: 2 }, pixels: null });
  receive({ type: "answer", header: { id: 5 }, pixels: null });
  assert.deepEqual(worker.sent.slice(1).map(({ request }) => request.id), [2, 5]);
  assert.deepEqual(answers.map(({ id, skipped }) => [id, skipped]), [[2, 3], [5, 0]]);
});

test("a device that changed while drawing sends nothing twice", () => {
  const { made, worker, receive } = transport();
  receive({ type: "status", state: "ready" });
  made.send({ id: 1 });
  made.send({ id: 2 });
  receive({ type: "status", state: "loading" });
  receive({ type: "status", state: "ready" });
  assert.equal(worker.sent.length, 2);
  receive({ type: "answer", header: { id: 1, error: {} } });
  assert.equal(worker.sent.at(-1).request.id, 2);
});

// ---- numbers

test("pixels are rounded as Python rounds, and NaN is refused", () => {
  const sample = Float32Array.of(-1, 1, -2, 0, 0, 0, 0.004, -0.004, 3, 1 / 127.5, 0.5, -0.5);
  assert.deepEqual([...toPixels(sample, 4)].filter((_, i) => i % 4 === 0), [0, 255, 0, 128]);
  assert.throws(() => toPixels(Float32Array.of(0, 0, NaN), 1), NonFinite);
  assert.throws(() => toPixels(Float32Array.of(0, Infinity, 0), 1), NonFinite);
});

test("hidden states are joined token by token", () => {
  const one = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 2, 2] };
  const two = { data: Float32Array.of(5, 6), dims: [1, 2, 1] };
  assert.deepEqual([...sideBySide([one, two]).data], [1, 2, 5, 3, 4, 6]);
});

/**
 * A pipeline on the best device, and once on the CPU where that fails.
 *
 * A failure is a session that cannot be made, a lost device, or a picture that holds NaN.
 */

import { chooseDevice, cpu, requireFeatures, runtimeFiles } from "./device.mjs";
import { Failure, NonFinite } from "./errors.mjs";
import { Pipeline } from "./pipeline.mjs";

export class Artist {
  #pipeline = null;

  /**
   * @param manifest of the folder
   * @param store that its files are read from
   * @param load imports a module of the folder
   * @param query of the page's address
   * @param say is told the device in words, and why it was left
   */
  constructor(manifest, store, load, query, say, scope = globalThis) {
    Object.assign(this, { manifest, store, load, query, say, scope });
    this.device = null;
    this.remark = "";
  }

  /** Choose a device and load all that a picture takes. */
  async open(decoder = this.manifest.decoders[0]) {
    requireFeatures(this.scope);
    this.decoder = decoder;
    this.device = await chooseDevice(this.query, this.manifest, this.scope);
    try {
      await this.#load();
    } catch (error) {
      await this.#fall(error);
    }
    return this;
  }

  /** The picture of a request, as `Pipeline.draw` gives it. */
  async draw(request) {
    try {
      return await this.#pipeline.draw(request);
    } catch (error) {
      await this.#fall(error);
      return this.#pipeline.draw(request);
    }
  }

  async close() {
    await this.#pipeline?.close();
  }

  /** Go on on the CPU; what is asked wrongly, or fails there, is wrong anywhere. */
  async #fall(error) {
    const ours = error instanceof Failure && !(error instanceof NonFinite);
    if (this.device.kind === "wasm" || ours) throw error;
    const why = String(error?.message ?? error).split("\n")[0].slice(0, 160);
    this.remark = `${this.device.words} failed: ${why}`;
    await this.#pipeline?.close().catch(() => {});
    this.device = cpu(this.query, this.scope);
    await this.#load();
  }

  async #load() {
    const { device, store, manifest } = this;
    const files = runtimeFiles(device.build);
    const precision = manifest.precisions.includes(device.precision) ? device.precision : "fp32";
    store.expect([files.binary, ...partFiles(manifest, this.decoder, precision)]);
    this.say(this);
    const { Tokenizer } = await this.load("tokenizers/tokenizers.min.mjs");
    const ort = await this.load(files.module);
    ort.env.wasm.numThreads = device.threads;
    ort.env.wasm.wasmBinary = await store.read(files.binary);
    const session = { executionProviders: [device.kind] };
    const read = (name) => store.read(name);
    const measured = this.query.has("bench") || this.query.has("uncached");
    const options = { precision, session, ...(measured ? { cached: 0 } : {}) };
    this.#pipeline = new Pipeline(ort, Tokenizer, manifest, read, options);
    await this.#pipeline.prepare(this.decoder);
    this.say(this);
  }
}

/** Every file that a picture takes with this decoder. */
function partFiles(manifest, decoder, precision) {
  const files = manifest.tokenizers.map(({ file }) => file);
  for (const [name, { graphs, data }] of Object.entries(manifest.parts)) {
    const used = name.startsWith("text_encoder") || name === "unet" || name === `${decoder}_decoder`;
    if (used) files.push(graphs[precision].file, ...data);
  }
  return files;
}

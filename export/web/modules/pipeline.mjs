/**
 * Prompt to picture over sessions of onnxruntime-web: the order of the parts, as
 * backends/pipeline/pipeline.py has it. Knows nothing of pages, workers and downloads.
 */

import { Failure, NonFinite } from "./errors.mjs";
import { toFloat, toHalf } from "./half.mjs";
import { Generator } from "./rng.mjs";
import {
  firstSample, keptSteps, modelInput, nextSample, noisedLatents, scheduleOf,
} from "./scheduler.mjs";
import { ClipTokens } from "./tokens.mjs";
import { unknownWords } from "./words.mjs";

/** Prompts whose embeddings are kept. */
const CACHED_PROMPTS = 64;

export class Pipeline {
  #sessions = new Map();
  #embeddings = new Map();
  #tokens = null;

  /**
   * @param ort onnxruntime-web, whose environment is set
   * @param Tokenizer the class of @huggingface/tokenizers
   * @param manifest of the folder
   * @param read gives the bytes of a file of the folder by its name
   * @param options precision: `fp32` or `fp16`; session: options of every session; cached: prompts
   *   whose embeddings are kept, 0 where a picture's whole time is measured
   */
  constructor(ort, Tokenizer, manifest, read, options = {}) {
    const { precision = "fp32", session = {}, cached = CACHED_PROMPTS } = options;
    Object.assign(this, { ort, Tokenizer, manifest, read, precision, session, cached });
  }

  get encoders() {
    return Object.keys(this.manifest.parts).filter((part) => part.startsWith("text_encoder"));
  }

  get decoders() {
    return this.manifest.decoders;
  }

  /** Load all that a picture takes with this decoder. */
  async prepare(decoder = this.decoders[0]) {
    await this.#openTokens();
    for (const part of [...this.encoders, "unet", this.#decoderPart(decoder)]) await this.open(part);
    return this;
  }

  #decoderPart(decoder) {
    if (this.decoders.includes(decoder)) return `${decoder}_decoder`;
    throw new Failure(`there is no decoder called ${decoder}`,
      `this folder has ${this.decoders.join(", ")}`, "take one of these");
  }

  async #openTokens() {
    this.#tokens ??= await Promise.all(this.manifest.tokenizers.map(async (entry) => {
      const text = new TextDecoder().decode(await this.read(entry.file));
      return new ClipTokens(this.Tokenizer, JSON.parse(text), entry);
    }));
    return this.#tokens;
  }

  /** The session of a part, made when it is first asked for. */
  async open(part) {
    if (!this.#sessions.has(part)) {
      const entry = this.manifest.parts[part];
      const graph = entry.graphs[this.precision];
      const data = await Promise.all(entry.data.map(async (file, i) => {
        return { path: graph.locations[i], data: await this.read(file) };
      }));
      const options = { ...this.session, ...(data.length ? { externalData: data } : {}) };
      const session = await this.ort.InferenceSession.create(await this.read(graph.file), options);
      this.#sessions.set(part, { session, inputs: graph.inputs });
    }
    return this.#sessions.get(part);
  }

  /** Run a part on numbers by name, as `{ data, dims }`; each is cast to what the graph takes. */
  async run(part, feeds) {
    const { session, inputs } = await this.open(part);
    const tensors = {};
    for (const [name, type] of Object.entries(inputs)) {
      const { data, dims } = feeds[name];
      const cast = type === "float16" && data instanceof Float32Array ? toHalf(data)
        : type === "float32" ? toFloat(data) : data;
      tensors[name] = new this.ort.Tensor(type, cast, dims);
    }
    return session.run(tensors);
  }

  /** What the UNet is told of a prompt; the last prompts are kept. */
  async encode(prompt) {
    const kept = this.#embeddings.get(prompt);
    if (kept) {
      this.#embeddings.delete(prompt); // and put last: the oldest goes first
      this.#embeddings.set(prompt, kept);
      return kept;
    }
    const tokens = await this.#openTokens();
    const hidden = [];
    let last = {};
    let count = 0;
    for (const [i, part] of this.encoders.entries()) {
      const encoded = tokens[i].encode(prompt);
      count = Math.max(count, encoded.count);
      last = await this.run(part, { input_ids: { data: encoded.ids, dims: [1, encoded.ids.length] } });
      hidden.push(last.hidden_states);
    }
    const result = { states: sideBySide(hidden), pooled: last.text_embeds, count };
    this.#embeddings.set(prompt, result);
    if (this.#embeddings.size > this.cached) {
      this.#embeddings.delete(this.#embeddings.keys().next().value);
    }
    return result;
  }

  /** Latents of a picture, RGBA of the model's size, by the encoder that goes with a decoder. */
  async #encodePicture(pixels, decoder) {
    const part = `${decoder}_encoder`;
    const [width, height] = this.manifest.size;
    if (!this.manifest.parts[part]) {
      throw new Failure(`this folder has no ${part}`, "its bundle was exported without one",
        "export the bundle again, then the folder");
    }
    const image = fromPixels(pixels, width * height);
    const feed = { data: image, dims: [1, 3, height, width] };
    return toFloat((await this.run(part, { image: feed })).latent_sample.data);
  }

  /**
   * The picture of a prompt, from noise, or from `picture` (RGBA) where `strength` is below 1.
   *
   * @returns pixels: RGBA, as ImageData takes them; ms by stage; tokens of the prompt; cut_at, where
   *   it was too long; unknown: words that the model was never shown; nfe: evaluations of the UNet
   */
  async draw(request) {
    const { prompt, seed = 0, steps = this.manifest.steps, decoder = this.decoders[0] } = request;
    const { picture = null, strength = 1 } = request;
    const { size, latent_channels: channels, vae_scale: scale, scheduler } = this.manifest;
    const [width, height] = size;
    const schedule = scheduleOf(scheduler, steps);
    const decoderPart = this.#decoderPart(decoder);
    const starts = picture && strength !== 1;
    const kept = schedule.steps.slice(starts ? steps - keptSteps(steps, strength) : 0);
    const dims = [1, channels, height / scale, width / scale];
    const count = dims.reduce((product, side) => product * side);
    const started = performance.now();
    const { states, pooled, count: tokens } = await this.encode(prompt);
    const told = performance.now();
    const given = starts ? await this.#encodePicture(picture, decoder) : null;
    const encoded = performance.now();
    const feeds = { encoder_hidden_states: states };
    if (pooled) {
      feeds.text_embeds = pooled;
      const sides = Float32Array.of(height, width, 0, 0, height, width); // SDXL's conditioning
      feeds.time_ids = { data: sides, dims: [1, 6] };
    }
    const generator = new Generator(seed);
    const first = generator.randn(count);
    let latents = given ? noisedLatents(given, first, kept[0]) : firstSample(first, schedule);
    const unet = [];
    for (const step of kept) {
      const begun = performance.now();
      const { out_sample: output } = await this.run("unet", {
        sample: { data: modelInput(latents, step), dims },
        timestep: { data: Float32Array.of(step.timestep), dims: [1] },
        ...feeds,
      });
      unet.push(performance.now() - begun);
      const noise = step.draws ? generator.randn(count) : null;
      latents = nextSample(latents, toFloat(output.data), noise, step, scheduler.prediction_type);
    }
    const denoised = performance.now();
    const { sample } = await this.run(decoderPart, { latent_sample: { data: latents, dims } });
    const pixels = toPixels(toFloat(sample.data), width * height);
    const ended = performance.now();
    const ms = {
      text: told - started, encode: encoded - told, unet, decode: ended - denoised,
      total: ended - started,
    };
    const most = this.manifest.tokenizers[0].length;
    const cut = tokens > most ? { cut_at: most } : {};
    const unknown = unknownWords(prompt, this.manifest.words);
    const notes = { ...cut, ...(unknown.length ? { unknown } : {}) };
    return { pixels, width, height, ms, tokens, ...notes, nfe: unet.length };
  }

  async close() {
    const sessions = [...this.#sessions.values()];
    this.#sessions.clear();
    await Promise.all(sessions.map(({ session }) => session.release()));
  }
}

/** Hidden states [1, tokens, width] of the text encoders, joined along their width. */
export function sideBySide(tensors) {
  if (tensors.length === 1) return tensors[0];
  const tokens = tensors[0].dims[1];
  const widths = tensors.map((tensor) => tensor.dims[2]);
  const total = widths.reduce((sum, width) => sum + width);
  const data = new tensors[0].data.constructor(tokens * total);
  let at = 0;
  for (let token = 0; token < tokens; token++) {
    for (const [i, width] of widths.entries()) {
      data.set(tensors[i].data.subarray(token * width, (token + 1) * width), at);
      at += width;
    }
  }
  return { data, dims: [1, tokens, total] };
}

/** RGBA -> three planes in [-1, 1]. */
export function fromPixels(pixels, count) {
  const f = Math.fround;
  const image = new Float32Array(3 * count);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < count; i++) {
      image[channel * count + i] = f(f(pixels[4 * i + channel] / 127.5) - 1);
    }
  }
  return image;
}

/** A sample [-1, 1] of three planes -> RGBA, rounded as Python rounds; NaN is refused. */
export function toPixels(sample, count) {
  const f = Math.fround;
  const pixels = new Uint8ClampedArray(4 * count).fill(255);
  let sum = 0;
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < count; i++) {
      const value = sample[channel * count + i];
      sum += value;
      const level = f(f(value * 127.5) + 128);
      pixels[4 * i + channel] = Math.trunc(Math.min(Math.max(level, 0.5), 255.5));
    }
  }
  if (!Number.isFinite(sum)) throw new NonFinite(); // finite only if every number is
  return pixels;
}

/**
 * Runs the modules of a folder in Node, for the tests: a job as JSON on stdin, answers on stdout.
 *
 * node driver.mjs FOLDER < '{"noise": [...], "texts": [...], "draws": [...]}'
 */

import { readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const folder = resolve(process.argv[2]);
const load = (name) => import(pathToFileURL(join(folder, name)));
const read = async (name) => new Uint8Array(await readFile(join(folder, name)));

let input = "";
for await (const piece of process.stdin) input += piece;
const job = JSON.parse(input);
const answer = {};

const { Generator } = await load("rng.mjs");
answer.noise = (job.noise ?? []).map(({ seed, sizes }) => {
  const generator = new Generator(BigInt(seed));
  return sizes.map((size) => Array.from(generator.randn(size)));
});

if (job.halves) {
  const { toHalf, toFloat } = await load("half.mjs");
  const bits = toHalf(Float32Array.from(job.halves, Number), null);
  answer.halves = { bits: Array.from(bits), back: Array.from(toFloat(bits), String) };
}

if (job.texts || job.draws) {
  const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  const { Tokenizer } = await load("tokenizers/tokenizers.min.mjs");
  const { ClipTokens } = await load("tokens.mjs");
  answer.tokens = await Promise.all(manifest.tokenizers.map(async (entry) => {
    const tokens = new ClipTokens(Tokenizer, JSON.parse(await readFile(join(folder, entry.file))), entry);
    return (job.texts ?? []).map((text) => Array.from(tokens.encode(text).ids, Number));
  }));
  const { unknownWords } = await load("words.mjs");
  answer.unknown = (job.texts ?? []).map((text) => unknownWords(text, manifest.words));
  if (job.draws) {
    const ort = await load("ort/ort.wasm.min.mjs");
    ort.env.wasm.numThreads = job.threads ?? 1;
    ort.env.wasm.wasmBinary = await read("ort/ort-wasm-simd-threaded.wasm");
    const { Pipeline } = await load("pipeline.mjs");
    const { Failure } = await load("errors.mjs");
    const options = { precision: job.precision ?? "fp32" };
    const pipeline = new Pipeline(ort, Tokenizer, manifest, read, options);
    answer.draws = [];
    for (const draw of job.draws) {
      try {
        const picture = draw.picture && new Uint8Array(Buffer.from(draw.picture, "base64"));
        const { pixels, ...rest } = await pipeline.draw({ ...draw, picture });
        answer.draws.push({ ...rest, pixels: Buffer.from(pixels).toString("base64") });
      } catch (error) {
        answer.draws.push({ error: Failure.parts(error) });
      }
    }
    await pipeline.close();
  }
}
process.stdout.write(JSON.stringify(answer));

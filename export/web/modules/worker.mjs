/** The worker of a page: sessions live here, so that the page never waits. */

import { Artist } from "./artist.mjs";
import { Failure } from "./errors.mjs";
import { Store } from "./store.mjs";

const base = new URL("./", import.meta.url);
let artist = null;

const tell = (type, content, transfer = []) => postMessage({ type, ...content }, transfer);

function progress(received, total) {
  const share = total ? Math.min(received / total, 1) : 0;
  const megabytes = (count) => (count / 1e6).toFixed(1);
  tell("status", {
    state: "loading", progress: share,
    words: `loading the model: ${megabytes(received)} of ${megabytes(total)} MB`,
  });
}

async function open(query) {
  const response = await fetch(new URL("manifest.json", base), { cache: "no-cache" });
  if (!response.ok) {
    throw new Failure("manifest.json could not be loaded", `the server answers ${response.status}`,
      "put the whole folder on the server");
  }
  const manifest = await response.json();
  const store = await new Store(manifest, base, progress).open();
  const load = (name) => import(new URL(name, base));
  const say = ({ device, remark }) => tell("device", { device, remark, keeps: store.keeps });
  const asked = new URLSearchParams(query);
  artist = await new Artist(manifest, store, load, asked, say).open(asked.get("decoder") ?? undefined);
  ready();
}

function ready() {
  const { device, remark } = artist;
  tell("status", { state: "ready", words: remark ? `${device.words}; ${remark}` : device.words });
}

/** A picture's file -> RGBA of the model's size: the middle, as large as fits. */
async function pixelsOf(file) {
  const [width, height] = artist.manifest.size;
  const image = await createImageBitmap(new Blob([file]));
  const paint = new OffscreenCanvas(width, height).getContext("2d");
  paint.fillStyle = "white";
  paint.fillRect(0, 0, width, height);
  const scale = Math.max(width / image.width, height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  paint.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  image.close();
  return paint.getImageData(0, 0, width, height).data;
}

async function draw({ id, picture, ...request }) {
  const before = artist.device;
  try {
    const start = picture ? await pixelsOf(picture) : null;
    const { pixels, ms, ...rest } = await artist.draw({ ...request, picture: start });
    if (artist.device !== before) ready(); // it fell back, and has loaded meanwhile
    const unet = ms.unet.reduce((sum, each) => sum + each, 0);
    const header = { id, ...rest, ms: { ...ms, unet }, unet_ms: ms.unet };
    tell("answer", { header, pixels }, [pixels.buffer]);
  } catch (error) {
    console.error(error);
    if (artist.device !== before) ready();
    tell("answer", { header: { id, error: Failure.parts(error) } });
  }
}

/** Measure `count` pictures after one that is not counted; tell every sample, and where it ran. */
async function measure(query) {
  const count = Number(query.get("bench")) || 1;
  const { manifest } = artist;
  const steps = Number(query.get("steps") ?? manifest.steps);
  const decoder = query.get("decoder") ?? manifest.decoders[0];
  const samples = [];
  for (let number = -1; number < count; number++) {
    const prompt = manifest.prompts[(number + 1) % manifest.prompts.length];
    const { ms, nfe } = await artist.draw({ prompt, seed: number + 1, steps, decoder });
    if (number >= 0) samples.push({ ...ms, nfe });
  }
  const { device, remark } = artist;
  const provenance = device.emulated ? "emulated" : "measured";
  tell("bench", {
    record: {
      model: manifest.model, bundle: manifest.bundle, runtime: manifest.runtime, steps, decoder,
      provenance, device, remark, browser: navigator.userAgent, cores: navigator.hardwareConcurrency,
      samples,
    },
  });
}

onmessage = async ({ data }) => {
  if (data.type === "draw") return draw(data.request);
  try {
    await open(data.query);
    const query = new URLSearchParams(data.query);
    if (query.has("bench")) await measure(query);
  } catch (error) {
    console.error(error);
    const { what, why, next } = Failure.parts(error);
    const words = [what, why, next].filter(Boolean).join("; ");
    tell("status", { state: "lost", words, error: { what, why, next } });
  }
};

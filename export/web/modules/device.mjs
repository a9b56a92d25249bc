/**
 * Where pictures are computed: WebGPU in FP16 or FP32, or the CPU by WebAssembly.
 *
 * The address decides over the choice: ?device=webgpu|wasm, ?precision=fp16|fp32, ?threads=N.
 */

import { Failure } from "./errors.mjs";

export const DEVICES = ["webgpu", "wasm"];
const MOST_THREADS = 4;

/** An empty function with a SIMD constant: what a browser without SIMD finds invalid. */
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10,
  1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

/** Refuse a browser that lacks what the runtime is built on. */
export function requireFeatures(scope = globalThis) {
  const missing = [];
  if (!scope.WebAssembly) missing.push("WebAssembly");
  else if (!scope.WebAssembly.validate(SIMD)) missing.push("SIMD of WebAssembly");
  if (!scope.BigInt64Array) missing.push("BigInt64Array");
  if (missing.length) {
    throw new Failure("this browser cannot draw", `it lacks ${missing.join(" and ")}`,
      "use one of the last three years");
  }
}

/**
 * The device to compute on.
 *
 * @param query URLSearchParams of the page
 * @param manifest of the folder
 * @param scope where `navigator` and `crossOriginIsolated` are; a test gives its own
 * @returns kind, precision, threads, build of the runtime, adapter, isolated, emulated, words
 */
export async function chooseDevice(query, manifest, scope = globalThis) {
  const asked = query.get("device");
  if (asked && !DEVICES.includes(asked)) {
    throw new Failure(`there is no device ${asked}`, `there are ${DEVICES.join(" and ")}`,
      "leave ?device= out for the page's own choice");
  }
  const adapter = asked === "wasm" ? null : await findAdapter(scope);
  const emulated = Boolean(adapter && isFallback(adapter));
  if (asked === "webgpu" && !adapter) {
    throw new Failure("there is no WebGPU here", "the browser gives no adapter",
      "leave ?device=webgpu out");
  }
  return adapter && (!emulated || asked === "webgpu")
    ? gpu(query, manifest, scope, adapter, emulated)
    : cpu(query, scope);
}

async function findAdapter(scope) {
  try {
    return await scope.navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  } catch {
    return null;
  }
}

/** Whether an adapter computes on the CPU: no faster than WebAssembly there, and less exact. */
function isFallback(adapter) {
  return adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
}

function gpu(query, manifest, scope, adapter, emulated) {
  const able = adapter.features.has("shader-f16") && manifest.precisions.includes("fp16");
  const precision = query.get("precision") ?? (able ? "fp16" : "fp32");
  if (precision === "fp16" && !able) {
    throw new Failure("FP16 cannot be computed here",
      "the adapter has no shader-f16, or the folder no graphs for it",
      "leave ?precision=fp16 out");
  }
  const { vendor = "", architecture = "" } = adapter.info ?? {};
  const name = [vendor, architecture].filter(Boolean).join(" ") || "an adapter without a name";
  const build = scope.WebAssembly && "Suspending" in scope.WebAssembly ? "jspi" : "asyncify";
  return {
    kind: "webgpu", precision, threads: 1, build, adapter: name, emulated,
    isolated: Boolean(scope.crossOriginIsolated),
    words: `WebGPU, ${name}, ${precision.toUpperCase()}${emulated ? ", emulated" : ""}`,
  };
}

/** The CPU; threads take isolation, which the server's headers give. */
export function cpu(query, scope = globalThis) {
  const isolated = Boolean(scope.crossOriginIsolated);
  const cores = scope.navigator?.hardwareConcurrency ?? 1;
  const wanted = Number(query.get("threads") ?? Math.min(MOST_THREADS, cores));
  if (!Number.isInteger(wanted) || wanted < 1 || wanted > 64) {
    throw new Failure(`${query.get("threads")} is no number of threads`, "it is 1 to 64",
      "leave ?threads= out");
  }
  const threads = isolated ? wanted : 1;
  const count = `${threads} thread${threads > 1 ? "s" : ""}`;
  return {
    kind: "wasm", precision: "fp32", threads, build: "wasm", adapter: "", emulated: false, isolated,
    words: `WebAssembly, ${count}${isolated ? "" : " (the page is not isolated)"}`,
  };
}

/** The runtime's files of a build: the module, and the binary that it is given. */
export function runtimeFiles(build) {
  const binary = build === "wasm" ? "" : `.${build}`;
  const module = build === "asyncify" ? "webgpu" : build;
  return {
    module: `ort/ort.${module}.min.mjs`,
    binary: `ort/ort-wasm-simd-threaded${binary}.wasm`,
  };
}

/** FP16 to FP32 and back, with the browser's own Float16Array or without. */

const Native = globalThis.Float16Array;
const word = new Uint32Array(1);
const real = new Float32Array(word.buffer);

function toBits(value) {
  real[0] = value;
  const bits = word[0];
  const sign = (bits >>> 16) & 0x8000;
  const exponent = (bits >>> 23) & 0xff;
  let mantissa = bits & 0x7fffff;
  if (exponent === 0xff) return sign | 0x7c00 | (mantissa ? 0x200 : 0);
  const target = exponent - 112;
  if (target >= 31) return sign | 0x7c00;
  let shift = 13;
  let base = target << 10;
  if (target <= 0) {
    if (target < -10) return sign;
    mantissa |= 0x800000;
    shift = 14 - target;
    base = 0;
  }
  const kept = mantissa >>> shift;
  const rest = mantissa & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  const up = rest > half || (rest === half && (kept & 1)); // to even; a carry goes into the exponent
  return sign | (base + kept + (up ? 1 : 0));
}

function fromBits(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
}

/** FP32 numbers as FP16, in what a tensor of onnxruntime takes. `native` is for tests. */
export function toHalf(values, native = Native) {
  return native ? new native(values) : Uint16Array.from(values, toBits);
}

/** Numbers of a tensor as FP32: Float16Array, its bits as Uint16Array, or FP32 as it is. */
export function toFloat(values) {
  if (values instanceof Float32Array) return values;
  return values instanceof Uint16Array ? Float32Array.from(values, fromBits)
    : new Float32Array(values);
}

/**
 * torch's generator on the CPU, so that a seed gives the same noise as in Python.
 *
 * MT19937 seeded with the low 32 bits, as torch does; 24-bit uniforms; Box-Muller in blocks of 16,
 * eight cosines before eight sines, as `normal_fill` has it in aten/src/ATen/native/cpu.
 */

const N = 624;
const M = 397;
const BLOCK = 16;
const f = Math.fround;

export class Generator {
  #state = new Uint32Array(N);
  #at = N;

  /** @param {number | bigint} seed from 0 to 2**63 - 1 */
  constructor(seed) {
    const state = this.#state;
    state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < N; i++) {
      state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    }
  }

  #refill() {
    const state = this.#state;
    for (let i = 0; i < N; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
      state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#at = 0;
  }

  /** A number of [0, 1) with 24 bits. */
  #uniform() {
    if (this.#at === N) this.#refill();
    let y = this.#state[this.#at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return (y & 0xffffff) / 0x1000000;
  }

  /** Standard normal numbers, as `torch.randn(size, generator=...)` draws them. */
  randn(size) {
    if (size < BLOCK) throw new RangeError(`${size} numbers: torch draws fewer than 16 otherwise`);
    const out = new Float32Array(size);
    for (let i = 0; i < size; i++) out[i] = this.#uniform();
    for (let start = 0; start + BLOCK <= size; start += BLOCK) boxMuller(out, start);
    if (size % BLOCK) {
      const start = size - BLOCK; // the last 16 are drawn anew, over what was there
      for (let i = start; i < size; i++) out[i] = this.#uniform();
      boxMuller(out, start);
    }
    return out;
  }
}

function boxMuller(out, start) {
  for (let i = start; i < start + BLOCK / 2; i++) {
    // Rounded where torch rounds: the angle by itself would be 1e-6 off.
    const radius = f(Math.sqrt(f(-2 * f(Math.log(1 - out[i])))));
    const angle = f(f(2 * Math.PI) * out[i + BLOCK / 2]);
    out[i] = radius * Math.cos(angle);
    out[i + BLOCK / 2] = radius * Math.sin(angle);
  }
}

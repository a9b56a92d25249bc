/**
 * Files of the folder by name: from the browser's cache by their hash, or downloaded with progress.
 *
 * What is read is what the manifest says: a file with another hash is refused by name. Where the
 * browser gives no cache (private windows, full disks) all works without one.
 */

import { Failure } from "./errors.mjs";

const CACHE = "addbench-web";

export class Store {
  #cache = null;
  #received = 0;
  #total = 0;

  /**
   * @param manifest of the folder
   * @param base address of the folder
   * @param progress is told the bytes that are there and those that are to come
   * @param scope where `fetch`, `caches` and `crypto` are; a test gives its own
   */
  constructor(manifest, base, progress = () => {}, scope = globalThis) {
    Object.assign(this, { manifest, base, progress, scope });
  }

  /** Open the cache, drop what the manifest does not know any more. */
  async open() {
    try {
      this.#cache = await this.scope.caches.open(CACHE);
      const wanted = new Set(Object.values(this.manifest.files).map(({ sha256 }) => this.#key(sha256)));
      for (const { url } of await this.#cache.keys()) {
        if (url.startsWith(this.#key("")) && !wanted.has(url)) await this.#cache.delete(url);
      }
    } catch {
      this.#cache = null;
    }
    return this;
  }

  /** Whether files are kept for the next visit. */
  get keeps() {
    return this.#cache !== null;
  }

  #key(sha256) {
    return new URL(`.by-hash/${sha256}`, this.base).href;
  }

  /** Say which files will be read: what progress counts. */
  expect(names) {
    for (const name of names) this.#total += this.#entry(name).bytes;
  }

  #entry(name) {
    const entry = this.manifest.files[name];
    if (!entry) throw new Failure(`${name} is not in the manifest`, "the folder is not whole", AGAIN);
    return entry;
  }

  /** The bytes of a file, checked against its hash. */
  async read(name) {
    const entry = this.#entry(name);
    const kept = await this.#kept(entry);
    if (kept) {
      this.#received += entry.bytes;
      this.progress(this.#received, this.#total);
      return kept;
    }
    let bytes = await this.#download(name, "default");
    if (!(await this.#right(bytes, entry))) { // an old copy in the HTTP cache, or cut off
      this.#received -= bytes.length;
      bytes = await this.#download(name, "reload");
    }
    if (!(await this.#right(bytes, entry))) {
      throw new Failure(`${name} is not what the manifest says`,
        `${bytes.length} bytes came, ${entry.bytes} were written, with another hash`, AGAIN);
    }
    await this.#keep(entry, bytes);
    return bytes;
  }

  async #kept(entry) {
    try {
      const response = await this.#cache?.match(this.#key(entry.sha256));
      if (!response) return null;
      const bytes = new Uint8Array(await response.arrayBuffer());
      if (await this.#right(bytes, entry)) return bytes;
      await this.#cache.delete(this.#key(entry.sha256));
    } catch {
      this.#cache = null;
    }
    return null;
  }

  async #keep(entry, bytes) {
    try {
      await this.#cache?.put(this.#key(entry.sha256), new Response(bytes));
    } catch { // no room: go on without
      this.#cache = null;
    }
  }

  async #right(bytes, entry) {
    if (bytes.length !== entry.bytes) return false;
    const subtle = this.scope.crypto?.subtle; // not in a page by http from another machine
    if (!subtle) return true;
    const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === entry.sha256;
  }

  async #download(name, cache) {
    let response;
    try {
      response = await this.scope.fetch(new URL(name, this.base), { cache });
    } catch (error) {
      throw new Failure(`${name} could not be loaded`, error.message, "check the connection, reload");
    }
    if (!response.ok) {
      throw new Failure(`${name} could not be loaded`, `the server answers ${response.status}`, AGAIN);
    }
    const { bytes: expected } = this.#entry(name);
    const parts = [];
    let length = 0;
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      length += value.length;
      this.#received += value.length;
      this.progress(this.#received, this.#total);
    }
    const bytes = new Uint8Array(length);
    let at = 0;
    for (const part of parts) {
      bytes.set(part, at);
      at += part.length;
    }
    if (length > expected) this.#received -= length - expected;
    return bytes;
  }
}

const AGAIN = "put the whole folder on the server again: addbench export web";

// The page: text (and a picture) to a transport at every key, the newest picture back.
//
// A transport draws. It is made by `connect(handlers, facts)` of a module, and has `send(request, picture)`
// and `close()`; it calls `handlers.status({state, words, progress})` with state `loading`, `ready`
// or `lost`, and `handlers.answer(header, blob)` with what `/live` answers. `send` may be called at
// any time: the newest request wins, and what was sent last is drawn. The script's `data-transport`
// names the module; `socket` is the one below, over a WebSocket.

const TOKENS = 77;
const element = (id) => document.getElementById(id);

// ---- the transport of a server

const encoder = new TextEncoder();
const decoder = new TextDecoder();

function pack(header, body) {
  const text = encoder.encode(JSON.stringify(header));
  const message = new Uint8Array(4 + text.length + body.length);
  new DataView(message.buffer).setUint32(0, text.length);
  message.set(text, 4);
  message.set(body, 4 + text.length);
  return message;
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
  return [header, buffer.slice(4 + length)];
}

export function connect(handlers, facts) {
  const url = new URL("live", location.href);
  if (facts.width < 200) url.searchParams.set("format", "png"); // small, and JPEG shows on flat colours
  url.protocol = url.protocol.replace("http", "ws");
  let socket = null, tries = 0, timer = 0, closed = false, newest = null;

  function open() {
    clearTimeout(timer);
    socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { tries = 0; if (newest) transmit(); };
    socket.onmessage = ({ data }) => {
      const [header, body] = unpack(data);
      if (header.status) {
        const ready = header.status === "ready";
        handlers.status({ state: ready ? "ready" : "loading", words: header.stage || header.status, progress: header.progress ?? undefined });
      } else {
        handlers.answer(header, new Blob([body], { type: `image/${header.format}` }));
      }
    };
    socket.onclose = ({ reason }) => {
      if (closed) return;
      const seconds = Math.min(8, 0.25 * 2 ** tries++) * (0.75 + Math.random() / 2);
      const when = seconds < 1 ? "" : `, trying again in ${Math.round(seconds)} s`;
      handlers.status({ state: "lost", words: `${reason || "the connection is lost"}${when}` });
      timer = setTimeout(open, 1000 * seconds);
    };
  }

  function transmit() {
    const { request, picture } = newest;
    socket.send(pack(request, picture ?? new Uint8Array()));
  }

  addEventListener("online", () => { if (socket.readyState > 1) open(); });
  open();
  return {
    send(request, picture) {
      newest = { request, picture };
      if (socket.readyState === WebSocket.OPEN) transmit();
    },
    close() { closed = true; clearTimeout(timer); socket.close(); },
  };
}

// ---- what the grammar says may come next

/** Suggestions for a text: pieces that may come next, by a walk through the grammar's tree. */
export function suggestions(tree, text, most = 7) {
  const found = new Map();
  const lower = text.toLowerCase().replace(/\s+/g, " ").trimStart();
  const keep = (node, word, typed) => {
    if (!found.has(word)) found.set(word, { word, kind: node.kind, typed });
  };
  (function walk(nodes, rest, first) {
    for (const node of nodes) {
      for (const word of node.words) {
        const gap = first || word === "," ? "" : " ";
        const next = gap + word;
        if (rest.length < next.length ? next.startsWith(rest) : next === rest && node.end) {
          if (next !== rest) keep(node, word, rest);
        } else if (rest === next || rest.startsWith(next + " ") || rest.startsWith(next + ",")) {
          walk(node.next, rest.slice(next.length), false);
        }
      }
    }
  })(tree.next, lower, true);
  if (!found.size) loosely(tree, lower, keep);
  return [...found.values()].slice(0, most);
}

/** Words that go on after the last whole word, wherever in the grammar it stands: people write
 * "two red circles", and the model knows that too. */
function loosely(tree, lower, keep) {
  const [, before, part] = /^(.*?)([^\s,]*)$/.exec(lower);
  const last = before.trim().split(/[\s,]+/).pop() ?? "";
  const all = [];
  (function collect(node) { for (const next of node.next) { all.push([node, next]); collect(next); } })(tree);
  for (const [node, next] of all) {
    const follows = node.words.some((word) => word.split(" ").pop() === last.replace(/s$/, "") || word.split(" ").pop() === last);
    if (last === "" || follows) {
      for (const word of next.words) if (word.startsWith(part) && word !== part) keep(next, word, part);
    }
  }
  if (last !== "" && part === "") return;
  for (const [, next] of all) {
    for (const word of next.words) if (part && word.startsWith(part) && word !== part) keep(next, word, part);
  }
}

/** The text with a suggestion put at its end in place of what was typed of it. */
export function completed(text, { word, typed }) {
  const base = text.slice(0, text.length - typed.trimStart().length).trimEnd();
  return (base && word !== "," ? `${base} ` : base) + word + " ";
}

// ---- the page

class Page {
  constructor(facts, transport) {
    this.facts = facts;
    this.key = 0;
    this.pressed = new Map();
    this.latencies = [];
    this.shown = [];
    this.skipped = 0;
    this.steps = facts.steps;
    this.decoder = facts.decoders[0];
    this.desk = null;
    this.build();
    this.transport = transport({ status: (s) => this.status(s), answer: (h, b) => this.answer(h, b) }, facts);
    this.typed();
  }

  build() {
    const { facts } = this;
    document.title = `${facts.name}: a picture as you type`;
    element("name").textContent = facts.name;
    element("about").textContent = facts.sentence;
    document.documentElement.style.setProperty("--aspect", `${facts.width} / ${facts.height}`);
    const picture = element("picture");
    picture.width = facts.width;
    picture.height = facts.height;
    picture.classList.toggle("small", facts.width < 200);
    this.paint = picture.getContext("2d");
    choose(element("steps"), facts.step_choices, this.steps, (value) => { this.steps = value; this.send(); });
    choose(element("decoder"), facts.decoders, this.decoder, (value) => { this.decoder = value; this.send(); });
    element("decoder").parentElement.hidden = facts.decoders.length < 2;
    element("steps").parentElement.hidden = facts.step_choices.length < 2;

    this.prompt = element("prompt");
    this.prompt.addEventListener("input", () => this.typed());
    this.prompt.addEventListener("keydown", (event) => {
      const first = this.offered?.[0];
      if (event.key === "Tab" && !event.shiftKey && first && this.prompt.selectionEnd === this.prompt.value.length) {
        event.preventDefault();
        this.write(completed(this.prompt.value, first));
      } else if (event.key === "Enter") event.preventDefault();
    });
    element("form").addEventListener("submit", (event) => event.preventDefault());
    element("seed").addEventListener("input", ({ target }) => {
      target.value = target.value.replace(/\D/g, "").slice(0, 15);
      this.send();
    });
    element("dice").addEventListener("click", () => {
      element("seed").value = Math.floor(Math.random() * 1e6);
      this.send();
    });
    element("example").hidden = !facts.examples.length;
    element("example").addEventListener("click", () => this.write(this.example()));
    document.addEventListener("visibilitychange", () => { if (!document.hidden && this.stale) this.send(); });
    this.prompt.value = this.example();
    if (matchMedia("(hover: hover)").matches) this.prompt.focus();
    if (facts.pictures) this.desk = new Desk(this, facts);
  }

  example() {
    const { examples } = this.facts;
    return examples[Math.floor(Math.random() * examples.length)] ?? "";
  }

  write(text) {
    this.prompt.value = text;
    this.prompt.focus();
    this.prompt.setSelectionRange(text.length, text.length);
    this.typed();
  }

  typed() {
    this.send();
    this.suggest();
  }

  /** Send what there is now. No timer and no queue: the transport keeps the newest. */
  send() {
    this.stale = document.hidden;
    if (this.stale || !this.transport) return;
    const id = ++this.key;
    this.pressed.set(id, performance.now());
    element("of").textContent = id;
    element("dot").classList.add("busy");
    const request = {
      id, prompt: this.prompt.value, seed: Number(element("seed").value || 0),
      steps: this.steps, decoder: this.decoder,
    };
    const picture = this.desk?.picture();
    if (picture) Object.assign(request, { strength: this.desk.strength, steps: this.desk.steps });
    this.transport.send(request, picture);
  }

  /** What only a loaded model knows. */
  async settle() {
    const { pictures, pairs } = await fetchFacts();
    if (this.desk && pictures) this.desk.offer(pairs);
    element("start-knob").hidden = !pictures;
  }

  status({ state, words, progress }) {
    if (state === "ready" && !this.settled) { this.settled = true; this.settle(); }
    document.body.dataset.state = state;
    element("words").textContent = state === "loading" ? "loading" : words;
    element("veil-words").textContent = words;
    const bar = element("progress");
    bar.hidden = state !== "loading";
    if (progress === undefined) bar.removeAttribute("value"); else bar.value = progress;
    if (state === "lost") element("dot").classList.remove("busy");
  }

  async answer(header, blob) {
    if (header.error) {
      const { what, why, next } = header.error;
      this.tell(`${what}: ${why}; ${next}`, "bad");
      if (header.id === this.key) element("dot").classList.remove("busy");
      return;
    }
    const image = await createImageBitmap(blob);
    if (header.id < (this.last ?? 0)) return image.close();
    this.last = header.id;
    this.paint.drawImage(image, 0, 0);
    image.close();
    if (header.id === this.key) element("dot").classList.remove("busy");
    this.measure(header);
    this.note(header);
    this.desk?.drawn();
  }

  measure(header) {
    const now = performance.now();
    const pressed = this.pressed.get(header.id);
    for (const id of this.pressed.keys()) if (id <= header.id) this.pressed.delete(id);
    if (pressed !== undefined) this.latencies = [...this.latencies.slice(-14), now - pressed];
    this.shown = [...this.shown.filter((time) => now - time < 2000), now];
    this.skipped += header.skipped ?? 0;
    const middle = [...this.latencies].sort((a, b) => a - b)[this.latencies.length >> 1];
    element("latency").textContent = middle === undefined ? "–" : middle < 10 ? middle.toFixed(1) : Math.round(middle);
    const span = now - this.shown[0];
    element("rate").textContent = this.shown.length > 2 ? (1000 * (this.shown.length - 1) / span).toFixed(1) : "–";
    element("at").textContent = header.id;
    element("skipped").textContent = this.skipped;
    const stages = element("stages");
    const parts = Object.entries(header.ms ?? {}).filter(([name]) => !["total", "server"].includes(name));
    stages.title = parts.map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`).join(", ");
    while (stages.childElementCount < parts.length) stages.append(document.createElement("i"));
    parts.forEach(([, ms], index) => { stages.children[index].style.flexGrow = ms; });
    clearTimeout(this.resting);
    this.resting = setTimeout(() => { this.shown = []; element("rate").textContent = "–"; }, 2500);
  }

  note({ tokens, cut_at: cut, unknown }) {
    if (cut) this.tell(`${tokens} tokens: the text encoders read ${cut}, the rest is cut`, "warn");
    else if (unknown?.length) this.tell(`${this.facts.name} was never shown ${unknown.map((word) => `“${word}”`).join(", ")}`, "warn");
    else this.tell(tokens === undefined ? "" : `${tokens} of ${TOKENS} tokens`, "");
  }

  tell(text, kind) {
    element("notes").textContent = text;
    element("notes").className = kind;
  }

  suggest() {
    if (!this.facts.tree) return;
    this.offered = suggestions(this.facts.tree, this.prompt.value);
    element("chips").replaceChildren(...this.offered.map((offer, index) => {
      const chip = document.createElement("button");
      chip.type = "button";
      const rgb = this.facts.colours[offer.word];
      if (rgb && (offer.kind === "colour" || offer.kind === "background")) {
        const swatch = document.createElement("i");
        swatch.style.background = `rgb(${rgb})`;
        chip.append(swatch);
      }
      chip.append(offer.word);
      if (!index) {
        const hint = document.createElement("kbd");
        hint.textContent = "tab";
        chip.append(hint);
      }
      chip.addEventListener("click", () => this.write(completed(this.prompt.value, offer)));
      return chip;
    }));
  }
}

/** Buttons of which one is pressed. */
function choose(group, values, chosen, pick) {
  group.replaceChildren(...values.map((value) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = value;
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(value === chosen));
    button.addEventListener("click", () => {
      for (const other of group.children) other.setAttribute("aria-checked", String(other === button));
      pick(value);
    });
    return button;
  }));
}

/** The sheet that a picture starts from: strokes, a dropped file and the camera all land on it. */
class Desk {
  constructor(page, facts) {
    this.page = page;
    this.on = false;
    this.offer(facts.pairs);
    this.bytes = null;
    this.canvas = element("paper");
    this.canvas.width = facts.width;
    this.canvas.height = facts.height;
    this.canvas.classList.toggle("small", facts.width < 200);
    this.paint = this.canvas.getContext("2d", { willReadFrequently: true });
    this.paint.lineCap = this.paint.lineJoin = "round";
    this.colours = facts.colours ?? { black: [20, 20, 20], white: [255, 255, 255], red: [225, 30, 30], yellow: [245, 215, 20], green: [30, 160, 40], blue: [35, 60, 225] };
    const names = Object.keys(this.colours).slice(0, 9);
    this.ground = this.colours.black;
    this.brush = this.colours.red ?? [225, 30, 30];
    element("brushes").replaceChildren(...names.map((name) => this.well(name)));
    element("start-knob").hidden = false;
    element("start").addEventListener("click", () => this.use(!this.on));
    element("clear").addEventListener("click", () => { this.stop(); this.clear(); this.changed(); });
    element("camera").addEventListener("click", () => (this.stream ? this.stop() : this.film()));
    element("file").addEventListener("change", ({ target }) => { this.open(target.files[0]); target.value = ""; });
    element("strength").addEventListener("input", ({ target }) => {
      this.pick(Number(target.value));
      this.page.send();
    });
    this.canvas.addEventListener("pointerdown", (event) => this.stroke(event, true));
    this.canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) this.stroke(event, false); });
    for (const type of ["dragover", "drop", "dragleave"]) addEventListener(type, (event) => this.drag(type, event));
    this.clear();
  }

  /** Take the [steps, strength] that suit the model, the least redrawn first. */
  offer(pairs) {
    this.pairs = pairs;
    const far = (n) => Math.abs(pairs[n][1] - 0.5);
    this.pick([...pairs.keys()].reduce((best, n) => (far(n) < far(best) ? n : best), 0));
    element("strength").max = pairs.length - 1;
    element("strength").value = this.chosen;
  }

  pick(chosen) {
    this.chosen = chosen;
    [this.steps, this.strength] = this.pairs[chosen];
    element("strength-value").textContent = `${Math.round(100 * this.strength)}% in ${this.steps} steps`;
  }

  well(name) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = name;
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", name);
    button.setAttribute("aria-checked", String(this.colours[name] === this.brush));
    button.style.background = `rgb(${this.colours[name]})`;
    button.addEventListener("click", () => {
      this.brush = this.colours[name];
      for (const other of button.parentElement.children) other.setAttribute("aria-checked", String(other === button));
    });
    return button;
  }

  use(on) {
    this.on = on;
    element("desk").hidden = !on;
    element("start").setAttribute("aria-pressed", String(on));
    element("steps").parentElement.hidden = on || this.page.facts.step_choices.length < 2;
    if (!on) this.stop();
    this.changed();
  }

  clear() {
    this.paint.fillStyle = `rgb(${this.ground})`;
    this.paint.fillRect(0, 0, this.canvas.width, this.canvas.height);
    element("drop-hint").hidden = false;
  }

  stroke(event, first) {
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * this.canvas.width;
    const y = (event.clientY - box.top) / box.height * this.canvas.height;
    if (first) this.canvas.setPointerCapture(event.pointerId);
    const [from, at] = first ? [x, y] : this.pen;
    this.paint.strokeStyle = `rgb(${this.brush})`;
    this.paint.lineWidth = Math.max(2, this.canvas.width / 11);
    this.paint.beginPath();
    this.paint.moveTo(from, at);
    this.paint.lineTo(x, y);
    this.paint.stroke();
    this.pen = [x, y];
    this.changed();
  }

  drag(type, event) {
    const files = [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    if (type !== "dragleave" && files) event.preventDefault();
    element("desk").classList.toggle("dropping", type === "dragover" && files);
    if (type === "drop" && files) this.open(event.dataTransfer.files[0]);
  }

  async open(file) {
    if (!file) return;
    try {
      const image = await createImageBitmap(file);
      this.stop();
      if (!this.on) this.use(true);
      this.cover(image, image.width, image.height);
      image.close();
      this.changed();
    } catch {
      this.page.tell(`${file.name} is no picture that this browser reads: take a PNG, JPEG or WebP`, "bad");
    }
  }

  cover(image, width, height) {
    const scale = Math.max(this.canvas.width / width, this.canvas.height / height);
    const [w, h] = [width * scale, height * scale];
    this.paint.drawImage(image, (this.canvas.width - w) / 2, (this.canvas.height - h) / 2, w, h);
  }

  async film() {
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
    } catch (error) {
      const why = location.protocol === "https:" || /^(localhost|127\.|\[::1\])/.test(location.host) ? error.message : "browsers give it to https pages and to localhost alone";
      return this.page.tell(`no camera: ${why}`, "bad");
    }
    const video = element("video");
    video.hidden = false;
    video.srcObject = this.stream;
    await video.play();
    element("camera").setAttribute("aria-pressed", "true");
    this.frame();
  }

  /** A frame onto the sheet; the next one when its picture is there, so the camera never hurries. */
  frame() {
    const video = element("video");
    if (!this.stream) return;
    if (video.videoWidth && !document.hidden) {
      this.cover(video, video.videoWidth, video.videoHeight);
      this.changed();
    }
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.frame(), 1000);
  }

  drawn() {
    if (this.stream) requestAnimationFrame(() => this.frame());
  }

  stop() {
    clearTimeout(this.waiting);
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    element("video").hidden = true;
    element("camera").setAttribute("aria-pressed", "false");
  }

  /** The sheet has changed: its file is written, then sent with the text. */
  changed() {
    element("drop-hint").hidden = true;
    if (!this.on) { this.bytes = null; return this.page.send(); }
    if (this.writing) { this.again = true; return; }
    this.writing = true;
    this.canvas.toBlob(async (blob) => {
      this.bytes = new Uint8Array(await blob.arrayBuffer());
      this.writing = false;
      this.page.send();
      if (this.again) { this.again = false; this.changed(); }
    }, "image/jpeg", 0.92);
  }

  picture() { return this.on ? this.bytes : null; }
}

const fetchFacts = async () => (await fetch(new URL("page.json", document.baseURI))).json();
const script = document.querySelector("script[data-transport]");
if (script) {
  const named = script.dataset.transport;
  const transport = named === "socket" ? connect : (await import(new URL(named, document.baseURI))).connect;
  globalThis.page = new Page(await fetchFacts(), transport);
}

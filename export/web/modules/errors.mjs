/** What goes wrong, in three parts, as the command line says it: what happened, why, what to do. */

export class Failure extends Error {
  constructor(what, why = "", next = "") {
    super(what);
    this.name = "Failure";
    Object.assign(this, { what, why, next });
  }

  /** The three parts of any error; one that is not of this kind is a fault of the page. */
  static parts(error) {
    if (error instanceof Failure) return { what: error.what, why: error.why, next: error.next };
    const why = String(error?.message ?? error).split("\n")[0].slice(0, 300);
    return { what: "the page failed", why, next: "reload it; the browser's console says where" };
  }
}

/** The picture holds NaN or infinity: an op overflowed on the device that computes. */
export class NonFinite extends Failure {
  constructor() {
    super("the picture holds NaN or infinity", "an op overflowed on this device",
      "choose another device, as with ?device=wasm");
  }
}

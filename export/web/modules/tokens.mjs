/** CLIP's tokens of a text, as transformers gives them: cut at 77, padded to 77. */

/** Lower case as Python's tokenizer has it: letter by letter, no other sigma at the end of a word. */
const SIGMA = "\u03a3";

export class ClipTokens {
  #tokenizer;
  #entry;

  /**
   * @param Tokenizer the class of @huggingface/tokenizers
   * @param json the content of tokenizer.json
   * @param entry of the manifest: length, start, end and pad
   */
  constructor(Tokenizer, json, entry) {
    this.#tokenizer = new Tokenizer(json, {});
    this.#entry = entry;
  }

  /** Token ids, and how many there were before the cut. */
  encode(text) {
    const { length, start, end, pad } = this.#entry;
    const own = this.#tokenizer.encode(text.replaceAll(SIGMA, "\u03c3"), { add_special_tokens: false }).ids;
    const ids = new BigInt64Array(length).fill(BigInt(pad));
    const kept = Math.min(own.length, length - 2);
    ids[0] = BigInt(start);
    for (let i = 0; i < kept; i++) ids[i + 1] = BigInt(own[i]);
    ids[kept + 1] = BigInt(end);
    return { ids, count: own.length + 2 };
  }
}

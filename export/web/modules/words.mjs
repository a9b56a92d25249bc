/** The words of a text that a model was never shown, as distill/shapes.py tells them. */

/** What Python takes for space between words; to JavaScript U+FEFF is one too, and U+0085 is none. */
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;

/**
 * Words that begin none of `known`, the first eight of them.
 *
 * @param known the words of the captions that the model was trained on; null where it knows any
 */
export function unknownWords(text, known) {
  if (!known) return [];
  const words = text.toLowerCase().split(SPACE).map((word) => word.replace(/^[.,]+|[.,]+$/g, ""));
  return words.filter((word) => !known.some((each) => each.startsWith(word))).slice(0, 8);
}

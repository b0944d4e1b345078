// Text of others: names, descriptions, errors and results come from servers that anybody wrote. It is only ever put into
// text nodes, and what people would not see in it is written out.

import { html, useRef, useState } from "./preact.js";

/** Control characters but line feed and tab, and what is invisible or turns the direction of text: general categories Cc,
 *  Cf, Zl, Zp, Cs and Co, the fillers that look like spaces, and variation selectors. */
const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\u034F\u115F\u1160\u17B4\u17B5\u2800\u3164\uFFA0\u{FE00}-\u{FE0F}\u{E0100}-\u{E01EF}]/gu;

/** What is beyond four marks on one letter would run over the lines around. */
const STACKED = /(?<=\p{M}{4})\p{M}+/gu;

const HIDDEN = new RegExp(`${UNSEEN.source}|${STACKED.source}`, "gu");

/** A text as pieces: strings, and `{ escape }` in place of each character that nobody would see. */
export function pieces(text) {
  const found = [];
  let from = 0;
  const flat = text.replace(/\r\n/g, "\n");
  for (const match of flat.matchAll(HIDDEN)) {
    const hidden = match[0];
    if (hidden === "\n" || hidden === "\t" || isJoiner(flat, match.index)) continue;
    if (match.index > from) found.push(flat.slice(from, match.index));
    const points = [...hidden.slice(0, 8)].map((point) => `\\u{${point.codePointAt(0).toString(16)}}`);
    found.push({ escape: points.slice(0, 2).join("") + (points.length > 2 ? "…" : "") });
    from = match.index + hidden.length;
  }
  if (from < flat.length) found.push(flat.slice(from));
  return found;
}

/** Emoji are joined and coloured by characters that are none of a liar's. */
function isJoiner(text, at) {
  const code = text.codePointAt(at);
  return (code === 0x200d || code === 0xfe0f) && /\p{Extended_Pictographic}\uFE0F?\p{Emoji_Modifier}?$/u.test(text.slice(Math.max(0, at - 8), at));
}

/** The same in one string, for places that hold nothing but text: a title, an attribute, an announcement. */
export function visible(text, limit = 200) {
  const whole = pieces(start(String(text), limit)).map((piece) => piece.escape ?? piece).join("");
  return String(text).length > limit ? `${whole}…` : whole;
}

/** The first `limit` UTF-16 units, without half of a pair at the end. */
function start(text, limit) {
  return text.length <= limit ? text : text.slice(0, limit).replace(/[\uD800-\uDBFF]$/, "");
}

/** A name of others, in a place where nothing can be pressed but the whole: a link, a button. */
export const Name = ({ text, limit = 200 }) => html`<bdi>${visible(text, limit)}</bdi>`;

/** Text of others. `limit`: how many characters are shown before the user asks for all of them; `block`: as lines of their
 *  own, with their line breaks. */
export function Shown({ text, limit = 2000, block = false }) {
  const [all, setAll] = useState(false);
  const place = useRef(null);
  // The button is gone when it was pressed; whoever pressed it is at the text.
  const showAll = () => { setAll(true); place.current.focus(); };
  const whole = text === null || text === undefined ? "" : String(text);
  const cut = !all && whole.length > limit;
  const parts = pieces(cut ? start(whole, limit) : whole);
  const body = parts.map((piece) => (
    piece.escape ? html`<span class="escape" title="A character that is not seen">${piece.escape}</span>` : piece
  ));
  return html`<span class=${block ? "shown block" : "shown"} dir="auto" ref=${place} tabindex=${whole.length > limit ? "-1" : undefined}>${body}${cut && html`… <button type="button" class="link"
    onClick=${showAll}>Show all ${whole.length.toLocaleString()} characters</button>`}</span>`;
}

/** An instant of the API, in words of the user's place. */
export function Instant({ at }) {
  const date = new Date(at);
  if (!at || Number.isNaN(date.getTime())) return html`<span>never</span>`;
  return html`<time datetime=${at} title=${date.toLocaleString()}>${ago(date)}</time>`;
}

const UNITS = [["second", 60], ["minute", 60], ["hour", 24], ["day", 30], ["month", 12], ["year", Infinity]];
const RELATIVE = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });

function ago(date) {
  let span = (date.getTime() - Date.now()) / 1000;
  for (const [unit, size] of UNITS) {
    if (Math.abs(span) < size) return RELATIVE.format(Math.round(span), unit);
    span /= size;
  }
  return date.toLocaleString();
}

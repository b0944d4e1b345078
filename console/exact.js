// JSON without loss: JavaScript rounds numbers beyond 53 bits, and a tool may give or take an id that has more.

/** A number that JavaScript would round, with the digits it was written with. */
export class Exact {
  constructor(digits) {
    this.digits = digits
  }
}

const TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g

function isRounded(token) {
  const number = Number(token)
  if (!Number.isFinite(number)) return true
  if (/^-?\d+$/.test(token)) return !Number.isSafeInteger(number)
  return token.replace(/[eE].*$/, '').replace(/\D/g, '').replace(/^0+/, '').length > 15
}

/** A number as it was typed: a plain one when it is kept so, else an Exact one. */
export const numberOf = (token) => (isRounded(token) ? new Exact(token) : Number(token))

/** Reads JSON, with Exact numbers where plain ones would be others; throws SyntaxError as JSON.parse does. */
export function read(text) {
  const value = JSON.parse(text)
  if (!/\d{16}|\d\.\d{15}|\d[eE]/.test(text)) return value
  let mark = 'exact:'
  while (text.includes(mark)) mark += ':'
  const marked = text.replace(TOKEN, (token) => (token[0] !== '"' && isRounded(token) ? `"${mark}${token}"` : token))
  return JSON.parse(marked, (_, part) =>
    typeof part === 'string' && part.startsWith(mark) ? new Exact(part.slice(mark.length)) : part)
}

/** Writes a value that `read` gave, or a plain one, on several lines. */
export function write(value, space = 2) {
  let mark = 'exact:'
  const text = JSON.stringify(value)
  while (text.includes(mark)) mark += ':'
  const marked = JSON.stringify(mask(value, mark), null, space)
  return marked.replaceAll(new RegExp(`"${mark}([^"]*)"`, 'g'), '$1')
}

function mask(value, mark) {
  if (value instanceof Exact) return mark + value.digits
  if (Array.isArray(value)) return value.map((item) => mask(item, mark))
  if (value === null || typeof value !== 'object') return value
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mask(item, mark)]))
}

/** Deeper JSON than this is not indented: the spaces would be more than the text. */
const DEEPEST = 100

/**
 * The same JSON object or array on several lines, or null when the text is none: every number, escape and repeated key stays as it is
 * written.
 */
export function indent(text) {
  if (!/^\s*[[{]/.test(text)) return null
  try {
    JSON.parse(text)
  } catch {
    return null
  }
  const out = []
  let depth = 0
  const line = () => out.push('\n', '  '.repeat(depth))
  const tokens = text.match(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{},:]|[^\s[\]{},:"]+/g)
  for (const [at, token] of tokens.entries()) {
    if (token === '{' || token === '[') {
      out.push(token)
      depth += 1
      if (depth > DEEPEST) return null
      if (tokens[at + 1] !== '}' && tokens[at + 1] !== ']') line()
    } else if (token === '}' || token === ']') {
      depth -= 1
      if (tokens[at - 1] !== '{' && tokens[at - 1] !== '[') line()
      out.push(token)
    } else if (token === ',') {
      out.push(token)
      line()
    } else {
      out.push(token === ':' ? ': ' : token)
    }
  }
  return out.join('')
}

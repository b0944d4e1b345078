// A JSON Schema as a form: which control asks for which value, what was entered so far (drafts), and the arguments that
// come of it. Nothing here touches the page.
//
// A field says what is asked for: { kind, name, title, hint, required, nullable, … }, `kind` being one of
//   text, number, integer, boolean, choice (options), object (fields, open), list (item), variants (options), json (why).
// A draft says what was entered: { mode, value }, `mode` being
//   absent  left out of the arguments
//   null    null
//   json    `value` is JSON text: for what a control cannot say, and for values that do not suit their schema
//   given   `value` is a text (text, number, integer), true or false, an index (choice), { index, draft } (variants),
//           an array of { key, draft } (list), or { drafts, extra } (object; `extra` is JSON text of other properties).
//
// Schemas come from servers that nobody here knows. So no pattern of theirs is run (it may never end), no reference is
// followed for ever, and a form has an end: what is deeper or longer is asked for as JSON.

import { Exact, numberOf, read, write, writeVisibly } from "./exact.js";

const DEEPEST = 6;
const MOST_FIELDS = 250;
const MOST_CHOICES = 500;
const MOST_VARIANTS = 12;

/** The form of an input schema. */
export function formOf(schema) {
  const form = { root: schema, left: MOST_FIELDS };
  const field = fieldOf(schema, form, { name: "", required: true, depth: 0, followed: [] });
  if (field.kind === "object" && !field.nullable) return field;
  return { ...field, kind: "json", why: "The schema describes no plain object.", example: "{}" };
}

const isObject = (value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) && !(value instanceof Exact);
const textOf = (value) => (typeof value === "string" ? value : null);

function fieldOf(given, form, at) {
  form.left -= 1;
  const { schema, followed, why } = resolve(given, form.root, at.followed);
  const field = { ...annotations(schema, at), kind: "json" };
  if (why) return { ...field, why };
  if (form.left < 0) return { ...field, why: "The form would be too long." };
  return { ...field, ...control(schema, form, { ...at, followed }) };
}

/** Follows references and single-member `allOf`; a key beside a reference goes before the one it leads to. */
function resolve(given, root, before) {
  let schema = given;
  const followed = [...before];
  for (;;) {
    if (schema === true) return { schema: {}, followed };
    if (!isObject(schema)) return { schema: {}, followed, why: "The schema cannot be read." };
    const { $ref, allOf, ...rest } = schema;
    if ($ref !== undefined) {
      if (followed.includes($ref)) return { schema: rest, followed, why: "The schema contains itself." };
      const target = lookUp(root, $ref);
      if (target === undefined) return { schema: rest, followed, why: "The schema refers to one that is not there." };
      followed.push($ref);
      schema = target === true ? rest : isObject(target) ? { ...target, ...rest, ...(allOf && { allOf }) } : target;
    } else if (Array.isArray(allOf) && allOf.length === 1 && isObject(allOf[0])) {
      schema = { ...allOf[0], ...rest };
    } else {
      return { schema, followed };
    }
    if (followed.length > 50) return { schema: {}, followed, why: "The schema has too many references." };
  }
}

function lookUp(root, reference) {
  if (typeof reference !== "string" || !reference.startsWith("#/")) return undefined;
  let place = root;
  for (const step of reference.slice(2).split("/")) {
    let key = step.replaceAll("~1", "/").replaceAll("~0", "~");
    try {
      key = decodeURIComponent(key);
    } catch {
      // A key with a bare percent sign.
    }
    if (place === null || typeof place !== "object" || !Object.hasOwn(place, key)) return undefined;
    place = place[key];
  }
  return place;
}

function annotations(schema, { name, required }) {
  return {
    name,
    required,
    nullable: false,
    title: textOf(schema.title),
    hint: textOf(schema.description),
    limits: limits(schema),
    examples: Array.isArray(schema.examples) ? schema.examples.slice(0, 3) : [],
    deprecated: schema.deprecated === true,
    default: schema.default,
  };
}

/** What the schema says of size and spelling, and how to say it. */
function limits(schema) {
  const said = [];
  const number = (key) => (typeof schema[key] === "number" ? schema[key] : null);
  const say = (key, words) => number(key) !== null && said.push(`${words} ${number(key)}`);
  say("minimum", "at least");
  say("exclusiveMinimum", "more than");
  say("maximum", "at most");
  say("exclusiveMaximum", "less than");
  say("multipleOf", "a multiple of");
  if (number("minLength") > 0) said.push(`at least ${count(schema.minLength, "character")}`);
  if (number("maxLength") !== null) said.push(`at most ${count(schema.maxLength, "character")}`);
  if (number("minItems") > 0) said.push(`at least ${count(schema.minItems, "item")}`);
  if (number("maxItems") !== null) said.push(`at most ${count(schema.maxItems, "item")}`);
  if (schema.uniqueItems === true) said.push("no item twice");
  if (textOf(schema.format)) said.push(`format ${schema.format}`);
  if (textOf(schema.pattern)) said.push(`pattern ${schema.pattern}`);
  return said;
}

const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

function control(schema, form, at) {
  if (Array.isArray(schema.allOf) && schema.allOf.length > 1) return { why: "The schema is put together of several." };
  if (Object.hasOwn(schema, "const")) return choice([option(schema.const)]);
  if (Array.isArray(schema.enum)) {
    if (schema.enum.length > MOST_CHOICES) return { why: "There are too many values to choose from." };
    return choice(schema.enum.map((value) => option(value)));
  }
  const options = schema.anyOf ?? schema.oneOf;
  if (Array.isArray(options) && !isObject(schema.properties)) return variants(schema, options, form, at);
  if (Array.isArray(schema.type)) {
    return variants(
      schema,
      schema.type.map((type) => ({ ...rangeOf(schema), type })),
      form,
      at,
    );
  }
  switch (schema.type ?? (isObject(schema.properties) ? "object" : isObject(schema.items) ? "array" : undefined)) {
    case "string":
      return { kind: "text", format: textOf(schema.format), shortest: schema.minLength, longest: schema.maxLength };
    case "number":
    case "integer":
      return {
        kind: schema.type,
        range: [schema.minimum, schema.maximum, schema.exclusiveMinimum, schema.exclusiveMaximum],
      };
    case "boolean":
      return { kind: "boolean" };
    case "null":
      return choice([option(null)]);
    case "array":
      return list(schema, form, at);
    case "object":
      return object(schema, form, at);
    case undefined:
      return { why: "Any value is taken." };
    default:
      return { why: "The schema names a type that is none." };
  }
}

/** A schema without what belongs to the field as a whole. */
function rangeOf({ title, description, default: _, anyOf, oneOf, type, $defs, definitions, ...rest }) {
  return rest;
}

const option = (value, label) => ({ value, label: label ?? (typeof value === "string" ? value : write(value, 0)) });
const choice = (options) => ({ kind: "choice", options });

function variants(schema, options, form, at) {
  const whole = rangeOf(schema);
  const parts = options.map((part) =>
    isObject(part)
      ? { ...whole, ...(schema.type && !Array.isArray(schema.type) ? { type: schema.type } : {}), ...part }
      : part,
  );
  const named = parts.map((part) => resolve(part, form.root, at.followed).schema);
  const rest = parts.filter((_, index) => named[index].type !== "null");
  const nullable = rest.length < parts.length;
  if (rest.length > 1 && named.every((part) => Object.hasOwn(part, "const"))) {
    return choice(named.map((part) => option(part.const, textOf(part.title))));
  }
  if (rest.length === 0) return choice([option(null)]);
  if (rest.length === 1) {
    const inner = fieldOf(rest[0], form, at);
    const { kind, ...own } = inner;
    const kept = annotations(schema, at);
    return {
      ...own,
      kind,
      nullable: kind !== "json" && (nullable || inner.nullable),
      title: kept.title ?? own.title,
      hint: kept.hint ?? own.hint,
      default: kept.default === undefined ? own.default : kept.default,
    };
  }
  if (rest.length > MOST_VARIANTS || at.depth >= DEEPEST) return { why: "There are too many kinds of value." };
  const fields = rest.map((part) => fieldOf(part, form, { ...at, name: "", required: true, depth: at.depth + 1 }));
  if (fields.every((field) => field.kind === "json")) return { why: "The value may be of several kinds." };
  return { kind: "variants", nullable, options: fields.map((field) => ({ label: kindName(field), field })) };
}

function kindName(field) {
  if (field.title) return field.title;
  switch (field.kind) {
    case "text":
      return "text";
    case "boolean":
      return "yes or no";
    case "choice":
      return field.options.length === 1 ? field.options[0].label : "one of a few";
    case "list":
      return "list";
    case "object":
      return "object";
    case "json":
      return "JSON";
    default:
      return field.kind;
  }
}

function list(schema, form, at) {
  if (Array.isArray(schema.prefixItems) || !isObject(schema.items)) return { why: "Items of any kind are taken." };
  if (at.depth >= DEEPEST) return { why: "The form would be too deep." };
  const item = fieldOf(schema.items, form, { ...at, name: "", required: true, depth: at.depth + 1 });
  if (item.kind === "json") return { why: item.why };
  return { kind: "list", item, least: schema.minItems, most: schema.maxItems };
}

function object(schema, form, at) {
  const properties = isObject(schema.properties) ? Object.entries(schema.properties) : [];
  const open =
    schema.additionalProperties === true || isObject(schema.additionalProperties) || isObject(schema.patternProperties);
  if (properties.length === 0 && at.depth > 0) return { why: "An object with any properties is taken." };
  if (at.depth >= DEEPEST) return { why: "The form would be too deep." };
  if (properties.length > form.left) return { why: "The form would be too long." };
  const required = Array.isArray(schema.required) ? schema.required : [];
  const fields = properties.map(([name, part]) =>
    fieldOf(part, form, { name, required: required.includes(name), depth: at.depth + 1, followed: at.followed }),
  );
  return { kind: "object", fields, open };
}

// Drafts.

let keys = 0;

/** A draft of a list's item: the key tells the items apart while they come and go. */
export const itemOf = (draft) => ({ key: (keys += 1), draft });

/** What stands in an untouched field: its default, what there is no choice about, or nothing. */
export function draftOf(field) {
  // Where null stands for nothing, nothing says so as well, and more tools understand it.
  if (field.default !== undefined && (field.default !== null || field.required)) {
    const draft = fit(field, field.default);
    if (draft.mode !== "json" || field.kind === "json") return draft;
  }
  return field.required ? emptyDraft(field) : { mode: "absent" };
}

/** What stands in a field that is to be given and has no value yet. */
export function emptyDraft(field) {
  switch (field.kind) {
    case "object":
      return { mode: "given", value: { drafts: field.fields.map(draftOf), extra: "" } };
    case "list":
      return {
        mode: "given",
        value: Array.from({ length: Math.min(field.least || 0, 5) }, () => itemOf(draftOf(field.item))),
      };
    case "choice":
      return field.options.length === 1 ? { mode: "given", value: 0 } : { mode: "absent" };
    case "variants":
      return { mode: "absent" };
    case "json":
      return { mode: "json", value: field.example ?? "" };
    default:
      return { mode: "absent" };
  }
}

/** The draft of a value: as the field says it, or as JSON if it does not suit the field. */
export function fit(field, value) {
  if (value === null && field.nullable) return { mode: "null" };
  const given = field.kind === "json" ? undefined : fitted(field, value);
  return given === undefined ? { mode: "json", value: writeVisibly(value) } : { mode: "given", value: given };
}

function fitted(field, value) {
  switch (field.kind) {
    case "text":
      return typeof value === "string" ? value : undefined;
    case "number":
    case "integer": {
      const digits = value instanceof Exact ? value.digits : typeof value === "number" ? String(value) : undefined;
      return digits !== undefined && (field.kind === "number" || isWhole(digits)) ? digits : undefined;
    }
    case "boolean":
      return typeof value === "boolean" ? value : undefined;
    case "choice": {
      const text = write(value, 0);
      const index = field.options.findIndex((each) => write(each.value, 0) === text);
      return index < 0 ? undefined : index;
    }
    case "list":
      return Array.isArray(value) && value.length <= MOST_FIELDS
        ? value.map((item) => itemOf(fit(field.item, item)))
        : undefined;
    case "object": {
      if (!isObject(value)) return undefined;
      const drafts = field.fields.map((part) =>
        Object.hasOwn(value, part.name) ? fit(part, value[part.name]) : absent(part),
      );
      const others = Object.entries(value).filter(([key]) => !field.fields.some((part) => part.name === key));
      return { drafts, extra: others.length ? writeVisibly(Object.fromEntries(others)) : "" };
    }
    case "variants": {
      const drafts = field.options.map((each) => fit(each.field, value));
      const suits = drafts.findIndex((draft, index) => isClean(draft, field.options[index].field));
      return suits < 0 ? undefined : { index: suits, draft: drafts[suits] };
    }
    default:
      return undefined;
  }
}

const absent = (field) => (field.kind === "json" ? { mode: "json", value: "" } : { mode: "absent" });

/** Whether a draft says its value with controls alone, and lacks nothing. */
function isClean(draft, field) {
  if (draft.mode === "json") return field.kind === "json";
  if (draft.mode !== "given") return draft.mode === "null" || !field.required;
  switch (field.kind) {
    case "list":
      return draft.value.every((item) => isClean(item.draft, field.item));
    case "object":
      return (
        (field.open || !draft.value.extra) &&
        field.fields.every((part, index) => isClean(draft.value.drafts[index], part))
      );
    case "variants":
      return isClean(draft.value.draft, field.options[draft.value.index].field);
    default:
      return true;
  }
}

// Arguments.

/** Numbers as JSON writes them, and as people do: +1, .5 and 1. are understood. */
const NUMBER = /^([+-]?)(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/;

function digitsOf(text) {
  const [, sign, digits, power = ""] = text.trim().match(NUMBER) ?? [];
  if (digits === undefined) return null;
  const [whole, part = ""] = digits.split(".");
  return `${sign === "-" ? "-" : ""}${whole.replace(/^0+(?=\d)/, "") || "0"}${part ? `.${part}` : ""}${power}`;
}

const isWhole = (digits) => /^-?\d+$/.test(digits) || Number.isInteger(Number(digits));

/**
 * The value of a draft, `undefined` when it is left out, and the problems with it: { path, text, fatal }. `path` leads
 * through the indexes of fields and items. A fatal one keeps the value from being written at all; any other is what the
 * tool would probably say.
 */
export function valueOf(field, draft) {
  const problems = [];
  const value = gather(field, draft, [], problems);
  return { value, problems };
}

function gather(field, draft, path, problems) {
  const problem = (text, fatal = false) => problems.push({ path, text, fatal });
  switch (draft.mode) {
    case "absent":
      if (field.required) problem("This is required.");
      return undefined;
    case "null":
      return null;
    case "json":
      if (!draft.value.trim()) {
        if (field.required) problem("This is required.");
        return undefined;
      }
      try {
        return read(draft.value);
      } catch (error) {
        problem(`This is not JSON: ${reason(error)} A text needs quotes around it.`, true);
        return undefined;
      }
    default:
      return given(field, draft.value, path, problems, problem);
  }
}

function given(field, value, path, problems, problem) {
  switch (field.kind) {
    case "text": {
      const length = [...value].length;
      if (length < field.shortest) problem(`This is shorter than ${count(field.shortest, "character")}.`);
      if (length > field.longest) problem(`This is longer than ${count(field.longest, "character")}.`);
      return value;
    }
    case "number":
    case "integer": {
      const digits = digitsOf(value);
      if (digits === null) {
        problem("This is not a number.", true);
        return undefined;
      }
      if (field.kind === "integer" && !isWhole(digits)) problem("This is not a whole number.");
      const [least, most, above, below] = field.range;
      const number = Number(digits);
      if (number < least || number <= above) problem("This is too small.");
      if (number > most || number >= below) problem("This is too large.");
      return numberOf(digits);
    }
    case "choice":
      return field.options[value].value;
    case "list": {
      if (value.length < field.least) problem(`This has fewer than ${count(field.least, "item")}.`);
      if (value.length > field.most) problem(`This has more than ${count(field.most, "item")}.`);
      return value
        .map((item, index) => gather(field.item, item.draft, [...path, index], problems))
        .filter((item) => item !== undefined);
    }
    case "object": {
      const entries = field.fields
        .map((part, index) => [part.name, gather(part, value.drafts[index], [...path, index], problems)])
        .filter(([, part]) => part !== undefined);
      return Object.fromEntries([...entries, ...extras(value.extra, [...path, "extra"], problems)]);
    }
    case "variants":
      return gather(field.options[value.index].field, value.draft, [...path, value.index], problems);
    default:
      return value;
  }
}

function extras(text, path, problems) {
  if (!text.trim()) return [];
  try {
    const value = read(text);
    if (isObject(value)) return Object.entries(value);
    problems.push({ path, text: 'This has to be a JSON object: {"name": value}.', fatal: true });
  } catch (error) {
    problems.push({ path, text: `This is not JSON: ${reason(error)}`, fatal: true });
  }
  return [];
}

/** The arguments that a JSON text stands for; none when it is empty. */
export function argumentsOf(text) {
  if (!text.trim()) return { value: {}, problems: [] };
  try {
    const value = read(text);
    if (isObject(value)) return { value, problems: [] };
    return { problems: [{ path: [], text: 'The arguments have to be a JSON object: {"name": value}.', fatal: true }] };
  } catch (error) {
    return { problems: [{ path: [], text: `This is not JSON: ${reason(error)}`, fatal: true }] };
  }
}

/** What a JSON parser said, without the piece of the text that some browsers quote. */
const reason = (error) =>
  `${String(error.message)
    .split(/, "|, \.\.\.| \(line/)[0]
    .replace(/\.$/, "")
    .slice(0, 120)}.`;

// The controls of a form that `fields.js` made of a schema. Each has a label, says what is expected, and hands its draft
// up with `onDraft`. Ids are made of places in the form, never of names that a server gave.

import { html, useState } from "./preact.js";
import { draftOf, emptyDraft, itemOf } from "./fields.js";
import { write } from "./exact.js";
import { Shown, pieces, visible } from "./text.js";

const ABSENT = { mode: "absent" };

/** Formats that have one line. All other texts may have several. */
const LINES = ["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "url", "uuid"];

/** The properties of a tool: `field` of the kind `object` or `json`, its `draft`, and the problems that are to be shown. */
export function Form({ field, draft, onDraft, problems }) {
  const at = { id: "argument", problems, depth: 0 };
  if (field.kind === "json") return html`<${Control} field=${{ ...field, name: "Arguments" }} draft=${draft} onDraft=${onDraft} ...${at} />`;
  if (field.fields.length === 0 && !field.open && !draft.value.extra) return html`<p class="quiet">This tool takes no arguments.</p>`;
  return html`<${Properties} field=${field} draft=${draft} onDraft=${onDraft} ...${at} />`;
}

/** The id of the control at `path`, for what wants to lead there. */
export const idOf = (path) => ["argument", ...path].join("-");

const below = (problems, step) =>
  problems.filter(({ path }) => path[0] === step).map((problem) => ({ ...problem, path: problem.path.slice(1) }));

function Properties({ field, draft, onDraft, id, problems, depth }) {
  const { drafts, extra } = draft.value;
  const change = (value) => onDraft({ mode: "given", value: { ...draft.value, ...value } });
  return html`
    ${field.fields.map((part, index) => html`<${Control} key=${index} field=${part} draft=${drafts[index]} id="${id}-${index}"
      problems=${below(problems, index)} depth=${depth + 1} onDraft=${(next) => change({ drafts: drafts.with(index, next) })} />`)}
    ${(field.open || extra) && html`<${Control} id="${id}-extra" problems=${below(problems, "extra")} depth=${depth + 1}
      field=${{ kind: "json", name: "Other properties", limits: [], examples: [], why: "A JSON object of what has no field above." }}
      draft=${{ mode: "json", value: extra }} onDraft=${(next) => change({ extra: next.value })} />`}`;
}

function Control(all) {
  const { field, draft } = all;
  if (draft.mode === "json" || field.kind === "json") return html`<${Raw} ...${all} />`;
  if (field.kind === "object" || field.kind === "list" || field.kind === "variants") return html`<${Group} ...${all} />`;
  return html`<${Single} ...${all} />`;
}

/** A name that the server gave, as the text of a label. */
const nameOf = (field) => visible(field.name, 100);

function Hints({ field, id }) {
  const { title, hint, limits, examples } = field;
  const said = [...limits];
  if (field.default !== undefined) said.push(`default ${write(field.default, 0)}`);
  if (examples.length) said.push(`for example ${examples.map((each) => write(each, 0)).join(", ")}`);
  const all = [field.deprecated && "deprecated", ...said].filter(Boolean).join("; ");
  return html`<div class="hint" id="${id}-hint">
    ${title && title !== field.name && html`<div><${Shown} text=${title} limit=${200} /></div>`}
    ${hint && html`<div><${Shown} text=${hint} limit=${600} block=${hint.includes("\n")} /></div>`}
    ${all && html`<div><${Shown} text=${all[0].toUpperCase() + all.slice(1)} limit=${300} /></div>`}
  </div>`;
}

function Problems({ problems, id }) {
  const own = problems.filter(({ path }) => path.length === 0);
  return html`<div id="${id}-problem">${own.map(({ text }) => html`<p class="problem">${text}</p>`)}</div>`;
}

/** The attributes of a control that has hints and problems. */
const described = (id, field, problems) => ({
  id,
  "aria-describedby": `${id}-hint ${id}-problem`,
  "aria-required": field.required ? "true" : undefined,
  "aria-invalid": problems.some(({ path }) => path.length === 0) ? "true" : undefined,
});

const Label = ({ field, id }) => html`<div class="named">
  <label for=${id}>${nameOf(field)}</label>${field.required && !field.isPart && html`<span class="mark" aria-hidden="true">required</span>`}
</div>`;

/** A box beside a control, about what the control itself cannot say. */
const Box = ({ id, about, checked, onCheck, children }) => html`<label class="choice"><input type="checkbox" checked=${checked}
  aria-describedby=${about} onChange=${(event) => onCheck(event.target.checked)} id=${id} />${children}</label>`;

function Single({ field, draft, onDraft, id, problems }) {
  const attributes = described(id, field, problems);
  return html`<div class="argument">
    <${Label} field=${field} id=${id} />
    ${field.kind === "boolean" || field.kind === "choice"
      ? html`<${Choice} field=${field} draft=${draft} onDraft=${onDraft} attributes=${attributes} />`
      : html`<${Typed} field=${field} draft=${draft} onDraft=${onDraft} attributes=${attributes} />`}
    <${Hints} field=${field} id=${id} /><${Problems} problems=${problems} id=${id} />
  </div>`;
}

function Choice({ field, draft, onDraft, attributes }) {
  const options = field.kind === "boolean"
    ? [["true", "true"], ["false", "false"]]
    : field.options.map((each, index) => [String(index), visible(each.label, 100)]);
  const choose = ({ target: { value } }) => {
    if (value === "") onDraft(ABSENT);
    else if (value === "null") onDraft({ mode: "null" });
    else onDraft({ mode: "given", value: field.kind === "boolean" ? value === "true" : Number(value) });
  };
  const value = draft.mode === "given" ? String(draft.value) : draft.mode === "null" ? "null" : "";
  return html`<select ...${attributes} value=${value} onChange=${choose}>
    <option value="" selected=${value === ""}>${field.required ? "Choose…" : "Left out"}</option>
    ${options.map(([key, label]) => html`<option key=${key} value=${key} selected=${value === key}>${label}</option>`)}
    ${field.nullable && html`<option value="null" selected=${value === "null"}>null</option>`}
  </select>`;
}

function Typed({ field, draft, onDraft, attributes }) {
  const { id } = attributes;
  const value = draft.mode === "given" ? draft.value : "";
  const isText = field.kind === "text";
  const type = (event) => onDraft(event.target.value === "" ? ABSENT : { mode: "given", value: event.target.value });
  const control = { ...attributes, value, onInput: type, disabled: draft.mode === "null", spellcheck: isText, autocomplete: "off" };
  const isLine = !isText || (LINES.includes(field.format) && !value.includes("\n"));
  // Elsewhere an empty text is rarely meant, and JSON can say it.
  const mayBeEmpty = isText && value === "" &&
    (draft.mode === "given" || (draft.mode === "absent" && field.required && !(field.shortest > 0) && !field.format));
  const rows = Math.min(Math.max(value.split("\n").length, Math.ceil(value.length / 90), 1), 14);
  return html`
    ${field.format === "password"
      ? html`<input type="password" ...${control} autocomplete="new-password" />`
      : isLine
        ? html`<input type="text" inputmode=${isText ? undefined : "decimal"} ...${control} />`
        : html`<textarea class="text" rows=${rows} ...${control}></textarea>`}
    ${pieces(value).some((piece) => piece.escape) && html`<p class="hint">There is something in it that is not seen:
      ${" "}<${Shown} text=${value} limit=${300} /></p>`}
    ${mayBeEmpty && html`<${Box} id="${id}-empty" about="${id}-hint" checked=${draft.mode === "given"}
      onCheck=${(on) => onDraft(on ? { mode: "given", value: "" } : ABSENT)}>Send an empty text<//>`}
    ${field.nullable && html`<${Box} id="${id}-null" about="${id}-hint" checked=${draft.mode === "null"}
      onCheck=${(on) => onDraft(on ? { mode: "null" } : ABSENT)}>Send null<//>`}`;
}

/** JSON text, for what has no control and for values that do not suit theirs. */
function Raw({ field, draft, onDraft, id, problems }) {
  const value = draft.mode === "json" ? draft.value : "";
  const rows = Math.min(Math.max(value.split("\n").length, 2), 20);
  const unsuited = field.kind !== "json";
  return html`<div class="argument">
    <${Label} field=${field} id=${id} />
    <textarea class="code" rows=${rows} value=${value} spellcheck=${false} autocomplete="off" ...${described(id, field, problems)}
      onInput=${(event) => onDraft({ mode: "json", value: event.target.value })}></textarea>
    <${Hints} field=${field} id=${id} />
    <p class="hint">As JSON. ${unsuited ? "This value does not suit the schema." : field.why}
      ${unsuited && html` <button type="button" class="link" onClick=${() => onDraft(draftOf({ ...field, default: undefined }))}>Begin anew</button>`}</p>
    <${Problems} problems=${problems} id=${id} />
  </div>`;
}

/** Objects, lists and values of several kinds: a set of controls that may be there or not. */
function Group(all) {
  const { field, draft, onDraft, id, problems } = all;
  const isThere = draft.mode === "given";
  const Inside = { object: Properties, list: Items, variants: Kinds }[field.kind];
  const give = () => onDraft({ mode: "given", value: field.kind === "list" ? [] : emptyDraft(field).value });
  return html`<fieldset class="argument" aria-describedby="${id}-hint ${id}-problem" id=${id} tabindex="-1">
    <legend>${nameOf(field)}${field.required && !field.isPart && html` <span class="mark">required</span>`}</legend>
    <${Hints} field=${field} id=${id} /><${Problems} problems=${problems} id=${id} />
    ${field.kind === "object" && !field.required && html`<${Box} id="${id}-given" about="${id}-hint" checked=${isThere}
      onCheck=${(on) => (on ? give() : onDraft(ABSENT))}>Give ${nameOf(field)}<//>`}
    ${field.kind === "list" && !field.required && !(isThere && draft.value.length) && html`<${Box} id="${id}-empty" about="${id}-hint"
      checked=${isThere} onCheck=${(on) => (on ? give() : onDraft(ABSENT))}>Send an empty list<//>`}
    ${field.nullable && html`<${Box} id="${id}-null" about="${id}-hint" checked=${draft.mode === "null"}
      onCheck=${(on) => onDraft(on ? { mode: "null" } : field.required ? emptyDraft(field) : ABSENT)}>Send null<//>`}
    ${draft.mode !== "null" && (isThere || field.kind !== "object") && html`<${Inside} ...${all} />`}
  </fieldset>`;
}

const focusOn = (id) => setTimeout(() => document.getElementById(id)?.focus(), 0);

function Items({ field, draft, onDraft, id, problems, depth }) {
  const items = draft.mode === "given" ? draft.value : [];
  const name = nameOf(field);
  const add = () => {
    onDraft({ mode: "given", value: [...items, itemOf(draftOf(field.item))] });
    focusOn(`${id}-${items.length}`);
  };
  const remove = (index) => {
    const rest = items.toSpliced(index, 1);
    onDraft(rest.length || field.required ? { mode: "given", value: rest } : ABSENT);
    focusOn(`${id}-add`);
  };
  return html`
    ${items.map((item, index) => html`<div key=${item.key} class="item">
      <${Control} field=${{ ...field.item, name: `${name} ${index + 1}`, title: null, isPart: true }} draft=${item.draft} id="${id}-${index}"
        problems=${below(problems, index)} depth=${depth + 1}
        onDraft=${(next) => onDraft({ mode: "given", value: items.with(index, { ...item, draft: next }) })} />
      <button type="button" onClick=${() => remove(index)}>Remove ${name} ${index + 1}</button>
    </div>`)}
    <button type="button" id="${id}-add" onClick=${add}>Add to ${name}</button>`;
}

function Kinds({ field, draft, onDraft, id, problems, depth }) {
  const index = draft.mode === "given" ? draft.value.index : null;
  // What was entered for one kind is there again when the user comes back to it.
  const [before, remember] = useState({});
  const choose = ({ target: { value } }) => {
    const kept = index === null ? before : { ...before, [index]: draft.value.draft };
    remember(kept);
    if (value === "") return onDraft(ABSENT);
    onDraft({ mode: "given", value: { index: Number(value), draft: kept[value] ?? draftOf(field.options[value].field) } });
  };
  const chosen = index === null ? "" : String(index);
  return html`
    <label for="${id}-kind">Kind of ${nameOf(field)}</label>
    <select id="${id}-kind" value=${chosen} onChange=${choose}>
      <option value="" selected=${chosen === ""}>${field.required ? "Choose…" : "Left out"}</option>
      ${field.options.map(({ label }, at) => html`<option key=${at} value=${String(at)} selected=${chosen === String(at)}>${visible(label, 100)}</option>`)}
    </select>
    ${index !== null && html`<${Control} key=${index} field=${{ ...field.options[index].field, name: field.name, title: null, isPart: true }} id="${id}-${index}"
      draft=${draft.value.draft} problems=${below(problems, index)} depth=${depth + 1}
      onDraft=${(next) => onDraft({ mode: "given", value: { index, draft: next } })} />`}`;
}

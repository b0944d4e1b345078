// What came of a run, on the page: never more of it than a page can bear, all of it as a file, and none of it as markup.

import { html, useEffect, useMemo, useState } from "./preact.js";
import { announce } from "./page.js";
import { endingOf, sizeOf, spanOf } from "./outcome.js";
import { Shown } from "./text.js";

/** Characters that are shown at first, and that each request for more adds. */
const PAGE = 20_000;

/** Characters beyond which a text is only there as a file. */
const MOST = 400_000;

/** Blocks that are shown before the user asks for the others. */
const MOST_BLOCKS = 50;

/** `outcome` is what `outcomeOf` or `failureOf` of `outcome.js` gave. */
export function Result({ outcome }) {
  const [all, setAll] = useState(false);
  const { state, title } = outcome;
  const kind = state === "success" ? "good" : state === "cancelled" ? "idle" : "bad";
  const blocks = outcome.blocks ?? [];
  const shown = all ? blocks : blocks.slice(0, MOST_BLOCKS);
  return html`<div class="result" data-outcome=${state}>
    <p><span class="state ${kind}">${title}</span>
      ${outcome.duration !== undefined && html` <span class="quiet">after ${spanOf(outcome.duration)}</span>`}</p>
    ${outcome.message && html`<div class=${state === "failed" ? "failure" : "notice"}>
      <p><${Shown} text=${outcome.message} /></p>
      ${outcome.errors.length > 1 && html`<ul>${outcome.errors.map(({ msg }) => html`<li><${Shown} text=${msg} /></li>`)}</ul>`}
      ${outcome.advice && html`<p>${outcome.advice}</p>`}
      ${outcome.code && html`<p class="quiet">Code: <code><${Shown} text=${outcome.code} /></code></p>`}
    </div>`}
    ${shown.map((block, index) => html`<${Block} key=${index} block=${block} number=${index + 1} />`)}
    ${shown.length < blocks.length && html`<p><button type="button" onClick=${() => setAll(true)}>Show ${blocks.length - shown.length} more parts</button></p>`}
    ${state !== "failed" && state !== "cancelled" && blocks.length === 0 && html`<p class="quiet">The answer is empty.</p>`}
  </div>`;
}

function Block({ block, number }) {
  switch (block.kind) {
    case "text":
    case "json":
      return html`<${Text} block=${block} number=${number} />`;
    case "picture":
    case "sound":
    case "file":
      return html`<${Media} block=${block} number=${number} />`;
    case "link":
      return html`<div class="part"><h3>Link to a resource</h3>
        <p><${Shown} text=${block.name} limit=${200} /></p>
        <p><code><${Shown} text=${block.uri} limit=${500} /></code></p>
        ${block.about && html`<p><${Shown} text=${block.about} limit=${500} /></p>`}</div>`;
    default:
      return null;
  }
}

/** A text in pages of what a browser lays out at once. */
function Text({ block, number }) {
  const [limit, setLimit] = useState(PAGE);
  const [plain, setPlain] = useState(false);
  const json = block.kind === "json" ? block.text : block.json;
  const text = json && !plain ? json : block.text;
  const isJson = json !== null && json !== undefined;
  const shown = text.slice(0, limit);
  const rest = text.length - shown.length;
  const kind = isJson ? "JSON" : "Text";
  return html`<div class="part">
    <div class="bar"><h3 class="grow">${block.title ? html`<${Shown} text=${block.title} limit=${200} />` : kind}</h3>
      ${isJson && block.kind === "text" && html`<button type="button" aria-pressed=${plain} onClick=${() => setPlain(!plain)}>As it came</button>`}
      <${Copy} text=${block.text} what="${kind} ${number}" />
      <${Download} parts=${[block.text]} type="text/plain" name="result-${number}.${isJson ? "json" : "txt"}" /></div>
    <pre tabindex="0" role="region" aria-label="${kind} ${number}"><${Shown} key=${limit} text=${shown} limit=${MOST} block=${true} /></pre>
    ${rest > 0 && html`<p class="quiet">${rest.toLocaleString()} more characters.
      ${limit < MOST
        ? html` <button type="button" onClick=${() => setLimit(Math.min(limit * 4, MOST))}>Show more</button>`
        : " Download the text to see all of it."}</p>`}
  </div>`;
}

function Media({ block, number }) {
  const url = useBlob([block.bytes], block.blobType);
  const [broken, setBroken] = useState(false);
  const name = `result-${number}.${endingOf(block.type)}`;
  const what = { picture: "Image", sound: "Audio", file: "File" }[block.kind];
  return html`<div class="part">
    <div class="bar"><h3 class="grow">${what}</h3><${Download} parts=${[block.bytes]} type=${block.blobType} name=${name} /></div>
    <p class="quiet"><${Shown} text=${block.type || "unknown type"} limit=${100} />, ${sizeOf(block.bytes.length)}</p>
    ${block.kind === "picture" && url && !broken && html`<img src=${url} alt="Image ${number} of the result" onError=${() => setBroken(true)} />`}
    ${block.kind === "sound" && url && !broken && html`<audio controls src=${url} aria-label="Audio ${number} of the result" onError=${() => setBroken(true)}></audio>`}
    ${broken && html`<p class="problem">The browser cannot show this. Download it to look at it.</p>`}
  </div>`;
}

/** A URL for bytes in this tab, for as long as the component is there. */
function useBlob(parts, type) {
  const [url, setUrl] = useState(null);
  useEffect(() => {
    const made = URL.createObjectURL(new Blob(parts, { type }));
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [parts[0], type]);
  return url;
}

function Download({ parts, type, name }) {
  const save = () => {
    const url = URL.createObjectURL(new Blob(parts, { type }));
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
    // The browser has begun to read it by then.
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  };
  const size = useMemo(() => new Blob(parts).size, [parts[0]]);
  return html`<button type="button" onClick=${save} aria-label="Download ${name}">Download (${sizeOf(size)})</button>`;
}

function Copy({ text, what }) {
  const [said, setSaid] = useState("Copy");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setSaid("Copied");
      announce(`${what} is in the clipboard.`);
    } catch {
      // Browsers give the clipboard to secure pages alone: https, or this machine.
      setSaid("Not allowed here");
      announce("The browser does not let this page use the clipboard. Download it, or select the text.");
    }
    setTimeout(() => setSaid("Copy"), 2000);
  };
  return html`<button type="button" onClick=${copy} aria-label="Copy ${what}">${said}</button>`;
}

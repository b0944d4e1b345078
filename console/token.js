// The prompt for a token: a Portolan with tokens wants one with every call.

import { html, useRef, useState } from "./preact.js";
import { setToken } from "./api.js";
import { Dialog } from "./page.js";

/** `refused` says that a token was given and not taken. `onDone` is told whether there is a new one. */
export function TokenPrompt({ refused, onDone }) {
  const field = useRef(null);
  const [missing, setMissing] = useState(false);
  const submit = (event) => {
    event.preventDefault();
    const given = field.current.value.trim();
    // What no header can hold is no token.
    if (!/^[\x21-\x7e]+$/.test(given)) return setMissing(true);
    setToken(given);
    onDone(true);
  };
  return html`<${Dialog} title="Token needed" onClose=${() => onDone(false)}>
    <form onSubmit=${submit} autocomplete="off">
      <p>This Portolan wants a token. Its operator makes one with <code>portolan token new</code>. This tab keeps it until
        it is closed.</p>
      ${refused && html`<p class="failure" role="alert">The token was not taken: it is wrong, or was taken back.</p>`}
      <label for="token">Token</label>
      <input id="token" ref=${field} type="password" autocomplete="off" spellcheck=${false} data-first
        aria-invalid=${missing} aria-describedby=${missing ? "token-problem" : undefined} />
      ${missing && html`<p id="token-problem" class="problem">Paste the token as it was given to you, without spaces.</p>`}
      <div class="actions">
        <button type="button" onClick=${() => onDone(false)}>Cancel</button>
        <button type="submit" class="main">Use this token</button>
      </div>
    </form>
  <//>`;
}

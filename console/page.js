// What all pages share: their heading, what they say while they load and when they fail, and the question before something
// is lost.

import { html, useCallback, useEffect, useErrorBoundary, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { Shown, visible } from "./text.js";

/** Says a sentence to whoever does not see the page. */
export function announce(text) {
  const place = document.getElementById("announcements");
  // The same sentence twice is a change only if there was nothing in between.
  place.textContent = "";
  setTimeout(() => { place.textContent = text; }, 50);
}

let navigated = false;

/** From here on a page's heading takes the focus, so that the keyboard and the screen reader follow; the first one does
 *  not, as the browser has just said the title. */
export function noteNavigation() {
  navigated = true;
}

/** The one heading of a page; also its title. */
export function Heading({ children, title }) {
  const place = useRef(null);
  useEffect(() => {
    if (navigated) place.current.focus();
  }, []);
  useEffect(() => {
    document.title = `${visible(title ?? place.current.textContent, 80)} · Portolan`;
  });
  return html`<h1 tabindex="-1" ref=${place}>${children}</h1>`;
}

/** Reads `path` once, or every `every` milliseconds while the page is seen. Gives `{ data, error, loading, reload }`; what
 *  was read stays when a later reading fails. A `path` of `null` reads nothing. */
export function useLoaded(path, { every = 0 } = {}) {
  const fresh = { path, data: undefined, error: null, loading: path !== null };
  const [state, setState] = useState(fresh);
  const latest = useRef(0);
  // Whoever does not want to give a token is not asked again and again; trying again is theirs.
  const locked = useRef(false);
  const reload = useCallback(async () => {
    if (path === null) return;
    const turn = ++latest.current;
    // What comes late does not overwrite what was asked for after it.
    const settle = (change) => {
      if (turn !== latest.current) return;
      setState((before) => ({ ...(before.path === path ? before : { data: undefined }), ...change, path, loading: false }));
    };
    try {
      settle({ data: await call("GET", path), error: null });
      locked.current = false;
    } catch (error) {
      settle({ error });
      locked.current = error.status === 401;
    }
  }, [path]);
  useEffect(() => {
    let timer;
    let over = false;
    let first = true;
    const round = async () => {
      const began = performance.now();
      if (first || (!document.hidden && !locked.current)) {
        first = false;
        await reload();
      }
      // What takes long to read is read less often.
      const pause = Math.max(every, Math.min(5 * every, 10 * (performance.now() - began)));
      if (every > 0 && !over) timer = setTimeout(round, pause);
    };
    const seen = () => { if (every > 0 && !document.hidden && !locked.current) reload(); };
    round();
    document.addEventListener("visibilitychange", seen);
    return () => {
      over = true;
      latest.current += 1;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [path, every, reload]);
  return { ...(state.path === path ? state : fresh), reload };
}

export function Loading({ what = "Loading" }) {
  return html`<p class="quiet" role="status">${what}…</p>`;
}

/** What went wrong, in the API's own sentence, and a way to try again. */
export function Failure({ error, retry }) {
  if (!error) return null;
  return html`<div class="failure" role="alert" tabindex="-1">
    <p><${Shown} text=${error.message} /></p>
    ${advice(error) && html`<p>${advice(error)}</p>`}
    ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
  </div>`;
}

/** Shows `children`, or what `instead(retry)` gives when they cannot be drawn, until `at` is another. */
export function Boundary({ at, instead, children }) {
  const [broken, setBroken] = useState(null);
  useErrorBoundary((error) => {
    console.error(error);
    setBroken({ at });
  });
  return broken !== null && Object.is(broken.at, at) ? instead(() => setBroken(null)) : children;
}

function advice(error) {
  if (error.status === 403) return "Log out and give a token with a wider scope.";
  if (error.status === 401) return "Give a token of this Portolan to go on.";
  return null;
}

/** A dialog that is open as long as it is there. `onClose` is called when the user leaves it; what is marked `data-first` has
 *  the focus. */
export function Dialog({ title, children, onClose }) {
  const place = useRef(null);
  useEffect(() => {
    const before = document.activeElement;
    place.current.showModal();
    place.current.querySelector("[data-first]")?.focus();
    return () => before?.isConnected && before.focus();
  }, []);
  const cancel = (event) => { event.preventDefault(); onClose(); };
  return html`<dialog ref=${place} aria-labelledby="dialog-title" onCancel=${cancel}>
    <h2 id="dialog-title">${title}</h2>${children}
  </dialog>`;
}

/** A question before something is lost. `onYes` may be async; what it throws is shown. */
export function Confirm({ title, yes, onYes, onClose, children }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const go = async () => {
    if (busy) return;
    setBusy(true);
    setError(null);
    try {
      await onYes();
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    ${children}
    <${Failure} error=${error} />
    <div class="actions">
      <button type="button" onClick=${onClose} data-first>Cancel</button>
      <button type="button" class="danger" onClick=${go} aria-disabled=${busy}>${yes}</button>
    </div>
  <//>`;
}

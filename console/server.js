import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Server() {
  return html`<${Heading}>A server<//>`;
}

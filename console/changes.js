import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Changes() {
  return html`<${Heading}>Changes<//>`;
}

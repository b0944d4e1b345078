import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Servers() {
  return html`<${Heading}>Servers<//>`;
}

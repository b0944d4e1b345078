import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Runs() {
  return html`<${Heading}>Runs<//>`;
}

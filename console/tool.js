import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Tool() {
  return html`<${Heading}>Tool<//>`;
}

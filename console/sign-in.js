import { html } from "./preact.js";
import { Heading } from "./page.js";

export function SignIn() {
  return html`<${Heading}>Sign in<//>`;
}

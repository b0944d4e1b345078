import { html } from "./preact.js";
import { Heading } from "./page.js";

export function Add() {
  return html`<${Heading}>Add a server<//>`;
}

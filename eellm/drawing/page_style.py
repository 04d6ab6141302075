"""Style and behaviour of report.html. Everything is inside the page; colours are variables, so dark mode swaps them."""

from __future__ import annotations

from collections.abc import Sequence

from eellm.drawing.inline_svg import head_variable
from eellm.drawing.palette import Background, exit_colours
from eellm.metrics.names import FINAL

ROLES = {
    "light": {
        "text": "#1c1c1e",
        "muted": "#66666b",
        "grid": "#e4e4e0",
        "background": "#ffffff",
        "page": "#f6f6f3",
        "accent": "#3d4f8f",
    },
    "dark": {
        "text": "#ececea",
        "muted": "#a0a0a6",
        "grid": "#35363a",
        "background": "#1e1f22",
        "page": "#151618",
        "accent": "#a9b8f5",
    },
}


def theme(heads: Sequence[str]) -> str:
    """CSS variables of both themes, one colour per head included; paper is always light."""
    dark = f"@media screen and (prefers-color-scheme: dark){{:root{{{_variables(heads, 'dark')}}}}}"
    return f":root{{{_variables(heads, 'light')}}}\n{dark}"


def _variables(heads: Sequence[str], background: Background) -> str:
    exits = [head for head in heads if head != FINAL]
    colours = dict(zip(exits, exit_colours(len(exits), background), strict=True)) | {FINAL: ROLES[background]["text"]}
    roles = [f"--{role}:{colour}" for role, colour in ROLES[background].items()]
    return ";".join([*roles, *(f"{head_variable(head)}:{colour}" for head, colour in colours.items())])


STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: clamp(20px, 4vw, 56px) clamp(16px, 3vw, 32px) 64px; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 10px;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; line-height: 1.3; margin: 52px 0 6px; }
h3 { font-size: 0.95rem; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 68ch; text-wrap: pretty; }
.kicker, .note { color: var(--muted); font-size: 0.875rem; }
.kicker { margin: 0 0 6px; letter-spacing: 0.01em; }
.words { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 0 36px; }
.words h2 { margin: 32px 0 6px; font-size: 1.08rem; }
.words p { font-size: 0.96rem; }
header p { max-width: 80ch; margin-bottom: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0 8px; }
.tile { background: var(--background); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; }
.tile span { color: var(--muted); font-size: 0.83rem; line-height: 1.35; display: block; margin-top: 2px; }
.card { background: var(--background); border: 1px solid var(--grid); border-radius: 10px; }
.scroll { overflow-x: auto; margin: 14px 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 14px; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; font-size: 0.82rem; vertical-align: bottom; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--background); }
td.share { background: linear-gradient(90deg, color-mix(in srgb, var(--c) 24%, transparent) var(--v), transparent var(--v)); }
tr.reference td { font-weight: 600; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; background: var(--c); margin-right: 0.5em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px; margin: 18px 0; }
figure { margin: 0; padding: 16px clamp(10px, 2vw, 18px) 14px; }
figure svg { width: 100%; max-width: 640px; height: auto; display: block; stroke-linejoin: round; stroke-linecap: butt; }
figure h3 { margin-bottom: 8px; }
@media (min-width: 860px) {
  .figures figure:last-child:nth-child(odd) { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr; gap: 0 34px;
    grid-template-rows: auto 1fr; }
  .figures figure:last-child:nth-child(odd) svg { grid-row: 1 / 3; }
  .figures figure:last-child:nth-child(odd) h3 { grid-column: 2; grid-row: 1; }
  .figures figure:last-child:nth-child(odd) figcaption { grid-column: 2; grid-row: 2; margin-top: 0; }
}
figcaption { color: var(--muted); font-size: 0.85rem; line-height: 1.45; margin-top: 8px; }
.model { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0 8px; align-items: stretch; }
.stage { border: 1px solid var(--grid); border-radius: 10px; background: var(--background); padding: 8px 12px 12px; }
.stage > span { color: var(--muted); font-size: 0.78rem; display: block; margin-bottom: 6px; }
.layers { display: flex; flex-wrap: wrap; gap: 5px; align-items: flex-start; }
.layer, .part { font-size: 0.78rem; line-height: 26px; height: 28px; min-width: 28px; text-align: center;
  border: 1px solid var(--grid); border-radius: 5px;
  font-variant-numeric: tabular-nums; color: var(--muted); }
.part { padding: 0 8px; border-style: dashed; }
.head { font-size: 0.78rem; line-height: 26px; height: 28px; padding: 0 9px; border-radius: 14px; color: var(--text);
  white-space: nowrap;
  border: 1.5px solid var(--c); background: color-mix(in srgb, var(--c) 18%, transparent); }
.sample { padding: 14px 18px 16px; margin: 14px 0; }
.text { font: 0.86rem/1.85 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4;
  margin: 10px 0 0; }
.prompt { font-weight: 700; }
.token { background: color-mix(in srgb, var(--c) 20%, transparent); text-decoration: underline 2px var(--c);
  text-underline-offset: 3px;
  text-decoration-style: var(--line, solid); text-decoration-skip-ink: none; border-radius: 3px; cursor: default; }
.token.final { background: none; text-decoration: none; }
.token:hover { outline: 2px solid var(--c); outline-offset: 0; }
.stack { display: flex; height: 8px; border-radius: 4px; overflow: hidden; gap: 1px; margin: 8px 0 6px; max-width: 560px; }
.stack i { background: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 0.83rem; color: var(--muted); }
.legend u { text-decoration: underline 2px var(--c); text-decoration-style: var(--line, solid); text-underline-offset: 3px;
  color: var(--text); }
.legend .plain { color: var(--text); text-decoration: none; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--accent); }
.settings { columns: 300px; column-gap: 28px; font-size: 0.85rem; padding: 14px 18px; margin-top: 10px; }
.settings section { break-inside: avoid; margin: 0 0 14px; }
.settings h3 { font-size: 0.85rem; }
.settings div { display: flex; justify-content: space-between; gap: 16px; border-bottom: 1px solid var(--grid);
  padding: 2px 0; }
.settings dt { color: var(--muted); }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.settings dl { margin: 0; }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--grid); color: var(--muted); font-size: 0.85rem; }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--text); color: var(--background);
  font-size: 0.8rem; line-height: 1.4;
  padding: 6px 10px; border-radius: 6px; max-width: min(280px, 92vw); white-space: pre-line; }
#tip[hidden] { display: none; }
@media print {
  :root { color-scheme: light; }
  body { background: #fff; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .tile, figure, tr, .sample { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 28px; }
  .scroll { overflow: visible; }
  th, td { padding: 3px 4px; white-space: normal; overflow-wrap: break-word; font-size: 7pt; }
  .screen { display: none; }
  th:first-child, td:first-child { position: static; }
  .figures { grid-template-columns: 1fr 1fr; }
  #tip { display: none; }
}
"""

SCRIPT = """
const tip = document.getElementById("tip");
function show(token) {
  const d = token.dataset;
  tip.textContent = [d.head + (d.layer ? ", after layer " + d.layer : ""), d.confidence && "confidence " + d.confidence,
    d.logprob && "log-probability " + d.logprob].filter(Boolean).join("\\n");
  tip.hidden = false;
  const box = token.getClientRects()[0], own = tip.getBoundingClientRect();
  const above = box.top - own.height - 6;
  tip.style.left = Math.max(6, Math.min(box.left, innerWidth - own.width - 6)) + "px";
  tip.style.top = (above > 6 ? above : box.bottom + 6) + "px";
}
for (const kind of ["pointerover", "click"])
  document.addEventListener(kind, event => {
    const token = event.target.closest(".token");
    if (token) show(token); else tip.hidden = true;
  });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
let folded = [];
addEventListener("beforeprint", () => {  // paper cannot be unfolded
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach(part => part.open = true);
});
addEventListener("afterprint", () => folded.forEach(part => part.open = false));
"""

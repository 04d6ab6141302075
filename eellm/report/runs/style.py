"""What a page of many runs adds to the style and behaviour of all pages."""

STYLE = """
main { max-width: 1480px; }
small { color: var(--muted); font-weight: 400; font-size: 0.82em; }
a { color: var(--accent); }
table.sortable th { white-space: normal; }
table.sortable th button { all: unset; cursor: pointer; }
table.sortable th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table.sortable th[aria-sort] { color: var(--text); }
table.sortable th[aria-sort="ascending"] button::after { content: " \\2191"; }
table.sortable th[aria-sort="descending"] button::after { content: " \\2193"; }
table.texts td { text-align: left; white-space: normal; vertical-align: top; }
table.texts td:last-child { min-width: 24ch; overflow-wrap: anywhere; }
table.texts th { text-align: left; }
table.wraps td { white-space: normal; }
@media (max-width: 600px) {
  table.wraps :is(th, td) { padding: 6px 5px; }
  table.wraps :is(th, td):first-child { padding-left: 12px; max-width: 26vw; }
  table.texts td:last-child { min-width: 12ch; }
  table.texts :is(th, td) { padding: 6px 8px; }
}
tr.unfinished td { color: var(--muted); font-style: italic; }
.key { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 0.83rem; margin: 0 0 10px; }
.key svg { width: 36px; height: 12px; margin-right: 7px; vertical-align: -1px; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.panels figure:last-child:nth-child(odd) { grid-column: auto; display: block; }
figure img { width: 100%; height: auto; display: block; }
figure.card + figure.card { margin-top: 16px; }
.figures figure.card + figure.card { margin-top: 0; }
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = row => row.cells[column].innerText.trim();
      const value = row => parseFloat(text(row).replaceAll(",", ""));
      const missing = row => text(row) === "\\u2013";
      const order = (a, b) => isNaN(value(a)) || isNaN(value(b)) ? text(a).localeCompare(text(b)) : value(a) - value(b);
      const rows = [...body.rows].sort((a, b) => missing(a) - missing(b) || (down ? order(b, a) : order(a, b)));
      body.append(...rows);
    });
  });
}
"""

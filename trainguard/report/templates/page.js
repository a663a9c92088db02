"use strict";
// Sorts and filters the tables. Without it the page is complete, only still.
for (const table of document.querySelectorAll("table:has(th button)")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const { value } = row.cells[column].dataset;
    return value === undefined ? row.cells[column].textContent.trim() : Number(value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b || 0
      : String(a).localeCompare(String(b), undefined, { numeric: true });
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = body.rows.length > 0 && typeof key(body.rows[0], column) === "number";
      const before = heading.getAttribute("aria-sort");
      // A first click shows the largest number or the first word.
      const down = before ? before === "ascending" : numeric;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const count = document.getElementById(`${input.dataset.filters}-count`);
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words[i].includes(wanted);
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
  });
}
// On paper everything is shown.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
